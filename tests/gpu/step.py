"""Training steps at 16k tokens a sequence, weights random: time, tokens/s, MFU and peak memory of each phase.

    python -m tests.gpu.step --shape 1.5B|7B [--quick] [--tiny] [--tokens 16384] [--sequences 4] [--steps 3]
                             [SECTION.KEY=VALUE ...]

Stage 2's own path from a batch on: the reference's log-probs, forward and backward, two optimizer steps. What the
recipe says can be changed at the end of the line, e.g. `model.fp8.recipe=tensorwise` or `train.recompute=selective`. A
first step warms up; the others' means are shown. The limit: a first log-ratio that the learner allows. Five minutes on
one GPU. `--quick`: two sequences, two steps.

The last phase, `offload`, is what `train.offload_while_sampling` adds to a step: optimizer state to the host and back.

A 7B in bf16 with fp32 optimizer state takes 18 bytes a parameter (2 weight, 4 gradient, 12 master and moments), and 2
more while the reference computes: 142 GiB of a GPU that has 139. Here its moments are bf16, which takes Transformer
Engine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import fmean

import psutil
import torch

from megatron_apo.config import Recipe, RecipeError
from megatron_apo.model.flops import training_rates
from megatron_apo.model.hf_config import ModelSpec
from megatron_apo.model.precision import has_transformer_engine
from megatron_apo.runtime.topology import Topology
from megatron_apo.telemetry.gpu import peak_tflops
from megatron_apo.telemetry.timers import Phase
from megatron_apo.telemetry.units import data_size
from megatron_apo.weights.families import hf_tensors
from tests.batches import no_values
from tests.gpu.common import SHAPES, TINY, job, prepared, random_batch, recipe_of, spec_of
from tests.gpu.report import Verdict, cannot_run, device_name, parse

_PROMPT = 512  # tokens
_PARTS = {"reference": "reference", "forward_backward": "train", "train": "step"}  # of a rate: the phase it is over


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    args = parse(parser)
    spec = spec_of(SHAPES[args.shape] | (TINY if args.tiny else {}))
    if args.quick:
        args.sequences, args.steps = 2, 2
    if args.tiny:
        args.tokens, args.steps = 1024, 1
    elif args.shape == "7B" and not has_transformer_engine():
        cannot_run("a 7B's optimizer fits this GPU with Transformer Engine alone, and it is not installed here")
    try:
        recipe = recipe_for(args)
    except RecipeError as error:
        cannot_run(str(error))
    require_host_memory(recipe, spec)
    verdict = Verdict()
    with job() as topology:
        lengths = [(_PROMPT, args.tokens - _PROMPT)] * args.sequences
        try:
            first_log_ratio, allowed, phases = run(recipe, spec, topology, lengths, args.steps)
        except RecipeError as error:  # of what this machine lacks
            cannot_run(str(error))
        except torch.cuda.OutOfMemoryError as error:
            raise SystemExit(f"tests/gpu: {args.shape} does not fit: {str(error).splitlines()[0]}") from None
        print(f"{args.shape}: {args.sequences} sequences of {args.tokens:,} tokens, {' '.join(args.overrides)}")
        verdict.note(f"{report(recipe, spec, lengths, phases)}, first log-ratio {first_log_ratio:.1e}")
        print(f"first log-ratio {first_log_ratio:.1e}  {verdict.of(args.shape, log_ratio=(first_log_ratio, allowed))}")
    verdict.finish()


def recipe_for(args: argparse.Namespace) -> Recipe:
    """What fits one GPU of 139 GiB, and what the command line says."""
    defaults = [
        f"model.dtype={'fp32' if args.tiny else 'bf16'}",
        f"data.max_prompt_tokens={_PROMPT}",
        f"sampling.max_response_tokens={args.tokens - _PROMPT}",
        f"rollout.max_num_batched_tokens={args.tokens + 256}",
        f"train.tokens_per_micro_batch={args.tokens}",
        f"train.prompts_per_step={args.sequences}",
    ]
    if args.shape == "7B":
        defaults += ["model.reference_mode=offload", "train.recompute=full"]
        if not args.tiny:
            defaults.append("optimizer.moments=bf16")
    return recipe_of([*defaults, *args.overrides])


def require_host_memory(recipe: Recipe, spec: ModelSpec) -> None:
    """What optimizer.cpu_offload takes: fp32 weights and moments, and gradients in pinned memory, which torch rounds up
    to a power of two for each tensor."""
    sizes = [torch.Size(shape).numel() * 4 for shape in hf_tensors(spec).values()]
    needed = recipe.optimizer.cpu_offload * sum(3 * size + (1 << (size - 1).bit_length()) for size in sizes)
    free = psutil.virtual_memory().available
    if needed > free:
        cannot_run(
            f"optimizer.cpu_offload={recipe.optimizer.cpu_offload} takes {data_size(needed)} of the host's memory, and "
            f"{data_size(free)} are free; use a smaller share"
        )


def run(
    recipe: Recipe, spec: ModelSpec, topology: Topology, lengths: Sequence[tuple[int, int]], steps: int
) -> tuple[float, float, list[dict[str, Phase]]]:
    """(The first step's log-ratio, what it may be, the phases of the steps after it.)"""
    learner, batch = prepared(recipe, spec, topology), random_batch(spec, lengths)
    found = []
    for _ in range(steps + 1):
        with learner.timer.phase("step"):
            record = learner.learn(batch, no_values(batch))
        with learner.timer.phase("offload"), learner.trainable.offloaded():
            pass
        found.append((record.first_log_ratio, learner.timer.pop()))
    return found[0][0], learner.first_log_ratio_tolerance, [phases for _, phases in found[1:]]


def report(
    recipe: Recipe, spec: ModelSpec, lengths: Sequence[tuple[int, int]], steps: Sequence[dict[str, Phase]]
) -> str:
    """The table: seconds, peak memory, and the rates of what computes. Returns a step's in one line."""
    seconds = {phase: fmean(step[phase].seconds for step in steps) for phase in steps[0]}
    tflops = recipe.telemetry.peak_tflops or peak_tflops(device_name(), recipe.model.fp8 is not None)
    peak = tflops and tflops * 1e12
    rates = training_rates(spec, lengths, seconds, num_ranks=1, peak_flops=peak, has_reference=True)
    part_of = {phase: part for part, phase in _PARTS.items()}
    print(f"{'':12}{'seconds':>9}{'peak':>11}{'tokens/s':>10}{'TFLOP/s':>9}{'MFU':>8}")
    for phase, phase_s in seconds.items():
        memory = max(step[phase].peak_bytes for step in steps)
        cells = ""
        if part := part_of.get(phase):
            cells = f"{rates[f'tokens_per_s/{part}']:10,.0f}{rates[f'tflops_per_rank/{part}']:9.1f}"
            cells += f"{rates[f'mfu/{part}']:8.1%}" if peak else ""
        print(f"{phase:<12}{phase_s:9.2f}{data_size(memory):>11}{cells}", flush=True)
    whole, memory = seconds["step"], max(step["step"].peak_bytes for step in steps)
    mfu = f"MFU {rates['mfu/forward_backward']:.1%} of forward and backward" if peak else "MFU not known"
    return f"{whole:.2f} s, {rates['tokens_per_s/train']:,.0f} tokens/s, {mfu}, {data_size(memory)}"


if __name__ == "__main__":
    main()
