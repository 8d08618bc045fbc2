"""A stack of layers in FP8 beside bf16: seconds of forward and backward, and how far the numbers are apart.

    python -m tests.gpu.fp8_speed [--quick] [--tiny] [--tokens 16384] [--layers 4] [--rounds 5]

Layers of the 1.5B and the 7B shape under a small head, Transformer Engine's in all rows, by stage 2's own path. Forward
is the reference's pass, without gradient. Medians. Two minutes on one GPU. `--quick`: the 1.5B's layers, two rounds.
"""

from __future__ import annotations

import argparse
from statistics import median

from megatron_apo.config import RecipeError
from megatron_apo.model.flops import forward_flops
from megatron_apo.model.precision import has_transformer_engine
from megatron_apo.runtime.topology import Topology
from tests.gpu.common import (
    FP8_RECIPES,
    SHAPES,
    TINY,
    Measured,
    errors,
    free_memory,
    job,
    measure,
    random_batch,
    recipe_of,
    spec_of,
)
from tests.gpu.parity import judged
from tests.gpu.report import Verdict, cannot_run, parse

_HEAD = {"vocab_size": 1024}  # its share of the time is less than a hundredth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parse(parser)
    if args.quick:
        args.rounds = 2
    if not args.tiny and not has_transformer_engine():
        cannot_run("no transformer-engine, or one that does not load")
    verdict, measured = Verdict(), 0
    with job() as topology:
        print(f"{'':18}{'forward':>10}{'backward':>10}{'x bf16':>8}{'TFLOP/s':>9}{'log-prob':>10}{'gradient':>10}")
        for shape in ["1.5B"] if args.quick else SHAPES:
            measured += compare(shape, args, topology, verdict)
    verdict.finish()
    if not measured:
        cannot_run("needs Transformer Engine and a GPU that has FP8; none of its recipes was measured")


def compare(shape: str, args: argparse.Namespace, topology: Topology, verdict: Verdict) -> int:
    """Every row of a shape. Returns how many FP8 recipes could be measured."""
    config = SHAPES[shape] | {"num_hidden_layers": args.layers} | (TINY if args.tiny else {}) | _HEAD
    spec, prompt, tokens = spec_of(config), 16, 256 if args.tiny else args.tokens
    # The last token is a label alone. Prompts have no log-prob, but gradients.
    batch = random_batch(spec, [(prompt, tokens - prompt + 1)])
    flops = forward_flops(spec, [(prompt, tokens - prompt + 1)])
    common = ["train.minibatches=1", "train.prompts_per_step=1", f"train.tokens_per_micro_batch={tokens}"]
    common += ["data.max_prompt_tokens=16", f"sampling.max_response_tokens={tokens - prompt}", "model.dtype=bf16"]
    common += [f"rollout.max_num_batched_tokens={tokens + 256}", "objective.loss_scale=unit", "optimizer.clip_grad=0"]
    layers = "local" if args.tiny else "te"
    bf16: Measured | None = None
    count = 0
    for precision, override in [("bf16", f"model.layers={layers}")] + [
        (name, f"model.fp8.recipe={name}") for name in FP8_RECIPES
    ]:
        name = f"{shape} {precision}"
        try:
            found = measure(recipe_of([*common, override]), spec, topology, batch, args.rounds + 1)
        except RecipeError as error:
            print(f"{name:<18}not run: {error}", flush=True)
            continue
        finally:
            free_memory()
        forward, both = (median(step[phase].seconds for step in found.phases[1:]) for phase in ("reference", "train"))
        bf16 = bf16 or found
        ratio = median(step["train"].seconds for step in bf16.phases[1:]) / both
        cells = f"{forward * 1e3:8.1f}ms{(both - forward) * 1e3:8.1f}ms{ratio:8.2f}{3 * flops / both / 1e12:9.0f}"
        e = errors(found, bf16)
        met = "" if found is bf16 else verdict.of(name, **judged("fp8", spec, e, found))
        print(f"{name:<18}{cells}{e.mean:10.1e}{e.gradient:10.1e}  {met}", flush=True)
        if found is not bf16:
            count += 1
            verdict.note(f"{name} {ratio:.2f} x bf16, log-prob {e.mean:.1e}, gradient {e.gradient:.1e} away")
    return count


if __name__ == "__main__":
    main()
