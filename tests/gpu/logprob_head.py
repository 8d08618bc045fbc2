"""The tiled log-prob head beside the naive one on a GPU: time, peak memory, and how far the numbers are apart.

    python -m tests.gpu.logprob_head [--quick] [--tiny] [--tokens 16384] [--vocabulary 151936] [--rounds 3]
                                      [--chunk 2048]

Forward and backward of sum(upstream x log-prob) at hidden sizes of 1,536 and 3,584; the variants are those of
`tests/benchmarks/logprob_head.py`. Memory is what is allocated beyond the inputs and the weight's own gradient.
Differences are to the naive path in fp32 on the same (bf16) inputs, as a share of its largest element. Seconds are
medians. A minute on one GPU. `--quick`: the smaller hidden size, once.
"""

from __future__ import annotations

import argparse
from statistics import median

import torch
from torch import Tensor

from megatron_apo.telemetry.timers import PhaseTimer
from megatron_apo.telemetry.units import data_size
from tests.benchmarks.logprob_head import DIFFERENCE, DTYPES, MEMORY_SHARE, log_probs
from tests.gpu.report import Verdict, describe_machine, parse

_HIDDEN = (1536, 3584)
# Of bf16's last bit, 2^-8: products are exact, but a gradient is rounded before it is multiplied, and in the end.
_BF16_DIFFERENCE = 2**-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=2048)
    args = parse(parser)
    if args.tiny:
        args.tokens, args.vocabulary = 256, 10000
    if args.quick:
        args.rounds = 1
    verdict = Verdict()
    describe_machine()
    print(f"{args.tokens:,} tokens x {args.vocabulary:,}, tiles of {args.chunk} tokens")
    print(f"{'':20}{'seconds':>9}{'x naive':>9}{'memory':>10}{'log-prob':>10}{'d hidden':>10}{'d weight':>10}")
    for hidden in (64,) if args.tiny else _HIDDEN[:1] if args.quick else _HIDDEN:
        compare(args, hidden, verdict)
    verdict.finish()


def compare(args: argparse.Namespace, hidden: int, verdict: Verdict) -> None:
    """Every variant at one hidden size."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    # bf16 values in both types; logits have a standard deviation of about 2.
    inputs = normal(args.tokens, hidden).bfloat16(), (normal(args.vocabulary, hidden) * 2 / hidden**0.5).bfloat16()
    upstream = normal(args.tokens)
    target = torch.randint(args.vocabulary, (args.tokens,), generator=generator, device=device)
    exact: list[Tensor] = []
    for dtype in DTYPES:
        naive_s, naive_memory = 0.0, 0
        for name in ("naive", "tiled"):
            timer, seconds, memory = PhaseTimer(), [], 0
            for _ in range(args.rounds + 1):
                leaves = [x.to(DTYPES[dtype], copy=True).requires_grad_() for x in inputs]
                held = torch.cuda.memory_allocated() if device == "cuda" else 0
                with timer.phase("run"):
                    found = log_probs(name, *leaves, target, args.chunk)
                    (found * upstream).sum().backward()
                phase = timer.pop()["run"]
                seconds.append(phase.seconds)
                memory = phase.peak_bytes - held - leaves[1].grad.nbytes
            run_s = median(seconds[1:])
            naive_s, naive_memory = naive_s or run_s, naive_memory or memory
            numbers = [found.detach(), *(leaf.grad for leaf in leaves)]
            exact = exact or numbers
            away = [
                float((ours.float() - theirs).abs().max() / theirs.abs().max())
                for ours, theirs in zip(numbers, exact, strict=True)
            ]
            cells = f"{run_s:9.3f}{run_s / naive_s:9.2f}{data_size(memory):>10}{''.join(f'{x:10.1e}' for x in away)}"
            row, met = f"{hidden:,} {name} {dtype}", ""
            if name == "tiled":
                figures = {"difference": (max(away), DIFFERENCE if dtype == "fp32" else _BF16_DIFFERENCE)}
                if device == "cuda":
                    figures["memory"] = (memory / (3 * args.tokens * args.vocabulary * 4), MEMORY_SHARE)
                met = verdict.of(row, **figures)
            print(f"{row:<20}{cells}  {met}", flush=True)
            if name == "tiled":
                sizes = f"{data_size(memory)} against {data_size(naive_memory)}"
                verdict.note(f"{row} {run_s:.3f} s, {run_s / naive_s:.2f} x naive, {sizes}, {max(away):.1e} away")
            del leaves, found, numbers


if __name__ == "__main__":
    main()
