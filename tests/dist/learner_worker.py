"""One rank of the learner's tests: steps of the learner as it is, and with faults put into it. See test_learner.py.

    main(WORK, LAYOUT)

Rank 0 writes WORK/LAYOUT.pt: {fault ("none" for none): {eps: {"norms", "gradients", "change", "mismatch",
"importance"}}}, under "importance" the same by level of importance weights, under "masked" the same of a batch with
masked responses, and under "skipped", "stopped" and "all masked" what came of gradients that are not finite, of a
sampler that is too far off, and of minibatches that are masked whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_apo.config import MismatchConfig, Recipe, build_recipe
from megatron_apo.data.batch import MicroBatch
from megatron_apo.data.layout import BatchPlan
from megatron_apo.data.rollouts import FINISH_REASONS, RolloutBatch
from megatron_apo.learner import learner as learner_module
from megatron_apo.learner.known import KnownLogProbs
from megatron_apo.learner.learner import Learner
from megatron_apo.learner.masking import Learned, Part
from megatron_apo.learner.mismatch import MismatchError
from megatron_apo.learner.step import GradientError
from megatron_apo.model.cpu_compat import cuda_type_names
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.objectives.importance import importance_weights
from megatron_apo.parallel.groups import distributed
from megatron_apo.runtime.topology import Topology
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.stream import WeightStream
from tests.batches import UNSAMPLED, make_batch
from tests.dist.ranks import parallel_of

VARIANT = "qwen3-tied"
BETA2, TEMPERATURE = 0.05, 0.7
# Adam's eps: learning rate, and whether the optimizer is sharded. With an eps of 1 the step is proportional to the
# gradient, which is whole on every rank; with 1e-8 Adam undoes the gradient's scale.
SETTINGS = {1.0: (0.02, False), 1e-8: (1e-3, True)}
# Of both minibatches, so that their micro-batches have the same shapes. On two replicas a minibatch is two sequences on
# the one and five on the other.
RESPONSE_LENGTHS = (36, 20, 7, 6, 5, 4, 3)
PROMPT_LENGTHS = (2, 1, 3, 2, 4, 1, 2)
NUM_MINIBATCHES = 2
# By the names of metrics.jsonl.
MISMATCH = ("mean", "max", "token_mult_prob_error", "sequence_ratio_mean", "sequence_ratio_max", "sequence_ess")

# Responses that the length cap ended: micro-batches are masked whole and in part, and of two replicas one has no other
# in the first minibatch.
MASKED = (0, 1, 4, 8, 10, 13)

# About half of the tokens' and of the responses' weights are cut.
IMPORTANCE_CAPS = {"token": 1.2, "sequence": 1.5}


def batch() -> RolloutBatch:
    """The same everywhere, rewards and V* (`values`) different for each prompt."""
    generator = torch.Generator().manual_seed(17)  # of some seeds one gradient cancels, and Adam makes a step of that

    def tokens(count: int) -> list[int]:
        return torch.randint(0, 101, (count,), generator=generator).tolist()

    prompts = [tokens(count) for count in PROMPT_LENGTHS * NUM_MINIBATCHES]
    responses = [tokens(count) for count in RESPONSE_LENGTHS * NUM_MINIBATCHES]
    return make_batch(
        prompts,
        responses,
        # So large that gradients are far above an eps of 1e-8.
        rewards=(20 * torch.rand(len(prompts), generator=generator)).tolist(),
        # Around the policy's own mean, so that ratios of whole responses are on both sides of 1.
        log_probs=[(0.5 * torch.rand(len(response), generator=generator) - 5.5).tolist() for response in responses],
    )


def masked_batch(rows: Iterable[int], **changes: Any) -> RolloutBatch:
    """`batch()`, of which the length cap ended these."""
    whole = batch()
    whole.finish_reason_B[list(rows)] = FINISH_REASONS.index("length")
    return replace(whole, **changes)


def values() -> dict[str, float]:
    """V* by prompt id."""
    ids = batch().prompt_ids
    return dict(zip(ids, torch.rand(len(ids), generator=torch.Generator().manual_seed(12)).tolist(), strict=True))


def value_B() -> list[float]:
    """V* of each response."""
    return [values()[prompt_id] for prompt_id in batch().prompt_ids]


def recipe_of(work: Path, layout: str, eps: float, *overrides: str) -> Recipe:
    lr, sharded = SETTINGS[eps]
    fixed = [
        f"run.dir={work / layout}",
        f"model.path={work / 'policy' / VARIANT}",
        f"model.reference={work / 'reference' / VARIANT}",
        *UNSAMPLED,
        "data.train=unused.jsonl",
        "data.max_prompt_tokens=4",
        "sampling.max_response_tokens=36",
        f"sampling.temperature={TEMPERATURE}",
        "vstar.dir=unused",
        f"objective.beta2={BETA2}",
        f"train.minibatches={NUM_MINIBATCHES}",
        "train.tokens_per_micro_batch=44",
        "train.log_prob_chunk_tokens=7",
        f"optimizer.eps={eps}",
        f"optimizer.lr={lr}",
        "optimizer.clip_grad=0",
        f"optimizer.distributed={sharded}",
    ]
    recipe = build_recipe({}, [*fixed, *overrides])
    recipe.parallel = parallel_of(layout)
    return recipe


# ---- faults, put into a learner from outside


def rows_shifted(learner: Learner) -> None:
    """Each minibatch begins one sequence too late; the last one's last is the batch's first."""
    plan = learner.plan

    def shifted(whole: RolloutBatch) -> BatchPlan:
        found, count = plan(whole), len(whole)
        move = [[[[(row + 1) % count for row in rows] for rows in rank] for rank in one] for one in found.plans]
        return replace(found, plans=move)

    learner.plan = shifted  # type: ignore[method-assign]


def policy_and_reference_swapped(learner: Learner) -> None:
    """What learns has the reference's weights, and the other way round: see `build`."""


def reference_of_the_other_minibatch(learner: Learner) -> None:
    known_log_probs = learner._known_log_probs

    def swapped(*arguments: Any) -> KnownLogProbs:
        found = known_log_probs(*arguments).found
        return KnownLogProbs({**found, "reference": found["reference"][::-1]})

    learner._known_log_probs = swapped  # type: ignore[method-assign]


def micro_batch_dropped(learner: Learner) -> None:
    """The first of each replica's first minibatch."""
    micro_batches = learner.micro_batches

    def fewer(*arguments: Any) -> list:
        first, *others = micro_batches(*arguments)
        return [first[1:], *others]

    learner.micro_batches = fewer  # type: ignore[method-assign]


def one_ranks_count_for_all(learner: Learner) -> None:
    """Each rank's number of sequences is taken to be the first one's."""
    from megatron.core import parallel_state

    config = learner.policy[0].config
    finalize, group = (
        config.finalize_model_grads_func,
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )

    def wrong(chunks: list, num_tokens: torch.Tensor, **options: Any) -> None:
        dist.broadcast(num_tokens, src=dist.get_global_rank(group, 0), group=group)
        finalize(chunks, num_tokens, **options)

    config.finalize_model_grads_func = wrong


def sampler_of_the_neighbour(learner: Learner) -> None:
    """The engine's log-probs are taken to be another token's."""
    of_micro_batch = learner._sampler_log_probs
    learner._sampler_log_probs = lambda *arguments: of_micro_batch(*arguments).roll(1)  # type: ignore[method-assign]


def value_of_the_neighbour(learner: Learner) -> None:
    samples = learner.samples

    def neighbours(*arguments: Any) -> Any:
        found = samples(*arguments)
        return replace(found, value_K=found.value_K.roll(-1))

    learner.samples = neighbours  # type: ignore[method-assign]


def _scaled(factor: float) -> Callable[[Learner], None]:
    def scale(learner: Learner) -> None:
        loss = learner._loss

        def wrong(*arguments: Any, **named: Any) -> Any:
            term = loss(*arguments, **named)
            return replace(term, total=factor * term.total)

        learner._loss = wrong  # type: ignore[method-assign]

    return scale


def last_tokens_left_out(learner: Learner) -> None:
    """Each response ends one token early: see `received`."""


def second_minibatch_before_the_first_step(learner: Learner) -> None:
    """Both minibatches' gradients are computed before the optimizer takes its first step."""
    trainable, step, first = learner.trainable, learner.trainable.step, []
    buffers = [buffer for chunk in trainable.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]

    def late() -> float:
        if not first:
            first.extend(buffer.grad_data.clone() for buffer in buffers)
            with cuda_type_names():
                trainable.optimizer.prepare_grads()
                return float(trainable.optimizer.get_grad_norm())
        second = [buffer.grad_data.clone() for buffer in buffers]
        for gradients in (first, second):
            for buffer, gradient in zip(buffers, gradients, strict=True):
                buffer.grad_data.copy_(gradient)
            norm = step()
        return norm

    trainable.step = late  # type: ignore[method-assign]


EVERYTHING = {"gradients", "norms", "weights, eps 1", "weights, eps 1e-08"}
UP_TO_SCALE = {"gradients", "norms", "weights, eps 1"}  # Adam hides a factor that is the same in both minibatches
SEEN_BY_ALL = EVERYTHING | {"mismatch"}  # other tokens, or another policy, in the first minibatch
# fault: (what puts it in, which comparisons must fail)
FAULTS: dict[str, tuple[Callable[[Learner], None], set[str]]] = {
    "rows shifted by one": (rows_shifted, SEEN_BY_ALL),
    "policy and reference swapped": (policy_and_reference_swapped, SEEN_BY_ALL),
    "reference of the other minibatch": (reference_of_the_other_minibatch, EVERYTHING),
    "micro-batch dropped": (micro_batch_dropped, SEEN_BY_ALL),
    "one rank's count for all": (one_ranks_count_for_all, UP_TO_SCALE),
    "V* of the neighbour": (value_of_the_neighbour, EVERYTHING),
    "sampler's log-probs of the neighbour": (sampler_of_the_neighbour, {"mismatch"}),
    "doubled": (_scaled(2.0), UP_TO_SCALE),
    "negated": (_scaled(-1.0), EVERYTHING),
    "last tokens left out": (last_tokens_left_out, SEEN_BY_ALL),
    "second minibatch before the first step": (second_minibatch_before_the_first_step, EVERYTHING),
}


# ---- faults in the importance weights, put in the place of what computes them


def of_the_policy_that_has_moved(learner: Learner) -> None:
    """Each minibatch is taken to be at the weights that sampled."""
    known_log_probs = learner._known_log_probs

    def moved(minibatches: Any, *arguments: Any) -> KnownLogProbs:
        found = known_log_probs(minibatches, *arguments).found
        return KnownLogProbs({**found, "old_policy": [None] * len(minibatches)})

    learner._known_log_probs = moved  # type: ignore[method-assign]


def upside_down(_: Learner) -> None:
    """`measure` puts the right function back."""
    learner_module.importance_weights = lambda level, cap, old, sampler, *rest: importance_weights(
        level, cap, sampler, old, *rest
    )


def all_one(_: Learner) -> None:
    def ones(*arguments: Any) -> Any:
        weight_R, stats = importance_weights(*arguments)
        return torch.ones_like(weight_R), stats

    learner_module.importance_weights = ones


WEIGHED = {"gradients", "norms", "weights, eps 1"}
IMPORTANCE_FAULTS: dict[str, tuple[Callable[[Learner], None], set[str]]] = {
    "of the policy that has moved": (of_the_policy_that_has_moved, WEIGHED | {"importance"}),
    "upside down": (upside_down, WEIGHED | {"importance"}),
    "all one": (all_one, WEIGHED),
}


# ---- faults in the masking, put in the place of what decides


def mask_ignored(_: Learner) -> None:
    """`measure` puts the right class back."""

    class NoneMasked(Learned):
        @classmethod
        def of(cls, recipe: Recipe, whole: RolloutBatch) -> Learned:
            return Learned(np.zeros(len(whole), dtype=bool))

    learner_module.Learned = NoneMasked


def masked_counted(learner: Learner) -> None:
    loss = learner._loss

    def wrong(log_prob_R: torch.Tensor, micro: MicroBatch, *others: Any, **named: Any) -> Any:
        return replace(loss(log_prob_R, micro, *others, **named), count=len(micro.indices))

    learner._loss = wrong  # type: ignore[method-assign]


def targets_of_the_neighbour(_: Learner) -> None:
    class Shifted(Learned):
        def part(self, micro: MicroBatch) -> Part:
            found = super().part(micro)
            return replace(found, places=[(place + 1) % len(self.rows) for place in found.places])

    learner_module.Learned = Shifted


MASK_FAULTS: dict[str, tuple[Callable[[Learner], None], set[str]]] = {
    "mask ignored": (mask_ignored, EVERYTHING),
    "masked counted": (masked_counted, UP_TO_SCALE),
    "targets of the neighbour": (targets_of_the_neighbour, EVERYTHING),
}


def faults_of(layout: str) -> list[str]:
    """Those that can be: where there is one replica and one context rank, one rank's count is all of them."""
    parallel = parallel_of(layout)
    alone = parallel.dp * parallel.cp == 1
    return [fault for fault in FAULTS if not (alone and fault == "one rank's count for all")]


# ---- what is measured


def build(recipe: Recipe, topology: Topology, fault: str | None) -> Learner:
    readers = [HFReader(recipe.model.path), HFReader(recipe.model.reference_path)]
    if fault == "policy and reference swapped":
        readers.reverse()
    return Learner.build(recipe, topology, policy_weights=readers[0], reference_weights=readers[1])


def received(learner: Learner, fault: str | None, whole: RolloutBatch) -> RolloutBatch:
    if fault == "last tokens left out":
        rows = range(len(whole))
        prompts, responses = (
            [of(i).tolist() for i in rows] for of in (whole.sequences.prompt, whole.sequences.response)
        )
        whole = make_batch(prompts, [response[:-1] for response in responses], rewards=whole.reward_B.tolist())
    return learner.receive(whole if learner.topology.is_driver else None)


def measure(
    work: Path,
    layout: str,
    eps: float,
    fault: str | None,
    topology: Topology,
    *overrides: str,
    whole: RolloutBatch | None = None,
) -> dict:
    """Two optimizer steps of the learner on the batch (None: `batch()`), with `fault` in it."""
    recipe = recipe_of(work, layout, eps, *overrides)
    spec, learner = read_hf_config(recipe.model.path), build(recipe, topology, fault)
    trainable, gradients, norms = learner.trainable, [], []
    before = dict(WeightStream(learner.policy, spec, topology))
    if fault:
        (FAULTS | IMPORTANCE_FAULTS | MASK_FAULTS)[fault][0](learner)
    step = trainable.step

    def watched() -> float:
        if not recipe.optimizer.distributed:  # else each rank has its own part of the reduced gradient alone
            stream = WeightStream(learner.policy, spec, topology, tensor_of=lambda parameter: parameter.main_grad)
            gradients.append({name: gradient.clone() for name, gradient in stream})
        norms.append(step())
        return norms[-1]

    trainable.step = watched  # type: ignore[method-assign]
    metrics = learner.learn(received(learner, fault, whole or batch()), value_B()).metrics()
    learner_module.importance_weights, learner_module.Learned = importance_weights, Learned
    change = {name: after - before[name] for name, after in WeightStream(learner.policy, spec, topology)}
    mismatch = {name: metrics[f"mismatch/{name}"] for name in MISMATCH}
    importance = {name: metrics[f"importance/{name}"] for name in ("mean", "capped") if f"importance/{name}" in metrics}
    return {
        "norms": norms,
        "gradients": gradients,
        "change": change,
        "mismatch": mismatch,
        "importance": importance,
    }


def skip(work: Path, layout: str, topology: Topology) -> dict:
    """What comes of one sequence without a finite reward, and then of a whole batch of them."""
    recipe = recipe_of(work, layout, 1e-8)
    spec, learner = read_hf_config(recipe.model.path), build(recipe, topology, None)

    def weights() -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in WeightStream(learner.policy, spec, topology)}

    def with_nans(rows: list[int]) -> RolloutBatch:
        whole = batch()
        whole.reward_B[rows] = float("nan")
        return whole

    def changed(work: Callable[[], Any]) -> bool:
        before = weights()
        work()
        return any(not torch.equal(tensor, before[name]) for name, tensor in weights().items())

    last = len(batch()) - 1
    found: dict = {}

    def learn(whole: RolloutBatch, step: int) -> None:
        found["metrics"] = learner.learn(received(learner, None, whole), value_B(), step).metrics()

    found["one minibatch learns"] = changed(lambda: learn(with_nans([last]), 0))  # the first one does
    found["skipped"], found["in a row"] = found["metrics"]["skipped_steps"], learner.skipped_in_a_row
    learn(batch(), 1)
    found["in a row after a good step"] = learner.skipped_in_a_row

    def all_bad() -> None:
        try:
            for step in (2, 3):  # the third of four minibatches is the last straw
                learn(with_nans([0, last]), step)
        except GradientError as error:
            found["error"] = str(error)

    found["bad minibatches change weights"] = changed(all_bad)
    return found


def stop(work: Path, layout: str, topology: Topology) -> dict:
    """What comes of a sampler that is too far off: what each rank raises, and whether a weight has changed."""
    recipe = recipe_of(work, layout, 1e-8)
    recipe.mismatch = MismatchConfig(warn=1.5, stop=2, floor=0.01)
    spec, learner = read_hf_config(recipe.model.path), build(recipe, topology, None)
    before = {name: tensor.clone() for name, tensor in WeightStream(learner.policy, spec, topology)}
    error = None
    try:
        learner.learn(received(learner, None, batch()), value_B(), 6)
    except MismatchError as raised:
        error = str(raised)
    errors: list[str | None] = [None] * topology.world_size
    dist.all_gather_object(errors, error)
    changed = any(
        not torch.equal(tensor, before[name]) for name, tensor in WeightStream(learner.policy, spec, topology)
    )
    return {"errors": errors, "weights changed": changed, "schedule": learner.trainable.scheduler.num_steps}


def all_masked(work: Path, layout: str, topology: Topology) -> dict:
    """What comes of a minibatch that is masked whole, and of such a batch, after a step that gave Adam its moments."""
    recipe = recipe_of(work, layout, 1e-8, "reward.truncated=mask", "optimizer.weight_decay=0.1")
    spec, learner = read_hf_config(recipe.model.path), build(recipe, topology, None)
    count, found = len(batch()), {}

    def learn(rows: Iterable[int]) -> dict[str, float]:
        own = received(learner, None, masked_batch(rows))
        record, phases = learner.learn(own, value_B()), learner.timer.pop()
        return record.metrics() | learner.step_metrics(record, own, {**phases, "step": phases["train"]})

    def weights() -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in WeightStream(learner.policy, spec, topology)}

    learn([])
    for name, rows in {"first": range(count // NUM_MINIBATCHES), "all": range(count)}.items():
        before, steps = weights(), learner.trainable.scheduler.num_steps
        metrics = learn(rows)
        told: list[float | None] = [None] * topology.world_size
        dist.all_gather_object(told, metrics["masked_steps"])
        found[name] = {
            "metrics": metrics,
            "masked_steps": told,
            "steps": learner.trainable.scheduler.num_steps - steps,
            "changed": any(not torch.equal(tensor, before[key]) for key, tensor in weights().items()),
        }
    return found


def main(folder: str, layout: str) -> None:
    work = Path(folder)
    results: dict = {}
    with distributed(parallel_of(layout)) as topology:
        for fault in [None, *faults_of(layout)]:
            results[fault or "none"] = {eps: measure(work, layout, eps, fault, topology) for eps in SETTINGS}
        results["importance"] = {
            level: {
                fault or "none": {
                    1.0: measure(
                        work, layout, 1.0, fault, topology, f"train.importance={level}", f"train.importance_cap={cap}"
                    )
                }
                for fault in [None, *IMPORTANCE_FAULTS]
            }
            for level, cap in IMPORTANCE_CAPS.items()
        }
        unknown = batch().reward_B
        unknown[list(MASKED)] = float("nan")
        results["masked"] = {
            fault or "none": {
                eps: measure(
                    work,
                    layout,
                    eps,
                    fault,
                    topology,
                    "reward.truncated=mask",
                    # With a fault all have rewards: it is not to be seen by a NaN.
                    whole=masked_batch(MASKED) if fault else masked_batch(MASKED, reward_B=unknown),
                )
                for eps in SETTINGS
            }
            for fault in [None, *MASK_FAULTS]
        }
        results["masked"]["importance"] = {
            1.0: measure(
                work,
                layout,
                1.0,
                None,
                topology,
                "reward.truncated=mask",
                "train.importance=token",
                f"train.importance_cap={IMPORTANCE_CAPS['token']}",
                whole=masked_batch(MASKED, reward_B=unknown),
            )
        }
        results["all masked"] = all_masked(work, layout, topology)
        results["skipped"] = skip(work, layout, topology)
        results["stopped"] = stop(work, layout, topology)
        if topology.is_driver:
            torch.save(results, work / f"{layout}.pt")
