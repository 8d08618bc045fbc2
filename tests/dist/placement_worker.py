"""One rank of the placement tests: the training loop's steps under every placement. Started by test_placement.py.

    main(WORK, LAYOUT)

Rank 0 writes WORK/LAYOUT.pt: {case: {run: {"reference", "norms", "weights", "restored", "bytes"}}}; bytes are its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_apo.config import ParallelConfig, Recipe, build_recipe
from megatron_apo.learner.learner import Learner
from megatron_apo.learner.optim import Trainable
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.model.placement import HostCopy
from megatron_apo.parallel.groups import distributed
from megatron_apo.parallel.pipeline import forward_only
from megatron_apo.runtime.topology import Topology
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.stream import WeightStream
from tests.batches import UNSAMPLED, no_values
from tests.dist.ranks import parallel_of, variants_of
from tests.dist.worker import BETA2, by_sequence, micro_batches_of, optimizer_tensors, received

STEPS = 3
# name: (variant, dtype, sharded optimizer)
CASES = {
    "fp32": ("qwen3-tied", "fp32", True),
    "bf16": ("qwen3-tied", "bf16", True),
    "fp32-replicated": ("qwen3-tied", "fp32", False),
    "bf16-replicated": ("qwen3-tied", "bf16", False),
    "experts": ("qwen3_moe", "bf16", True),
}
# name: (reference mode, offloaded while sampling)
RUNS = {
    "resident": ("resident", False),
    "offload": ("offload", False),
    "swap": ("swap", False),
    "offloaded": ("resident", True),
    "all": ("swap", True),
}
# These cases go through all runs; the others through the first, one that frees weights, and one that does all else.
EVERY_RUN = ("fp32", "bf16")
# With copies from the host that bring nothing, each of these must come out differently.
BROKEN = ("offload", "swap", "offloaded")


def cases_of(layout: str) -> list[str]:
    """What a layout goes through: pp2-vpp2 one case in fp32 and one in bf16, and the rest under "-others"."""
    cases = [case for case, (variant, *_) in CASES.items() if variant in variants_of(layout)]
    if not layout.startswith("pp2-vpp2"):
        return cases
    return [case for case in cases if (case in ("fp32", "experts")) != layout.endswith("-others")]


def runs_of(case: str) -> list[str]:
    return list(RUNS) if case in EVERY_RUN else ["resident", "offload", "all"]


class Interrupted(Exception):
    """Raised while weights are elsewhere."""


def recipe_of(work: Path, case: str, parallel: ParallelConfig, mode: str = "resident") -> Recipe:
    variant, dtype, sharded = CASES[case]
    overrides = [
        f"model.path={work / 'policy' / variant}",
        f"model.reference={work / 'reference' / variant}",
        f"model.dtype={dtype}",
        f"model.reference_mode={mode}",
        *UNSAMPLED,
        "data.train=unused.jsonl",
        "data.max_prompt_tokens=10",
        "sampling.max_response_tokens=50",
        "vstar.dir=unused",
        f"objective.beta2={BETA2}",
        "optimizer.lr=1e-3",
        "optimizer.weight_decay=0.1",
        f"optimizer.distributed={sharded}",
        "train.minibatches=1",
        "train.tokens_per_micro_batch=60",
    ]
    recipe = build_recipe({}, overrides)
    recipe.parallel = parallel
    return recipe


def measure(work: Path, case: str, run: str, layout: str, topology: Topology) -> dict:
    """Three steps of the loop: offload, log-probs of the reference, one optimizer step against them."""
    mode, offloaded = RUNS[run]
    recipe = recipe_of(work, case, parallel_of(layout), mode)
    spec = read_hf_config(recipe.model.path)
    learner = Learner.build(recipe, topology)
    trainable, reference = learner.trainable, learner.reference
    assert reference is not None
    part = received(learner)
    micro = micro_batches_of(learner, part)
    found: dict = {"reference": [], "norms": [], "bytes": []}
    for _ in range(STEPS):
        sizes = {"before": device_bytes(trainable)}
        with trainable.offloaded(offloaded):
            sizes["offloaded"] = device_bytes(trainable)
        sizes["after"] = device_bytes(trainable)
        with reference.active() as chunks:
            log_probs = forward_only(chunks, micro)
            sizes["active"] = storage_bytes(weights(chunks))
        sizes["inactive"] = storage_bytes(weights(chunks))
        found["bytes"].append(sizes)
        found["reference"].append(by_sequence(log_probs, micro, topology))
        found["norms"].append(learner.learn(part, no_values(part)).metrics()["grad_norm"])
    found["weights"] = dict(WeightStream(learner.policy, spec, topology))
    state = [tensor.clone() for tensor in optimizer_tensors(trainable)]
    for context in (reference.active(), trainable.offloaded(offloaded)):
        try:
            with context:
                raise Interrupted
        except Interrupted:
            pass
    exported = dict(WeightStream(learner.policy, spec, topology))
    found["restored"] = all(map(torch.equal, optimizer_tensors(trainable), state)) and all(
        torch.equal(exported[name], tensor) for name, tensor in found["weights"].items()
    )
    return found


def of_the_folder(work: Path, case: str, layout: str, topology: Topology) -> dict[int, Tensor]:
    """Log-probs by a model that nothing was ever done to but loading the reference's weights."""
    recipe = recipe_of(work, case, parallel_of(layout))
    reader = HFReader(recipe.model.reference_path)
    learner = Learner.build(recipe, topology, policy_weights=reader)
    micro = micro_batches_of(learner, received(learner))
    return by_sequence(forward_only(learner.policy, micro), micro, topology)


def weights(chunks: Iterable[torch.nn.Module]) -> list[Tensor]:
    return [parameter for chunk in chunks for parameter in chunk.parameters()]


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
        for case in cases_of(layout):
            found = {run: measure(work, case, run, layout, topology) for run in runs_of(case)}
            found["folder"] = of_the_folder(work, case, layout, topology)
            if case == "fp32":
                with broken_refill():
                    found |= {f"broken {run}": measure(work, case, run, layout, topology) for run in BROKEN}
            results[case] = found
        if topology.is_driver:
            torch.save(results, work / f"{layout}.pt")
