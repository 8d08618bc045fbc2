"""One rank of the layout tests: measures everything about one layout and saves it. Started by test_layouts.py.

    main(WORK_DIR, LAYOUT, VARIANT ..)

What learns is stage 2's own `Learner`, on a batch that the driver hands out. Rank 0 writes WORK_DIR/LAYOUT.pt:
{variant: {"log_probs": {...}, "export": {...}, "cases": {..}}}.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_apo.config import FP8Config, ParallelConfig, Recipe, build_recipe
from megatron_apo.data.batch import MicroBatch
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.learner.learner import Learner
from megatron_apo.model.hf_config import ModelSpec, read_hf_config
from megatron_apo.objectives.base import LossTerm, Stats
from megatron_apo.parallel.groups import distributed
from megatron_apo.parallel.pipeline import forward_only
from megatron_apo.runtime.topology import Topology
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.stream import WeightStream
from tests.batches import UNSAMPLED, make_batch, no_values
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


def recipe_of(parallel: ParallelConfig, case: Case, *overrides: str) -> Recipe:
    """The recipe that a learner is built by. Settings of FP8 are put in afterwards: no CPU computes in it."""
    recipe = build_recipe(
        {},
        [
            "model.path=unused",
            "data.train=unused.jsonl",
            "vstar.dir=unused",
            f"sampling.temperature={TEMPERATURE}",
            f"objective.beta2={BETA2}",
            f"optimizer.lr={LR}",
            "optimizer.clip_grad=1e-3",
            f"optimizer.distributed={case.sharded}",
            "train.log_prob_chunk_tokens=7",
            "train.minibatches=1",
            f"train.recompute={case.recompute}",
            *UNSAMPLED,
            *overrides,
        ],
    )
    recipe.parallel, recipe.train.packing, recipe.train.tokens_per_micro_batch = parallel, case.packing, case.budget
    return recipe


def batch() -> RolloutBatch:
    """The same everywhere. Rewards are advantages, since V* is 0."""
    generator = torch.Generator().manual_seed(5)

    def tokens(low: int, high: int) -> list[int]:
        count = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(0, 101, (count,), generator=generator).tolist()

    prompts = [tokens(1, 9) for _ in range(NUM_SEQUENCES)]
    responses = [tokens(1, 40) for _ in range(NUM_SEQUENCES)]
    rewards = (torch.rand(NUM_SEQUENCES, generator=generator) - 0.5).tolist()
    return make_batch(prompts, responses, rewards=rewards)


def make_learner(folder: Path, recipe: Recipe, topology: Topology, *, fp8: bool = False) -> Learner:
    """The policy of `folder`, against the reference of the same name; laid out as FP8 wants it, if so."""
    readers = [HFReader(of) for of in (folder, folder.parents[1] / "references" / folder.name)]
    spec = read_hf_config(folder)
    readers[0].check(spec)
    policy_weights, reference_weights = readers
    learner = Learner.build(
        recipe, topology, spec=spec, policy_weights=policy_weights, reference_weights=reference_weights
    )
    if fp8:
        learner.recipe = recipe.model_copy(deep=True)
        learner.recipe.model.fp8 = FP8Config(recipe="blockwise")
    return learner


def received(learner: Learner) -> RolloutBatch:
    """This rank's part of the batch, from the driver."""
    return learner.receive(batch() if learner.topology.is_driver else None)


def micro_batches_of(learner: Learner, part: RolloutBatch) -> list[MicroBatch]:
    return [micro for each in learner.micro_batches(learner.plan(part), part) for micro in each]


def measure(folder: Path, layout: str, topology: Topology) -> dict:
    """Log-probs, export, gradients and one update of one model in this layout."""
    spec, parallel = read_hf_config(folder), parallel_of(layout)
    found: dict = {"log_probs": {}, "cases": {}}
    runs: list[tuple[str, Case, str | None]] = [
        (name, case, None) for name, case in cases_of(folder.name, layout).items()
    ]
    runs += [(fault, CASES["packed-small"], fault) for fault in faults_of(folder.name, layout)]
    for name, case, fault in runs:
        recipe = recipe_of(parallel, case, *(["optimizer.lr=1.01e-3"] if fault == "hurried" else []))
        learner = make_learner(folder, recipe, topology, fp8=case.fp8)
        part = received(learner)
        if fault is None:
            found["log_probs"][name] = log_probs_of(learner, part)
            found["export"] = dict(WeightStream(learner.policy, spec, topology))
        found["cases"][name] = learn(learner, part, spec, fault)
    if folder.name in EVERY_CASE:
        recipe = recipe_of(parallel, Case(sharded=True), f"train.minibatches={NUM_MINIBATCHES}")
        learner = make_learner(folder, recipe, topology)
        found["minibatches"] = learn(learner, received(learner), spec)
        found["not finite"] = step_on_what_is_not_finite(make_learner(folder, recipe, topology), spec)
    if folder.name in HALF:
        learner = make_learner(folder, recipe_of(parallel, Case(), "model.dtype=bf16"), topology)
        part = received(learner)
        found["bf16"] = {"log_probs": log_probs_of(learner, part)} | learn(learner, part, spec)
    return found


def log_probs_of(learner: Learner, part: RolloutBatch) -> dict[int, torch.Tensor]:
    """{sequence: the policy's log-probs}, on every rank."""
    micro = micro_batches_of(learner, part)
    return by_sequence(forward_only(learner.policy, micro), micro, learner.topology)


def learn(learner: Learner, part: RolloutBatch, spec: ModelSpec, fault: str | None = None) -> dict:
    """{loss, norm and gradients of each optimizer step, what they changed together, calls of layers}, on the driver."""
    topology, trainable = learner.topology, learner.trainable
    before = dict(WeightStream(learner.policy, spec, topology))
    calls, norms, gradients = count_calls(learner.policy), [], []
    # Of a sharded optimizer each rank has its own part of the reduced gradient alone.
    gathered = topology.dp * topology.cp == 1 or not learner.recipe.optimizer.distributed
    step = trainable.step

    def watched() -> float:
        damaged = damage(learner.policy, fault)
        if gathered:
            stream = WeightStream(learner.policy, spec, topology, tensor_of=lambda p: p.main_grad)
            gradients.append({name: gradient.clone() for name, gradient in stream})
        norms.append(step())
        for parameter, value in damaged:
            parameter.data.copy_(value)
        return norms[-1]

    trainable.step = watched  # type: ignore[method-assign]
    learner._loss = faulty(learner._loss, fault)  # type: ignore[method-assign]
    record = learner.learn(part, no_values(part))
    return {
        "loss": record.losses,
        "norm": norms,
        "gradients": _joined(gradients) if gathered else None,
        "change": {name: after - before[name] for name, after in WeightStream(learner.policy, spec, topology)},
        "calls": dict(calls),
    }


def _joined(steps: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """{tensor: its gradient}, of several optimizer steps {tensor@step: ..}."""
    if len(steps) == 1:
        return steps[0]
    return {f"{name}@{index}": gradient for index, one in enumerate(steps) for name, gradient in one.items()}


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


def faulty(loss: Callable[..., LossTerm], fault: str | None) -> Callable[..., LossTerm]:
    """The learner's loss of a micro-batch with `fault` in its gradient, or in what it says of itself."""
    calls = 0

    def wrapped(*arguments: Any, **named: Any) -> LossTerm:
        nonlocal calls
        term, first, calls = loss(*arguments, **named), calls == 0, calls + 1
        factor = {"doubled": 2.0, "negated": -1.0, "dropped": 0.0 if first else 1.0}.get(fault or "", 1.0)
        stats = term.stats
        if fault == "misreported":
            stats = Stats({**stats.sums, "loss": stats.sums["loss"] * 1.0001}, stats.maxima)
        return replace(term, total=term.total * factor, stats=stats)

    return wrapped


def step_on_what_is_not_finite(learner: Learner, spec: ModelSpec) -> dict[str, dict]:
    """Of a NaN, +inf and -inf in the gradient of one rank before the ranks add theirs up: {norms that each rank was
    told, whether weights and optimizer are as before}."""
    topology, trainable = learner.topology, learner.trainable
    learner.learn(received(learner), no_values(batch()))  # so that there are moments
    before, lr = dict(WeightStream(learner.policy, spec, topology)), trainable.lr
    state = [tensor.clone() for tensor in optimizer_tensors(trainable)]
    found = {}
    for value in ("nan", "inf", "-inf"):
        trainable.zero_grad()
        if topology.rank == topology.world_size - 1:
            # A weight that is split: of one held by several ranks, the norm counts a single copy.
            names = learner.policy[0].named_parameters()
            split = next(parameter for name, parameter in names if name.endswith("linear_fc2.weight"))
            split.main_grad.view(-1)[0] = float(value)
        finalize_model_grads(trainable.chunks)
        norm = trainable.step()
        same = all(map(torch.equal, optimizer_tensors(trainable), state)) and trainable.lr == lr
        same &= all(torch.equal(tensor, before[name]) for name, tensor in WeightStream(learner.policy, spec, topology))
        everyone: list = [None] * topology.world_size
        dist.all_gather_object(everyone, (norm, same))
        found[value] = {"norms": [one for one, _ in everyone], "unchanged": all(one for _, one in everyone)}
    return found


def optimizer_tensors(trainable: Any) -> list[torch.Tensor]:
    """Main weights and state, as the inner optimizers know them."""
    inner = [part.optimizer for part in trainable.optimizer.chained_optimizers]
    found = [parameter for one in inner for group in one.param_groups for parameter in group["params"]]
    # A state that was loaded has its names in another order than one that a step has made.
    return found + [state[name] for one in inner for state in one.state.values() for name in sorted(state)]


def by_sequence(log_probs: list[torch.Tensor], micro: list[MicroBatch], topology: Topology) -> dict[int, torch.Tensor]:
    """{sequence: log-probs}, from every replica's last stage, on every rank."""
    mine = {}
    for values, piece in zip(log_probs, micro, strict=bool(log_probs)):
        counts = torch.bincount(piece.sequence_R, minlength=len(piece.indices)).tolist()
        mine.update(zip(piece.indices, values.split(counts), strict=True))
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
