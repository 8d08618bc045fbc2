"""One rank of the layout tests: measures everything about one layout and saves it. Started by test_layouts.py.

    RANK=.. WORLD_SIZE=.. python -m tests.dist.worker WORK_DIR TP PP DP EP VARIANT ..

Rank 0 writes WORK_DIR/tp{TP}pp{PP}dp{DP}ep{EP}.pt: {variant: {"log_probs": {...}, "export": {...}, "cases": {..}}}.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_apo.config import OptimizerConfig, ParallelConfig
from megatron_apo.data.batch import MicroBatch, make_micro_batch
from megatron_apo.data.packing import plan_micro_batches
from megatron_apo.model.build import build_model
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.objectives import APO, Samples
from megatron_apo.objectives.base import LossTerm
from megatron_apo.optim import GradientError, make_trainable
from megatron_apo.parallel.pipeline import forward_backward, forward_log_probs
from megatron_apo.parallel.topology import Topology, distributed
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.stream import WeightStream, load_weights

NUM_SEQUENCES = 12
TEMPERATURE = 0.7
BETA2 = 0.05
# name: (packing, budget of a micro-batch in tokens, sharded optimizer)
CASES = {
    "packed": (True, 2000, False),
    "packed-small": (True, 60, False),
    "padded": (False, 2000, False),
    "padded-small": (False, 60, True),
}
# These variants go through all cases; what another adds shows in a packed and a padded one.
EVERY_CASE = ("qwen2-tied-one-group", "qwen3-tied", "qwen3_moe")
# Faults put into the gradient, which the comparison must notice.
MUTATIONS = ("doubled", "negated", "dropped")


def cases_of(variant: str) -> tuple[str, ...]:
    return tuple(CASES) if variant in EVERY_CASE else ("packed", "padded-small")


def batch() -> tuple[list[list[int]], list[list[int]], torch.Tensor]:
    """(prompts, responses, advantages), the same everywhere."""
    generator = torch.Generator().manual_seed(5)

    def tokens(low: int, high: int) -> list[int]:
        return torch.randint(
            0, 101, (int(torch.randint(low, high, (1,), generator=generator)),), generator=generator
        ).tolist()

    prompts = [tokens(1, 9) for _ in range(NUM_SEQUENCES)]
    responses = [tokens(1, 40) for _ in range(NUM_SEQUENCES)]
    return prompts, responses, torch.rand(NUM_SEQUENCES, generator=generator) - 0.5


def anchors(responses: list[list[int]]) -> list[list[float]]:
    """Made-up reference log-probs, far from the policy's so that the log-ratio matters."""
    return [[-4.0 + 0.01 * (token % 7) for token in response] for response in responses]


def measure(folder: Path, parallel: ParallelConfig, topology: Topology) -> dict:
    """Log-probs, export, gradients and one update of one model in this layout."""
    spec = read_hf_config(folder)
    reader = HFReader(folder)
    reader.check(spec)
    prompts, responses, advantage = batch()
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    found: dict = {"log_probs": {}, "cases": {}}
    runs: list[tuple[str, str | None]] = [(name, None) for name in cases_of(folder.name)]
    if folder.name == "qwen3-tied":
        runs += [("packed-small", fault) for fault in MUTATIONS]
    for name, fault in runs:
        packing, budget, sharded = CASES[name]
        model = build_model(spec, parallel, topology, dtype="fp32", temperature=TEMPERATURE, chunk_tokens=7)
        load_weights(model, spec, topology, reader)
        plan = plan_micro_batches(lengths, dp=topology.dp, budget_tokens=budget, packing=packing)[topology.dp_rank]
        micro = [make_micro_batch(indices, prompts, responses, packing) for indices in plan]
        if fault is None:
            found["log_probs"][name] = by_sequence(forward_log_probs(model, micro), micro, responses, topology)
            before = dict(WeightStream(model, spec, topology))
            found["export"] = before
        trainable = make_trainable(model, OptimizerConfig(lr=1e-3, clip_grad=1e-3, distributed=sharded), total_steps=10)
        trainable.zero_grad()
        terms = forward_backward(trainable.model, micro, make_loss(micro, responses, advantage, fault))
        total = torch.stack([stats.sums["loss"] for stats in terms]).sum() if terms else torch.zeros(())
        dist.all_reduce(total, group=topology.dp_group)
        dist.broadcast(total, src=dist.get_global_rank(topology.pp_group, topology.pp - 1), group=topology.pp_group)
        # A sharded optimizer leaves each rank its own part of the reduced gradient only.
        gathered = topology.dp == 1 or not sharded
        gradients = dict(WeightStream(model, spec, topology, tensor_of=lambda p: p.main_grad)) if gathered else None
        norm = trainable.step()
        after = dict(WeightStream(model, spec, topology))
        change = {key: after[key] - before[key] for key in after}
        found["cases"][fault or name] = {"loss": total.item(), "norm": norm, "gradients": gradients, "change": change}
    if folder.name in EVERY_CASE:
        found["nan"] = step_on_nan(spec, parallel, topology, reader)
    return found


def make_loss(micro: list[MicroBatch], responses: list[list[int]], advantage: torch.Tensor, fault: str | None):
    """The objective's loss of each micro-batch, with `fault` in its gradient."""
    objective, anchor = APO(beta2=BETA2), anchors(responses)
    ids = [str(index) for index in range(NUM_SEQUENCES)]
    targets = objective.prepare(Samples(ids, advantage, None), dict.fromkeys(ids, 0.0))

    def loss(log_prob_R: torch.Tensor, index: int) -> LossTerm:
        one = micro[index]
        term = objective.loss(log_prob_R, one.gather(anchor), one.sequence_R, targets.select(one.indices))
        factor = {"doubled": 2.0, "negated": -1.0, "dropped": 0.0 if index == 0 else 1.0}.get(fault, 1.0)
        return LossTerm(term.total * factor, term.count, term.stats)

    return loss


def step_on_nan(spec, parallel: ParallelConfig, topology: Topology, reader: HFReader) -> str:
    """What an optimizer step says of a gradient with a NaN on one rank."""
    model = build_model(spec, parallel, topology, dtype="fp32")
    load_weights(model, spec, topology, reader)
    trainable = make_trainable(model, OptimizerConfig(lr=1e-3), total_steps=10)
    trainable.zero_grad()
    if topology.rank == topology.world_size - 1:
        # A weight that is split: of one held by several ranks, the norm counts a single copy.
        split = next(p for name, p in model.named_parameters() if name.endswith("linear_fc2.weight"))
        split.main_grad.fill_(float("nan"))
    try:
        trainable.step()
    except GradientError as error:
        return str(error)
    return "nothing"


def by_sequence(
    log_probs: list[torch.Tensor], micro: list, responses: list[list[int]], topology: Topology
) -> dict[int, torch.Tensor] | None:
    """{sequence: log-probs}, gathered to rank 0 from every replica's last stage."""
    mine = {}
    for values, piece in zip(log_probs, micro, strict=bool(log_probs)):
        parts = values.split([len(responses[index]) for index in piece.indices])
        mine.update(zip(piece.indices, parts, strict=True))
    everyone: list = [None] * topology.world_size
    dist.all_gather_object(everyone, mine)
    return {index: values for part in everyone for index, values in part.items()}


def main() -> None:
    work, (tp, pp, dp, ep), variants = Path(sys.argv[1]), map(int, sys.argv[2:6]), sys.argv[6:]
    parallel = ParallelConfig(tp=tp, pp=pp, dp=dp, ep=ep, timeout_s=120)
    results = {}
    with distributed(parallel) as topology:
        for name in variants:  # tied and untied models one after another
            results[name] = measure(work / "models" / name, parallel, topology)
        if topology.is_driver:
            torch.save(results, work / f"tp{tp}pp{pp}dp{dp}ep{ep}.pt")


if __name__ == "__main__":
    main()
