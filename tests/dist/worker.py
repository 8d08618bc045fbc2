"""One rank of the layout tests: measures everything about one layout and saves it. Started by test_layouts.py.

    main(WORK_DIR, LAYOUT, VARIANT ..)

Rank 0 writes WORK_DIR/LAYOUT.pt: {variant: {"log_probs": {...}, "export": {...}, "cases": {..}}}.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_apo.config import OptimizerConfig, ParallelConfig, Recipe, TrainConfig, build_recipe
from megatron_apo.data.batch import MicroBatch
from megatron_apo.data.layout import lay_out, minibatches
from megatron_apo.model.build import FP32, build_model
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.model.precision import Precision
from megatron_apo.objectives import APO, Samples
from megatron_apo.objectives.base import LossTerm
from megatron_apo.optim import GradientError, Trainable, make_trainable
from megatron_apo.parallel.pipeline import forward_backward, forward_log_probs
from megatron_apo.parallel.topology import Topology, distributed
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.stream import WeightStream, load_weights
from tests.dist.ranks import parallel_of

NUM_SEQUENCES = 12
TEMPERATURE = 0.7
BETA2 = 0.05
TRAIN = TrainConfig(log_prob_chunk_tokens=7)
# name: (packing, budget of a micro-batch in tokens, sharded optimizer)
CASES = {
    "packed": (True, 2000, False),
    "packed-small": (True, 60, False),
    "padded": (False, 2000, False),
    "padded-small": (False, 60, True),
}
# These variants go through all cases; what another adds shows in a packed and a padded one.
EVERY_CASE = ("qwen2-tied-one-group", "qwen3-tied", "qwen3_moe")
# Dense, since a small difference sends tokens to other experts.
HALF = ("qwen3-tied",)
NUM_MINIBATCHES = 2
# Faults put into the gradient, which the comparison must notice.
MUTATIONS = ("doubled", "negated", "dropped")


def cases_of(variant: str, parallel: ParallelConfig) -> list[str]:
    names = CASES if variant in EVERY_CASE else ("packed", "padded-small")
    return [name for name in names if CASES[name][0] or parallel.vpp == 1]


def recipe_of(parallel: ParallelConfig, packing: bool, budget: int) -> Recipe:
    recipe = build_recipe({}, ["model.path=unused", "data.train=unused.jsonl", "vstar.dir=unused"])
    recipe.parallel, recipe.train.packing, recipe.train.tokens_per_micro_batch = parallel, packing, budget
    return recipe


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
    prompts, responses, _ = batch()
    found: dict = {"log_probs": {}, "cases": {}}
    runs: list[tuple[str, str | None]] = [(name, None) for name in cases_of(folder.name, parallel)]
    if folder.name == "qwen3-tied":
        runs += [("packed-small", fault) for fault in MUTATIONS]
    for name, fault in runs:
        packing, budget, sharded = CASES[name]
        trainable = make_policy(spec, parallel, topology, reader, sharded=sharded)
        chunks = modules_of(trainable)
        micro = lay_out(recipe_of(parallel, packing, budget), topology, prompts, responses)
        before = dict(WeightStream(chunks, spec, topology))
        if fault is None:
            found["log_probs"][name] = by_sequence(forward_log_probs(chunks, micro), micro, responses, topology)
            found["export"] = before
        total = backward(trainable, micro, topology, fault)
        # A sharded optimizer leaves each rank its own part of the reduced gradient only.
        gathered = topology.dp * topology.cp == 1 or not sharded
        gradients = dict(WeightStream(chunks, spec, topology, tensor_of=lambda p: p.main_grad)) if gathered else None
        norm = trainable.step()
        change = change_since(before, chunks, spec, topology)
        found["cases"][fault or name] = {"loss": total, "norm": norm, "gradients": gradients, "change": change}
    if folder.name in EVERY_CASE:
        found["nan"] = step_on_nan(make_policy(spec, parallel, topology, reader), topology)
        found["minibatches"] = each_minibatch(spec, parallel, topology, reader)
    if folder.name in HALF:
        found["bf16"] = in_bf16(spec, parallel, topology, reader)
    return found


def make_policy(spec, parallel, topology, reader, *, sharded: bool = True, precision: Precision = FP32) -> Trainable:
    chunks = build_model(spec, parallel, topology, precision, temperature=TEMPERATURE, train=TRAIN)
    load_weights(chunks, spec, topology, reader)
    return make_trainable(chunks, OptimizerConfig(lr=1e-3, clip_grad=1e-3, distributed=sharded), total_steps=10)


def modules_of(trainable: Trainable) -> list[torch.nn.Module]:
    return [chunk.module for chunk in trainable.chunks]


def backward(trainable: Trainable, micro: list[MicroBatch], topology: Topology, fault: str | None = None) -> float:
    """Gradients of the batch; returns its summed loss, on every rank."""
    _, responses, advantage = batch()
    trainable.zero_grad()
    terms = forward_backward(trainable.chunks, micro, make_loss(micro, responses, advantage, fault))
    total = torch.stack([stats.sums["loss"] for stats in terms]).sum() if terms else torch.zeros(())
    dist.all_reduce(total, group=topology.dp_group)
    dist.broadcast(total, src=dist.get_global_rank(topology.pp_group, topology.pp - 1), group=topology.pp_group)
    return total.item()


def change_since(before: dict[str, torch.Tensor], chunks, spec, topology: Topology) -> dict[str, torch.Tensor]:
    return {key: after - before[key] for key, after in WeightStream(chunks, spec, topology)}


def each_minibatch(spec, parallel: ParallelConfig, topology: Topology, reader: HFReader) -> dict:
    """Losses and norms of the optimizer steps of one batch, and what they changed together."""
    recipe = recipe_of(parallel, packing=True, budget=60)
    recipe.train.minibatches = NUM_MINIBATCHES
    prompts, responses, _ = batch()
    trainable = make_policy(spec, parallel, topology, reader)
    before = dict(WeightStream(modules_of(trainable), spec, topology))
    losses, norms = [], []
    for rows in minibatches(recipe, NUM_SEQUENCES):
        losses.append(backward(trainable, lay_out(recipe, topology, prompts, responses, rows=rows), topology))
        norms.append(trainable.step())
    change = change_since(before, modules_of(trainable), spec, topology)
    return {"losses": losses, "norms": norms, "change": change}


def in_bf16(spec, parallel: ParallelConfig, topology: Topology, reader: HFReader) -> dict:
    """Log-probs and gradients where the model computes in bf16."""
    prompts, responses, _ = batch()
    trainable = make_policy(spec, parallel, topology, reader, sharded=False, precision=Precision("bf16"))
    micro = lay_out(recipe_of(parallel, packing=True, budget=60), topology, prompts, responses)
    log_probs = by_sequence(forward_log_probs(modules_of(trainable), micro), micro, responses, topology)
    backward(trainable, micro, topology)
    gradients = dict(WeightStream(modules_of(trainable), spec, topology, tensor_of=lambda p: p.main_grad))
    return {"log_probs": log_probs, "gradients": gradients}


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


def step_on_nan(trainable: Trainable, topology: Topology) -> str:
    """What an optimizer step says of a gradient with a NaN on one rank."""
    trainable.zero_grad()
    if topology.rank == topology.world_size - 1:
        # A weight that is split: of one held by several ranks, the norm counts a single copy.
        split = next(p for name, p in modules_of(trainable)[0].named_parameters() if name.endswith("linear_fc2.weight"))
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


def main(work: str, layout: str, *variants: str) -> None:
    parallel = parallel_of(layout)
    results = {}
    with distributed(parallel) as topology:
        for name in variants:  # tied and untied models one after another
            results[name] = measure(Path(work) / "models" / name, parallel, topology)
        if topology.is_driver:
            torch.save(results, Path(work) / f"{layout}.pt")
