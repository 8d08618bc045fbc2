"""The tiled log-prob head beside the naive one: memory at a long context, time and numbers where both run.

    python -m tests.benchmarks.logprob_head [--tokens 16384] [--shared-tokens 2048] [--rounds 3] [--chunk 2048]
                                            [--vocabulary 151936] [--hidden 1536] [--threads 2] [--dtypes fp32]

Forward and backward of sum(upstream x log-prob), random hidden states and weights, temperature 1; each variant in a
process of its own. naive: logits, log_softmax and gather, by autograd. torch: `linear_cross_entropy` with its chunks,
where this torch has it. Extra memory is the highest resident set (VmHWM) above the one before, without the weight's own
gradient; the naive path's at `--tokens` is 3 x tokens x vocabulary x 4 bytes: logits, log-softmax and their gradient.
Rounds alternate the variants, medians are printed. Differences are to the naive path in fp32 on the same (bf16) inputs,
as a share of its largest element. Targets: 1/12 of naive's memory, 1.3 x its time, fp32 differences of 1e-5.

At 130 GFLOP/s: 4 min at 16,384 tokens, and 2.5 min a round at 2,048, most of it torch's. Most memory: 6 GB, the naive
path at 2,048 tokens. bf16 is for CPUs that have such products: elsewhere the naive path takes a quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from megatron_apo.model.logprobs import vocab_parallel_log_probs
from megatron_apo.telemetry.units import data_size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MEMORY_SHARE, TIME_RATIO, DIFFERENCE = 1 / 12, 1.3, 1e-5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--shared-tokens", type=int, default=2048, help="a size at which the naive path runs too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--run", nargs=3, metavar=("VARIANT", "DTYPE", "FILE"), help="one variant, in this process")
    args = parser.parse_args()
    if args.run:
        variant, dtype, file = args.run
        print(json.dumps(measure(args, variant, DTYPES[dtype], Path(file))))
        return
    print(f"vocabulary {args.vocabulary:,}, hidden {args.hidden:,}, {args.threads} threads, {args.chunk} tokens a tile")
    with tempfile.TemporaryDirectory(prefix="logprob-head-") as folder:
        met = [*compare(args, Path(folder)), *at_length(args, Path(folder))]
    if not all(met):
        sys.exit(1)


def compare(args: argparse.Namespace, folder: Path) -> list[bool]:
    """Every variant at --shared-tokens; whether each target was met."""
    targets = []
    names = ["naive", "tiled"] + (["torch"] if hasattr(functional, "linear_cross_entropy") else [])
    variants = [(name, dtype) for dtype in args.dtypes for name in names]
    found = defaultdict(list)
    for _ in range(args.rounds):
        for variant in variants:
            found[variant].append(child(args, args.shared_tokens, *variant, folder / "-".join(variant)))
    if ("naive", "fp32") not in found:
        child(args, args.shared_tokens, "naive", "fp32", folder / "naive-fp32")
    exact = torch.load(folder / "naive-fp32")
    print(f"{args.shared_tokens:,} tokens: seconds, x naive, extra memory; largest difference from naive in fp32:")
    print(f"  {'':12}{'seconds':>8}{'x naive':>9}{'memory':>10}{'log-prob':>11}{'d hidden':>11}{'d weight':>11}")
    for name, dtype in variants:
        seconds, naive = (median(run["seconds"] for run in found[key, dtype]) for key in (name, "naive"))
        memory = max(run["memory"] for run in found[name, dtype])
        ours = torch.load(folder / f"{name}-{dtype}")
        differences = [float((ours[key] - exact[key]).abs().max() / exact[key].abs().max()) for key in exact]
        judged = [(seconds / naive, TIME_RATIO)] if name == "tiled" else []
        if (name, dtype) == ("tiled", "fp32"):
            judged.append((max(differences), DIFFERENCE))
        targets += [value <= target for value, target in judged]
        cells = "".join(f"{difference:11.1e}" for difference in differences)
        row = f"{seconds:8.2f}{seconds / naive:9.2f}{data_size(memory):>10}{cells}"
        print(f"  {f'{name} {dtype}':12}{row}  {' '.join(verdict(*pair) for pair in judged)}", flush=True)
    return targets


def at_length(args: argparse.Namespace, folder: Path) -> list[bool]:
    """The tiled head at --tokens; whether its memory is as small as it is to be."""
    targets = []
    naive = 3 * args.tokens * args.vocabulary * 4
    print(f"{args.tokens:,} tokens: naive takes {data_size(naive)} by its formula")
    for dtype in args.dtypes:
        run = child(args, args.tokens, "tiled", dtype, folder / "long")
        memory, seconds = run["memory"], run["seconds"]
        print(
            f"  tiled {dtype}: {data_size(memory)}, 1/{naive / memory:.0f} of naive, {seconds:.0f} s  "
            f"{verdict(memory / naive, MEMORY_SHARE)}",
            flush=True,
        )
        targets.append(memory / naive <= MEMORY_SHARE)
    return targets


def verdict(value: float, target: float) -> str:
    return f"{'met' if value <= target else 'MISSED'}: target {target:.3g}"


def child(args: argparse.Namespace, tokens: int, variant: str, dtype: str, file: Path) -> dict[str, float]:
    options = {"shared-tokens": tokens} | {key: getattr(args, key) for key in ("chunk", "vocabulary", "hidden")}
    command = [sys.executable, "-m", "tests.benchmarks.logprob_head", "--threads", str(args.threads)]
    command += [f"--{key}={value}" for key, value in options.items()] + ["--run", variant, dtype, str(file)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure(args: argparse.Namespace, variant: str, dtype: torch.dtype, file: Path) -> dict[str, float]:
    """Seconds and extra bytes of one forward and backward; the numbers go to `file`."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shapes = (args.shared_tokens, args.hidden), (args.vocabulary, args.hidden)
    # bf16 values in both types, so that both have the same inputs; logits have a standard deviation of about 2.
    hidden, weight = (torch.randn(shape).bfloat16() for shape in shapes)
    weight.mul_(2 / args.hidden**0.5)
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    target, upstream = torch.randint(args.vocabulary, (args.shared_tokens,)), torch.randn(args.shared_tokens)
    few = [x[:64].detach().clone().requires_grad_() for x in (hidden, weight)]  # loads libraries
    log_probs(variant, *few, target[:64] % 64, args.chunk).sum().backward()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS (proc(5))
    before = status_bytes("VmRSS")
    start = time.perf_counter()
    found = log_probs(variant, hidden, weight, target, args.chunk)
    (found * upstream).sum().backward()
    seconds = time.perf_counter() - start
    memory = status_bytes("VmHWM") - before - weight.grad.nbytes
    torch.save({"log_prob": found.detach().float(), "hidden": hidden.grad.float(), "weight": weight.grad.float()}, file)
    return {"seconds": seconds, "memory": memory}


def log_probs(variant: str, hidden: Tensor, weight: Tensor, target: Tensor, chunk: int) -> Tensor:
    if variant == "naive":
        return (hidden @ weight.T).float().log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    if variant == "torch":
        options = torch.nn.LinearCrossEntropyOptions()
        return -functional.linear_cross_entropy(hidden, weight, target, reduction="none", options=options)
    log_prob, _, _ = vocab_parallel_log_probs(
        hidden, weight, target, first_row=0, temperature=1.0, chunk_tokens=chunk, group=None
    )
    return log_prob


def status_bytes(field: str) -> int:
    """A size of this process, as /proc/self/status has it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
