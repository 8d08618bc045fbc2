"""What leaves the GPU comes back bit for bit: the reference in every mode, and what the optimizer holds.

    python -m tests.gpu.placement [--quick] [--tiny]

A small dense model and a mixture of experts learn for two steps. The reference's log-probs must then be what they were
before, and the same in each mode; the policy's weights and the optimizer's state must be the same after the reference
was active, and after `Trainable.offloaded`. `held` is allocated between steps, `offloaded` within that; at least nine
tenths of what should leave must have left. A minute on one GPU. `--quick`: the dense model in bf16.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_apo.config import RecipeError
from megatron_apo.data.layout import make_micro_batches
from megatron_apo.model.hf_config import ModelSpec
from megatron_apo.model.placement import Reference
from megatron_apo.parallel.pipeline import forward_only
from megatron_apo.runtime.topology import Topology
from megatron_apo.telemetry.units import data_size
from tests.batches import no_values
from tests.gpu.common import free_memory, job, prepared, random_batch, recipe_of, spec_of
from tests.gpu.parity import COMMON, FAMILIES
from tests.gpu.report import Verdict, parse

_LENGTHS = [(9, 30), (20, 3), (3, 60), (7, 11)]
_STEPS = 2
_LEFT = 0.9  # of the bytes that should leave; the allocator rounds


def main() -> None:
    args = parse(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    verdict = Verdict()
    with job() as topology:
        print(f"{'':32}{'held':>11}{'offloaded':>11}")
        quick = args.quick or args.tiny
        for family in ["qwen3"] if quick else ["qwen3", "qwen3_moe"]:
            spec = spec_of(COMMON | {"model_type": family} | FAMILIES[family])
            for dtype, layers in (("fp32", "local"), ("bf16", "local"), ("bf16", "te")):
                if dtype == "bf16" or not args.quick:
                    compare(spec, dtype, layers, topology, verdict)
    verdict.finish()


def compare(spec: ModelSpec, dtype: str, layers: str, topology: Topology, verdict: Verdict) -> None:
    """A row for each mode."""
    resident: Found | None = None
    noted = []
    for mode in ("resident", "offload", "swap"):
        name = f"{spec.family} {dtype} {layers} {mode}"
        try:
            found = run(
                spec, topology, f"model.dtype={dtype}", f"model.layers={layers}", f"model.reference_mode={mode}"
            )
        except RecipeError as error:
            print(f"{name:<32}not run: {error}", flush=True)
            return
        finally:
            free_memory()
        figures = {name: (float(changed), 0.0) for name, changed in found.changed.items()}
        resident = resident or found
        figures["other than resident"] = (float(differ(found.log_probs, resident.log_probs)), 0.0)
        if topology.device.type == "cuda":
            figures["offloaded"] = (found.offloaded, found.held - _LEFT * found.optimizer_bytes)
            if mode != "resident":
                figures["held"] = (found.held, resident.held - _LEFT * found.weight_bytes)
        cells = f"{data_size(found.held):>11}{data_size(found.offloaded):>11}"
        print(f"{name:<32}{cells}  {verdict.of(name, **figures)}", flush=True)
        noted.append(f"{mode} {data_size(found.held)}")
    verdict.note(f"{spec.family} {dtype} {layers} holds {', '.join(noted)}; {data_size(found.offloaded)} offloaded")


@dataclass(frozen=True)
class Found:
    log_probs: list[Tensor]  # the reference's
    changed: dict[str, bool]  # what must not have
    held: int  # bytes, as the following
    offloaded: int
    weight_bytes: int
    optimizer_bytes: int  # gradients included


def run(spec: ModelSpec, topology: Topology, *overrides: str) -> Found:
    """Two steps, the reference before and after them, and the optimizer offloaded."""
    # A rate that bf16 weights can follow.
    recipe = recipe_of([*overrides, f"train.prompts_per_step={len(_LENGTHS)}", "optimizer.lr=0.01"])
    learner = prepared(recipe, spec, topology)
    policy, trainable, reference = learner.policy, learner.trainable, learner.reference
    batch = random_batch(spec, _LENGTHS)
    micro = [one.to(topology.device) for one in make_micro_batches(recipe, batch.sequences)]

    def log_probs(model: Reference) -> list[Tensor]:
        with model.active() as chunks:
            return forward_only(chunks, micro)

    def state() -> list[Tensor]:
        weights = [parameter.data for chunk in policy for parameter in chunk.parameters()]
        return [tensor.clone() for tensor in [*weights, *trainable._own_tensors()]]

    first, start = log_probs(reference), log_probs(Reference(policy))
    for _ in range(_STEPS):
        learner.learn(batch, no_values(batch))
    learned, before = log_probs(Reference(policy)), state()
    changed = {
        "another reference": differ(log_probs(reference), first),
        "another policy at first": differ(start, first),
        "nothing learned": not differ(learned, start),
        "the reference's traces": differ(state(), before),
    }
    weights = [parameter for chunk in policy for parameter in chunk.parameters()]
    optimizer_bytes = sum(4 * weight.numel() for weight in weights) + size(trainable._own_tensors())
    before = [tensor.cpu() for tensor in before]
    held = allocated()
    with trainable.offloaded():
        offloaded = allocated()
    changed["the offloading's traces"] = differ(state(), before)
    changed["another policy"] = differ(log_probs(Reference(policy)), learned)
    return Found(first, changed, held, offloaded, size(weights), optimizer_bytes)


def differ(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> bool:
    """In any bit but a zero's sign; NaN does."""
    return not all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(ours, theirs, strict=True))


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


if __name__ == "__main__":
    main()
