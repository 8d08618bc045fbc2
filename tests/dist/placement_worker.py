"""One rank of the placement tests: the training loop's steps under every placement. Started by test_placement.py.

    main(WORK, LAYOUT)

Rank 0 writes WORK/LAYOUT.pt: {case: {run: {"reference", "norms", "weights", "restored", "bytes"}}}; bytes are its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_apo.config import OptimizerConfig
from megatron_apo.data.layout import lay_out
from megatron_apo.learner.optim import Trainable, make_trainable
from megatron_apo.model.build import build_model
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.model.placement import HostCopy, place_reference
from megatron_apo.model.precision import Precision
from megatron_apo.objectives import APO, Samples
from megatron_apo.parallel.pipeline import forward_backward, forward_log_probs
from megatron_apo.parallel.topology import Topology, distributed
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.stream import WeightStream, load_weights
from tests.dist.ranks import parallel_of, variants_of
from tests.dist.worker import BETA2, batch, by_sequence, recipe_of

STEPS = 3
# name: (variant, dtype, sharded optimizer)
CASES = {
    "fp32": ("qwen3-tied", "fp32", True),
    "bf16": ("qwen3-tied", "bf16", True),
    "fp32-replicated": ("qwen3-tied", "fp32", False),
    "bf16-replicated": ("qwen3-tied", "bf16", False),
    "experts": ("qwen3_moe", "bf16", True),
}
# name: (reference mode, parked while sampling)
RUNS = {
    "resident": ("resident", False),
    "offload": ("offload", False),
    "swap": ("swap", False),
    "parked": ("resident", True),
    "all": ("swap", True),
}
# These cases go through all runs; the others through the first, one that frees weights, and one that does all else.
EVERY_RUN = ("fp32", "bf16")
# With copies from the host that bring nothing, each of these must come out differently.
BROKEN = ("offload", "swap", "parked")


def runs_of(case: str) -> list[str]:
    return list(RUNS) if case in EVERY_RUN else ["resident", "offload", "all"]


class Interrupted(Exception):
    """Raised while weights are elsewhere."""


def measure(work: Path, case: str, run: str, layout: str, topology: Topology) -> dict:
    """Three steps of the loop: park, log-probs of the reference, one optimizer step against them."""
    variant, dtype, sharded = CASES[case]
    mode, parked = RUNS[run]
    parallel = parallel_of(layout)
    spec = read_hf_config(work / "policy" / variant)

    def build() -> list:
        return build_model(spec, parallel, topology, Precision(dtype))

    def load(chunks: Sequence[torch.nn.Module], folder: str) -> None:
        load_weights(chunks, spec, topology, HFReader(work / folder / variant))

    policy = build()
    load(policy, "policy")
    prompts, responses, advantage = batch()
    micro = lay_out(recipe_of(parallel, True, 60), topology, prompts, responses)
    config = OptimizerConfig(lr=1e-3, weight_decay=0.1, distributed=sharded)
    trainable = make_trainable(policy, config, total_steps=STEPS)
    reference = place_reference(mode, policy, build=build, load=lambda chunks: load(chunks, "reference"))
    objective, names = APO(beta2=BETA2), list(map(str, range(len(prompts))))
    targets = objective.prepare(Samples(names, advantage, None), dict.fromkeys(names, 0.0))
    found: dict = {"reference": [], "norms": [], "bytes": []}
    for _ in range(STEPS):
        sizes = {"before": device_bytes(trainable)}
        with trainable.parked(parked):
            sizes["parked"] = device_bytes(trainable)
        sizes["after"] = device_bytes(trainable)
        with reference.active() as chunks:
            anchor = forward_log_probs(chunks, micro)
            sizes["active"] = storage_bytes(weights(chunks))
        sizes["inactive"] = storage_bytes(weights(chunks))
        found["bytes"].append(sizes)
        found["reference"].append(by_sequence(anchor, micro, responses, topology))

        def loss(log_prob_R: Tensor, index: int, anchor=anchor):
            one = micro[index]
            return objective.loss(log_prob_R, anchor[index], one.sequence_R, targets.select(one.indices))

        trainable.zero_grad()
        forward_backward(trainable.chunks, micro, loss)
        found["norms"].append(trainable.step())
    found["weights"] = dict(WeightStream(policy, spec, topology))
    state = [tensor.clone() for tensor in optimizer_tensors(trainable)]
    for context in (reference.active(), trainable.parked(parked)):
        try:
            with context:
                raise Interrupted
        except Interrupted:
            pass
    exported = dict(WeightStream(policy, spec, topology))
    found["restored"] = all(map(torch.equal, optimizer_tensors(trainable), state)) and all(
        torch.equal(exported[name], tensor) for name, tensor in found["weights"].items()
    )
    return found


def of_the_folder(work: Path, case: str, layout: str, topology: Topology) -> Any:
    """Log-probs by a model that nothing was ever done to but loading the reference's weights."""
    variant, dtype, _ = CASES[case]
    parallel = parallel_of(layout)
    spec = read_hf_config(work / "reference" / variant)
    chunks = build_model(spec, parallel, topology, Precision(dtype))
    load_weights(chunks, spec, topology, HFReader(work / "reference" / variant))
    prompts, responses, _ = batch()
    micro = lay_out(recipe_of(parallel, True, 60), topology, prompts, responses)
    return by_sequence(forward_log_probs(chunks, micro), micro, responses, topology)


def weights(chunks: Iterable[torch.nn.Module]) -> list[Tensor]:
    return [parameter for chunk in chunks for parameter in chunk.parameters()]


def optimizer_tensors(trainable: Trainable) -> list[Tensor]:
    """Main weights and state, as the inner optimizers know them."""
    inner = [part.optimizer for part in trainable.optimizer.chained_optimizers]
    found = [parameter for one in inner for group in one.param_groups for parameter in group["params"]]
    return found + [value for one in inner for state in one.state.values() for value in state.values()]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages behind the tensors, each counted once."""
    storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def device_bytes(trainable: Trainable) -> dict[str, int]:
    """Memory of a trainable by what it is for. `state`: what the optimizer has that is no view of the weights."""
    held = weights(trainable.chunks)
    gradients = [b.grad_data for chunk in trainable.chunks for b in chunk.buffers + chunk.expert_parallel_buffers]
    own = storage_bytes([*held, *optimizer_tensors(trainable)]) - storage_bytes(held)
    return {"weights": storage_bytes(held), "gradients": storage_bytes(gradients), "state": own}


@contextmanager
def broken_refill() -> Iterator[None]:
    """Within: memory comes back from the host as zeros, or not at all where it was not freed."""

    def refill(copy: HostCopy) -> None:
        for storage, pieces in copy._pairs:
            if storage.nbytes() == 0:
                storage.resize_(sum(map(len, pieces)))
                torch.empty(0, dtype=torch.uint8).set_(storage).zero_()

    usual = HostCopy.refill
    HostCopy.refill = refill  # type: ignore[method-assign]
    try:
        yield
    finally:
        HostCopy.refill = usual  # type: ignore[method-assign]


def main(folder: str, layout: str) -> None:
    work = Path(folder)
    results: dict = {}
    with distributed(parallel_of(layout)) as topology:
        for case in (case for case, (variant, *_) in CASES.items() if variant in variants_of(layout)):
            found = {run: measure(work, case, run, layout, topology) for run in runs_of(case)}
            found["folder"] = of_the_folder(work, case, layout, topology)
            if case == "fp32":
                with broken_refill():
                    found |= {f"broken {run}": measure(work, case, run, layout, topology) for run in BROKEN}
            results[case] = found
        if topology.is_driver:
            torch.save(results, work / f"{layout}.pt")
