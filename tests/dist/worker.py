"""One rank of the layout tests: measures everything about one layout and saves it. Started by test_layouts.py.

    main(WORK_DIR, LAYOUT, VARIANT ..)

Rank 0 writes WORK_DIR/LAYOUT.pt: {variant: {"log_probs": {...}, "export": {...}, "cases": {..}}}.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_apo.config import FP8Config, OptimizerConfig, ParallelConfig, Recipe, TrainConfig, build_recipe
from megatron_apo.data.batch import MicroBatch
from megatron_apo.data.layout import lay_out, minibatches
from megatron_apo.learner.optim import GradientError, Trainable, make_trainable
from megatron_apo.model.build import FP32, build_model
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.model.precision import Precision
from megatron_apo.objectives import APO, Samples
from megatron_apo.objectives.base import LossTerm, Stats
from megatron_apo.parallel.pipeline import forward_backward, forward_log_probs
from megatron_apo.parallel.topology import Topology, distributed
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.stream import WeightStream, load_weights
from tests.dist.ranks import ONE_RANK, parallel_of

NUM_SEQUENCES = 12
TEMPERATURE = 0.7
BETA2 = 0.05


@dataclass(frozen=True)
class Case:
    """How a batch is laid out, and what learns from it."""

    packing: bool = True
    budget: int = 60  # of a micro-batch, tokens
    sharded: bool = False  # the optimizer; each rank then has its own part of the reduced gradient alone
    fp8: bool = False  # laid out as FP8 wants it, though computed in fp32
    recompute: str = "none"


CASES = {
    "packed": Case(budget=2000),
    "packed-small": Case(),
    "packed-filled": Case(budget=600, fp8=True),
    "padded": Case(packing=False, budget=2000),
    "padded-small": Case(packing=False, sharded=True),
}
# Bit for bit what "packed-small" is.
RECOMPUTED = {"selective": Case(recompute="selective"), "full": Case(recompute="full")}
RECOMPUTED_IN = ("pp2", "dp2-ep2", "tp2-pp2-vpp2", "cp2-dp2")
# These variants go through all cases; what another adds shows in a packed and a padded one.
EVERY_CASE = ("qwen3-tied", "qwen3_moe")
# Dense, since a small difference sends tokens to other experts.
HALF = ("qwen3-tied",)
NUM_MINIBATCHES = 2
# Faults in "packed-small", and what each must change of a case. Clipping and Adam undo the scale of a whole gradient.
MUTATIONS = {
    "doubled": {"norm", "gradients"},
    "negated": {"gradients", "change"},
    "dropped": {"norm", "gradients", "change"},  # a micro-batch
}
# On one rank: each changes one quantity by little more than is allowed, or one tensor's part in it.
ALONE = {
    "misreported": {"loss"},
    "uncounted": {"norm"},  # one tensor
    "scaled": {"gradients"},  # one tensor's
    "hurried": {"change"},  # by the learning rate
    "skipped": {"change"},  # one tensor's
}
LR = 1e-3
FAULTY = "decoder.final_layernorm.weight"  # the one tensor: small beside the others, and on the last stage alone


def cases_of(variant: str, layout: str) -> dict[str, Case]:
    names = CASES if variant in EVERY_CASE else ("packed", "padded-small")
    cases = {name: CASES[name] for name in names if CASES[name].packing or parallel_of(layout).vpp == 1}
    return cases | (RECOMPUTED if variant in EVERY_CASE and layout in RECOMPUTED_IN else {})


def faults_of(variant: str, layout: str) -> list[str]:
    if variant not in HALF:
        return []
    return [*MUTATIONS, *(ALONE if layout == ONE_RANK else ())]


def recipe_of(parallel: ParallelConfig, packing: bool, budget: int, fp8: bool = False) -> Recipe:
    recipe = build_recipe({}, ["model.path=unused", "data.train=unused.jsonl", "vstar.dir=unused"])
    recipe.parallel, recipe.train.packing, recipe.train.tokens_per_micro_batch = parallel, packing, budget
    recipe.model.fp8 = FP8Config(recipe="blockwise") if fp8 else None
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


def measure(folder: Path, layout: str, topology: Topology) -> dict:
    """Log-probs, export, gradients and one update of one model in this layout."""
    spec, parallel = read_hf_config(folder), parallel_of(layout)
    reader = HFReader(folder)
    reader.check(spec)
    prompts, responses, _ = batch()
    found: dict = {"log_probs": {}, "cases": {}}
    runs: list[tuple[str, Case, str | None]] = [
        (name, case, None) for name, case in cases_of(folder.name, layout).items()
    ]
    runs += [(fault, CASES["packed-small"], fault) for fault in faults_of(folder.name, layout)]
    for name, case, fault in runs:
        lr = LR * (1.01 if fault == "hurried" else 1)
        trainable = make_policy(spec, parallel, topology, reader, sharded=case.sharded, recompute=case.recompute, lr=lr)
        chunks = modules_of(trainable)
        micro = lay_out(recipe_of(parallel, case.packing, case.budget, case.fp8), topology, prompts, responses)
        before = dict(WeightStream(chunks, spec, topology))
        if fault is None:
            found["log_probs"][name] = by_sequence(forward_log_probs(chunks, micro), micro, responses, topology)
            found["export"] = before
        calls = count_calls(chunks)
        total = backward(trainable, micro, topology, fault)
        damaged = damage(chunks, fault)
        gathered = topology.dp * topology.cp == 1 or not case.sharded
        gradients = dict(WeightStream(chunks, spec, topology, tensor_of=lambda p: p.main_grad)) if gathered else None
        norm = trainable.step()
        for parameter, value in damaged:
            parameter.data.copy_(value)
        change = change_since(before, chunks, spec, topology)
        found["cases"][name] = {
            "loss": total,
            "norm": norm,
            "gradients": gradients,
            "change": change,
            "calls": dict(calls),
        }
    if folder.name in EVERY_CASE:
        trainable = make_policy(spec, parallel, topology, reader)
        found["minibatches"] = each_minibatch(trainable, spec, parallel, topology)
        found["nan"] = step_on_nan(trainable, topology)
    if folder.name in HALF:
        found["bf16"] = in_bf16(spec, parallel, topology, reader)
    return found


def make_policy(
    spec,
    parallel,
    topology,
    reader,
    *,
    sharded: bool = True,
    precision: Precision = FP32,
    recompute: Any = "none",
    lr: float = LR,
) -> Trainable:
    train = TrainConfig(log_prob_chunk_tokens=7, recompute=recompute)
    chunks = build_model(spec, parallel, topology, precision, temperature=TEMPERATURE, train=train)
    load_weights(chunks, spec, topology, reader)
    return make_trainable(chunks, OptimizerConfig(lr=lr, clip_grad=1e-3, distributed=sharded), total_steps=10)


def count_calls(chunks: list[torch.nn.Module]) -> Counter[str]:
    """Counts, from here on, how often layers and feed-forward parts (or experts) of this rank are computed."""
    calls: Counter[str] = Counter()
    for module in (module for chunk in chunks for module in chunk.modules()):
        for kind in (TransformerLayer, MLP):
            if isinstance(module, kind):
                module.register_forward_pre_hook(lambda module, _, name=kind.__name__: calls.update([name]))
    return calls


def damage(chunks: list[torch.nn.Module], fault: str | None) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Put a fault into what follows the backward pass; returns what to undo after the step."""
    damaged = [p for chunk in chunks for name, p in chunk.named_parameters() if name == FAULTY]
    for parameter in damaged:
        if fault == "scaled":
            parameter.main_grad.mul_(1.0001)
        elif fault == "uncounted":
            parameter.shared = True  # as Megatron-Core marks what another stage counts
    return [(parameter, parameter.detach().clone()) for parameter in damaged] if fault == "skipped" else []


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


def each_minibatch(trainable: Trainable, spec, parallel: ParallelConfig, topology: Topology) -> dict:
    """Loss and norm of each optimizer step of one batch, and what they changed together."""
    recipe = recipe_of(parallel, packing=True, budget=60)
    recipe.train.minibatches = NUM_MINIBATCHES
    prompts, responses, _ = batch()
    before = dict(WeightStream(modules_of(trainable), spec, topology))
    losses, norms = [], []
    for rows in minibatches(recipe, NUM_SEQUENCES):
        losses.append(backward(trainable, lay_out(recipe, topology, prompts, responses, rows=rows), topology))
        norms.append(trainable.step())
    change = change_since(before, modules_of(trainable), spec, topology)
    return {"loss": losses, "norm": norms, "change": change}


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
        stats = Stats({"loss": term.stats.sums["loss"] * 1.0001}) if fault == "misreported" else term.stats
        return LossTerm(term.total * factor, term.count, stats)

    return loss


def step_on_nan(trainable: Trainable, topology: Topology) -> str:
    """What an optimizer step says of a gradient that has a NaN on one rank before the ranks add theirs up."""
    trainable.zero_grad()
    if topology.rank == topology.world_size - 1:
        # A weight that is split: of one held by several ranks, the norm counts a single copy.
        split = next(p for name, p in modules_of(trainable)[0].named_parameters() if name.endswith("linear_fc2.weight"))
        split.main_grad.fill_(float("nan"))
    finalize_model_grads(trainable.chunks)
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
    results = {}
    with distributed(parallel_of(layout)) as topology:
        for name in variants:  # tied and untied models one after another
            results[name] = measure(Path(work) / "models" / name, layout, topology)
        if topology.is_driver:
            torch.save(results, Path(work) / f"{layout}.pt")
