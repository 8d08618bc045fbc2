"""One rank of the tests of the methods: two optimizer steps of the learner by each, as it is and with faults put into
it. See test_methods.py.

    main(WORK, LAYOUT, METHOD ..)

Rank 0 writes WORK/LAYOUT.pt: {method: {fault ("none" for none; "masked": none either, but some responses are masked):
{"policy" and "critic": gradients of each minibatch, "metrics", "rates": what `Learner.step_metrics` has beside them,
"skipped in a row", "calls": responses that each model's passes went over, "held": names of the numbers that were
kept}}}.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_apo.config import Recipe, build_recipe
from megatron_apo.data.rollouts import FINISH_REASONS, RolloutBatch
from megatron_apo.learner import learner as learner_module
from megatron_apo.learner import step as step_module
from megatron_apo.learner.known import KnownLogProbs
from megatron_apo.learner.learner import Learner
from megatron_apo.objectives import LossTerm, Micro, Objective, Prepared, Samples, Stats, build_objective
from megatron_apo.objectives.base import ADVANTAGE, advantage_metrics, averaged
from megatron_apo.objectives.group import group_mean
from megatron_apo.parallel.groups import distributed
from megatron_apo.runtime.topology import Topology
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.stream import WeightStream
from tests.batches import UNSAMPLED, make_batch
from tests.dist.ranks import parallel_of

VARIANT = "qwen3-tied"
TEMPERATURE, LR, CRITIC_LR, CAP = 0.7, 0.01, 0.05, 30
NUM_MINIBATCHES, GROUP = 2, 2
# Of eight responses, four groups. One in each minibatch is long enough to be split where groups are kept together.
RESPONSE_LENGTHS = (30, 24, 7, 6, 28, 25, 4, 9)
PROMPT_LENGTHS = (2, 3, 4, 2)
REWARDS = (1.0, 0.25, 0.0, 0.5, 2.0, -1.0, 0.75, 0.0)  # dense, and of no two alike in a group
VALUES = (0.5, 0.5, 0.25, 0.25, 0.75, 0.75, 0.1, 0.1)


def masked_of(method: str) -> tuple[int, int]:
    """One of the first minibatch, so that the second's places are not its rows, and one of the second. The first lies
    before another in its micro-batch; not in REBEL's, whose rounding errors grow where the long group teaches nothing.
    """
    return (2, 6) if method == "rebel" else (0, 6)


# The method's settings, which are such that each part of it has a say.
METHODS: dict[str, list[str]] = {
    "apo": ["beta2=0.05"],
    "grpo": ["kl_coefficient=0.1", "clip_low=0.001", "clip_high=0.001"],
    "dr_grpo": ["clip_low=0.001", "clip_high=0.001"],
    "dapo": ["clip_low=0.001", "clip_high=0.002", "overlong_buffer=10", "dual_clip=1.002"],
    "rebel": ["eta=0.8"],
    "rloo": ["kl_coefficient=0.1"],
    "reinforce": ["kl_coefficient=0.1"],
    "ppo": ["kl_coefficient=0.1", "clip_low=0.001", "clip_high=0.001", "value_clip=0.01", "gamma=0.98", "lam=0.9"],
    "tbrm": ["beta=0.7"],
    "added": [],  # see `Added`
}


def temperature_of(method: str) -> float:
    """TBRM takes no other than 1."""
    return 1.0 if method == "tbrm" else TEMPERATURE


def batch(masked: Collection[int] = ()) -> RolloutBatch:
    """The same everywhere, two responses to each prompt. masked: those that were cut, and have no reward."""
    generator = torch.Generator().manual_seed(5)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, 101, (count,), generator=generator).tolist()

    prompts = [prompt for count in PROMPT_LENGTHS for prompt in [tokens(count)] * GROUP]
    responses = [tokens(count) for count in RESPONSE_LENGTHS]
    made = make_batch(
        prompts,
        responses,
        rewards=REWARDS,
        log_probs=[(0.5 * torch.rand(len(response), generator=generator) - 5.5).tolist() for response in responses],
        prompt_ids=[f"{row // GROUP}" for row in range(len(responses))],
    )
    made.group_B[:] = np.arange(len(responses)) // GROUP
    made.finish_reason_B[list(masked)] = FINISH_REASONS.index("length")
    made.reward_B[list(masked)] = np.nan
    return made


def recipe_of(work: Path, layout: str, method: str) -> Recipe:
    samples = [] if method in ("ppo", "tbrm") else [f"samples_per_prompt={GROUP}"]
    optimizer = ("eps=1", f"lr={CRITIC_LR}", "clip_grad=0", "distributed=false")
    critic = [f"critic.path={work / 'critic'}", *(f"critic.optimizer.{key}" for key in optimizer)]
    name = "reinforce" if method == ADDED else method
    own = [f"name={name}", *METHODS[method], *samples, *(critic if method == "ppo" else [])]
    recipe = build_recipe(
        {},
        [
            f"run.dir={work / layout}",
            f"model.path={work / 'policy' / VARIANT}",
            f"model.reference={work / 'reference' / VARIANT}",
            *UNSAMPLED,
            "data.train=unused.jsonl",
            "data.max_prompt_tokens=4",
            f"sampling.max_response_tokens={CAP}",
            f"sampling.temperature={temperature_of(method)}",
            "vstar.dir=unused",
            f"train.minibatches={NUM_MINIBATCHES}",
            "train.tokens_per_micro_batch=40",  # of the two long responses no micro-batch holds both
            "train.log_prob_chunk_tokens=7",
            "optimizer.eps=1",  # a step is then proportional to the gradient, which every rank has whole
            f"optimizer.lr={LR}",
            "optimizer.clip_grad=0",
            "optimizer.distributed=false",
            *(f"objective.{setting}" for setting in own),
        ],
    )
    recipe.parallel = parallel_of(layout)
    return recipe


# ---- a method that is added, by what CONTRIBUTING.md says

ADDED = "added"


@dataclass(frozen=True)
class Added(Objective):
    """-A pi / pi_sampler of each token, summed, with the group's mean as the baseline."""

    loss_log_probs = frozenset({"sampler"})
    sequence_targets = ("advantage",)
    told = ADVANTAGE | {"ratio/mean"}

    def prepare(self, samples: Samples) -> Prepared:
        advantage_K = samples.reward_K - group_mean(samples.reward_K, samples.group_K)
        return Prepared({"advantage": advantage_K}, metrics=advantage_metrics(advantage_K))

    def loss(self, micro: Micro, prepared: Prepared) -> LossTerm:
        ratio_R = (micro.value_R - micro.fixed["sampler"]).exp()
        total = -(ratio_R * micro.of_sequences(prepared.per_sequence["advantage"])[micro.sequence_R]).sum()
        stats = Stats({"loss": total.detach(), **averaged("ratio/mean", ratio_R)})
        return LossTerm(total, len(micro.places), stats)


# ---- faults, put into a learner from outside. `patch` is undone afterwards.

Fault = Callable[[Learner, pytest.MonkeyPatch], None]


def advantage_of_the_neighbouring_group(learner: Learner, patch: pytest.MonkeyPatch) -> None:
    """Each sequence has the target of the one two places on."""
    prepare = learner._prepare

    def wrong(*arguments: Any) -> Prepared:
        found = prepare(*arguments)
        return replace(found, per_sequence={n: value_K.roll(-GROUP) for n, value_K in found.per_sequence.items()})

    patch.setattr(learner, "_prepare", wrong)


def old_policy_after_the_step(learner: Learner, patch: pytest.MonkeyPatch) -> None:
    """The old policy's log-probs are taken to be the present ones, in every minibatch."""
    known_log_probs = learner._known_log_probs

    def wrong(minibatches: Any, *arguments: Any) -> KnownLogProbs:
        found = known_log_probs(minibatches, *arguments).found
        return KnownLogProbs({**found, "old_policy": [None] * len(minibatches)})

    patch.setattr(learner, "_known_log_probs", wrong)


def clipping_off(learner: Learner, patch: pytest.MonkeyPatch) -> None:
    learner.objective = replace(learner.objective, clip_low=None, clip_high=None, dual_clip=None)  # type: ignore[call-arg]


def value_target_shifted(learner: Learner, patch: pytest.MonkeyPatch) -> None:
    """Each token's return is the next one's."""
    prepare = learner._prepare

    def wrong(*arguments: Any) -> Prepared:
        found = prepare(*arguments)
        returns = {place: value_T.roll(-1) for place, value_T in found.per_token.get("return", {}).items()}
        return replace(found, per_token={**found.per_token, "return": returns} if returns else found.per_token)

    patch.setattr(learner, "_prepare", wrong)


def critic_not_stepped(learner: Learner, patch: pytest.MonkeyPatch) -> None:
    """Its gradients have no finite norm."""
    assert learner.critic
    patch.setattr(learner.critic.optimizer, "get_grad_norm", lambda: math.inf)


def others_left_out(learner: Learner, patch: pytest.MonkeyPatch) -> None:
    """A group's others are taken to be where they were at the step's start."""
    others = learner._others_log_ratios
    patch.setattr(learner, "_others_log_ratios", lambda plan, _, *rest: others(plan, 0, *rest))


def logit_of_the_last_token(learner: Learner, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        learner_module, "first_tokens", lambda sequence_R: sequence_R.diff(append=sequence_R.new_tensor([-1])) != 0
    )


def sampler_of_the_neighbour(learner: Learner, patch: pytest.MonkeyPatch) -> None:
    of_micro_batch = learner._sampler_log_probs
    patch.setattr(learner, "_sampler_log_probs", lambda *arguments: of_micro_batch(*arguments).roll(1))


def baseline_left_out(learner: Learner, patch: pytest.MonkeyPatch) -> None:
    samples = learner.samples
    patch.setattr(
        learner, "samples", lambda *a: replace(found := samples(*a), value_K=torch.zeros_like(found.reward_K))
    )


def unshared(learner: Learner, patch: pytest.MonkeyPatch) -> None:
    """What crosses sequences is this replica's alone."""

    def own_alone(own: Any, learned: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda values_O: torch.zeros(len(learned.rows)).index_copy(0, torch.tensor(own), values_O)

    patch.setattr(learner, "_share", own_alone)


# fault: (what puts it in, methods in which it must be seen, and in "policy" or "critic")
FAULTS: dict[str, tuple[Fault, dict[str, set[str]]]] = {
    "advantage of the neighbouring group": (
        advantage_of_the_neighbouring_group,
        {name: {"policy"} for name in ("apo", "grpo", "dr_grpo", "dapo", "rebel", "rloo", "reinforce", "tbrm")},
    ),
    "old policy after the step": (
        old_policy_after_the_step,
        {name: {"policy"} for name in ("grpo", "dr_grpo", "dapo")},
    ),
    "clipping off": (clipping_off, {name: {"policy"} for name in ("grpo", "dr_grpo", "dapo", "ppo")}),
    "value target shifted": (value_target_shifted, {"ppo": {"critic"}}),
    "critic not stepped": (critic_not_stepped, {"ppo": {"critic"}}),
    "others left out": (others_left_out, {"rebel": {"policy"}}),
    "sampler's log-probs of the neighbour": (sampler_of_the_neighbour, {"added": {"policy"}}),
    "logit of the last token": (logit_of_the_last_token, {"tbrm": {"policy"}}),
    "baseline left out": (baseline_left_out, {"apo": {"policy"}, "reinforce": {"policy"}}),
    # Where there is one replica, its own are everyone's.
    "unshared": (unshared, {"rloo": {"policy"}, "ppo": {"policy"}}),
}


def faults_of(layout: str, method: str) -> list[str]:
    alone = parallel_of(layout).dp == 1
    return [fault for fault, (_, seen) in FAULTS.items() if method in seen and not (alone and fault == "unshared")]


# ---- what is measured


def measure(
    work: Path, layout: str, method: str, fault: str | None, topology: Topology, masked: Collection[int] = ()
) -> dict[str, Any]:
    """Two optimizer steps of the learner on the batch, with `fault` in it."""
    recipe = recipe_of(work, layout, method)
    recipe.reward.truncated = "mask" if masked else "reward"
    readers = [HFReader(recipe.model.path), HFReader(recipe.model.reference_path)]
    learner = Learner.build(recipe, topology, policy_weights=readers[0], reference_weights=readers[1])
    learner.objective = objective_of(recipe, method)
    gradients: dict[str, list[dict[str, torch.Tensor]]] = {"policy": [], "critic": []}
    calls: Counter[str] = Counter()

    def watch(name: str, trainable: Any, spec: Any) -> None:
        chunks, step = [chunk.module for chunk in trainable.chunks], trainable.step

        def watched() -> float:
            stream = WeightStream(chunks, spec, topology, tensor_of=lambda parameter: parameter.main_grad)
            gradients[name].append({key: tensor.clone() for key, tensor in stream})
            return step()

        trainable.step = watched

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((learner_module, "forward_only"), (step_module, "forward_backward")):
            patch.setattr(module, name, counted(learner, name, getattr(module, name), calls))
        watch("policy", learner.trainable, learner.spec)
        if learner.critic:
            watch("critic", learner.critic, learner.spec.as_critic())
        if fault:
            FAULTS[fault][0](learner, patch)
        held: dict[str, list[str]] = {"tokens": [], "sequences": []}
        note_what_is_held(learner, held, patch)
        own = learner.receive(batch(masked) if topology.is_driver else None)
        record = learner.learn(own, VALUES if learner.objective.takes_baseline else None)
    phases = learner.timer.pop()
    told: list[Any] = [None] * topology.world_size
    last_stage = topology.is_last_stage and topology.tp_rank == topology.cp_rank == 0
    dist.all_gather_object(told, (calls, held) if last_stage else (Counter(), {}))  # one rank of each replica
    return {
        **gradients,
        "metrics": record.metrics(),
        "rates": [*learner.step_metrics(record, own, {**phases, "step": phases["train"]})],
        "skipped in a row": learner.skipped_in_a_row,
        "calls": dict(sum((one for one, _ in told), Counter())),
        "held": next(one for _, one in told if one),
    }


def objective_of(recipe: Recipe, method: str) -> Objective:
    return Added() if method == ADDED else build_objective(recipe.objective, max_response_tokens=CAP)


def note_what_is_held(learner: Learner, held: dict[str, list[str]], patch: pytest.MonkeyPatch) -> None:
    """Names of the numbers of each token, and of each response, that the learner has for a step's losses."""
    known, prepare = learner._known_log_probs, learner._prepare

    def noted_known(*arguments: Any) -> KnownLogProbs:
        found = known(*arguments)
        held["tokens"] += list(found.found)
        return found

    def noted_targets(*arguments: Any) -> Prepared:
        found = prepare(*arguments)
        held["tokens"] += list(found.per_token)
        held["sequences"] += list(found.per_sequence)
        return found

    patch.setattr(learner, "_known_log_probs", noted_known)
    patch.setattr(learner, "_prepare", noted_targets)


def counted(learner: Learner, name: str, work: Callable, calls: Counter[str]) -> Callable:
    """Counts the micro-batches that each model's passes go over."""

    def run(chunks: Any, micro_batches: Any, *rest: Any) -> Any:
        models = {id(trainable.chunks): key for key, trainable in learner.trainables.items()}
        model = models.get(id(chunks), "reference")
        for micro in micro_batches:
            calls[f"{name} {model}"] += len(micro.indices)
        return work(chunks, micro_batches, *rest)

    return run


def main(folder: str, layout: str, *methods: str) -> None:
    work = Path(folder)
    with distributed(parallel_of(layout)) as topology:
        results = {
            method: {
                fault or "none": measure(work, layout, method, fault, topology)
                for fault in [None, *faults_of(layout, method)]
            }
            | {"masked": measure(work, layout, method, None, topology, masked_of(method))}
            for method in methods
        }
        if topology.is_driver:
            torch.save(results, work / f"{layout}.pt")
