"""One step of the learner: the minibatches of a rollout batch, which comes whole or part by part.

    step = Step(learner, number)
    step.add(learner.part(plan, batch, value_B)) ..     # gradients of the first minibatch add up
    record = step.finish(plan, batch)                   # its optimizer step, then the other minibatches

The weights stay what they were until `finish`. Of several parts each has its own targets; the gradient is of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_apo.data.batch import MicroBatch
from megatron_apo.data.layout import BatchPlan
from megatron_apo.data.rollouts import RolloutBatch, RolloutFolder
from megatron_apo.learner.checkpoint import CRITIC, POLICY
from megatron_apo.learner.diagnostics import StepRecord
from megatron_apo.learner.known import KnownLogProbs
from megatron_apo.learner.masking import Learned
from megatron_apo.objectives import LossTerm, Micro, Prepared, Stats
from megatron_apo.parallel.pipeline import OpenGradient, forward_backward

if TYPE_CHECKING:
    from megatron_apo.learner.learner import Learner

# [minibatch][micro-batch]
Minibatches = list[list[MicroBatch]]


class GradientError(RuntimeError):
    """Gradients that were not finite, in so many optimizer steps in a row that the run cannot go on."""


@dataclass(frozen=True)
class Part:
    """What of a step's batch is there: all of it, or some whole groups, by a batch and a plan of their own.

    minibatches: this replica's. known, prepared: see `KnownLogProbs` and `Prepared`, on the last stage.
    """

    batch: RolloutBatch
    plan: BatchPlan
    minibatches: Minibatches
    learned: Learned
    known: KnownLogProbs
    prepared: Prepared


class Step:
    """That of this number in the run, from 0. Every method is called on every rank."""

    def __init__(self, learner: Learner, number: int):
        self._learner = learner
        self._number = number
        self._parts: list[Part] = []
        self._first: OpenGradient | None = None  # of the first minibatch
        self._stats: list[Stats] = []  # of its micro-batches

    def add(self, part: Part) -> None:
        """Take in a part; what it has of the first minibatch goes into the gradient."""
        self._parts.append(part)
        if self._first is None:
            self._first = self._begin_gradient()
        self._stats += self._backward(self._first, 0, [part])

    def finish(self, plan: BatchPlan, batch: RolloutBatch) -> StepRecord:
        """Every optimizer step, all parts being there. plan, batch: of all of them.

        A minibatch of which every response is masked (`Learned`) takes no optimizer step, and is counted. A gradient
        that is not finite leaves its model as it is, and is counted; the batch is kept in RUN/rollouts/skipped. Raises
        `GradientError` after train.max_skipped_steps of these in a row, and `MismatchError` before the first optimizer
        step where the sampler's log-probs are too far from the policy's.
        """
        learner, topology = self._learner, self._learner.topology
        record = StepRecord(learner.objective.reinforce_scale, plan.metrics())
        record.tell(topology.broadcast(_means(self._parts), src=topology.last_stage_rank))
        for minibatch in range(len(plan.plans)):
            record.add(self._accumulate(minibatch))
            if minibatch == 0:  # the weights are still those that sampled
                self._judge_mismatch(record.gather(topology))
            with learner.timer.phase("optimizer"):  # by a gradient of 0 Adam would move weights too
                has_any = any(part.learned.has_any(part.plan.plans[minibatch]) for part in self._parts)
                grad_norm = learner.trainable.step() if has_any else None
            record.add_step(grad_norm)
            if grad_norm is not None:
                norms = {POLICY: grad_norm, **self._teach_critic(minibatch, record)}
                self._count_skipped({name: norm for name, norm in norms.items() if not math.isfinite(norm)}, batch)
        return record.gather(topology)

    def _begin_gradient(self) -> OpenGradient:
        with self._learner.timer.phase("train"):
            self._learner.trainable.zero_grad()
        return OpenGradient(self._learner.trainable.chunks)

    def _accumulate(self, minibatch: int) -> list[Stats]:
        """The minibatch's gradient, whole; the first one's is there but for its end."""
        if minibatch == 0:
            assert self._first is not None, "a step without a part"
            gradient, stats = self._first, self._stats
        else:
            gradient = self._begin_gradient()
            stats = self._backward(gradient, minibatch, self._parts)
        with self._learner.timer.phase("train"):
            gradient.close()
        return stats

    def _backward(self, gradient: OpenGradient, minibatch: int, parts: Sequence[Part]) -> list[Stats]:
        """What these parts have of the minibatch, by one schedule call; the `Stats` of its micro-batches."""
        micro_batches, losses = [], []
        for part in parts:
            own = part.minibatches[minibatch]
            others_K = self._learner._others_log_ratios(part.plan, minibatch, own, part.known, part.batch, part.learned)
            loss = partial(
                self._learner._loss, batch=part.batch, learned=part.learned, prepared=part.prepared, others_K=others_K
            )
            micro_batches += own
            losses += [_of_micro_batch(loss, micro, part.known, minibatch, index) for index, micro in enumerate(own)]
        chunks = self._learner.trainable.chunks
        with self._learner.timer.phase("train"):
            return forward_backward(chunks, micro_batches, lambda output_R, index: losses[index](output_R), gradient)

    def _teach_critic(self, minibatch: int, record: StepRecord) -> dict[str, float]:
        """The critic's optimizer step on a minibatch, where there is one: its gradient's norm, by its name. One
        that is not finite leaves the critic as it is, and is counted."""
        critic, objective = self._learner.critic, self._learner.objective
        if critic is None:
            return {}
        (part,) = self._parts  # its values are of the whole batch
        micro_batches = part.minibatches[minibatch]

        def loss(value_R: Tensor, index: int) -> LossTerm:
            own = part.learned.part(micro_batches[index])
            term = objective.value_loss(Micro(value_R[own.token_R], own.places, own.sequence_R), part.prepared)
            count = value_R.new_tensor(term.count)
            return replace(term, stats=replace(term.stats, sums={**term.stats.sums, "count": count}))

        with self._learner.timer.phase("critic"):
            critic.zero_grad()
            stats = forward_backward(critic.chunks, micro_batches, loss)
            norm = critic.step()
        record.add_critic(stats, norm)
        return {CRITIC: norm}

    def _judge_mismatch(self, record: StepRecord) -> None:
        """By the numbers that every rank has, so that all of them raise `MismatchError` or none.

        Where policy or reference computed no number, so will the gradient: that step is skipped (`_count_skipped`).
        """
        if not record.is_finite:
            return
        told, warning = self._learner.mismatch.judge(record.mismatch, self._number)
        record.tell(told)
        if warning and self._learner.topology.is_driver:
            print(f"warning: {warning}", flush=True)

    def _count_skipped(self, skipped: Mapping[str, float], batch: RolloutBatch) -> None:
        """skipped: the norms that were not finite, of whose gradient."""
        learner, most = self._learner, self._learner.recipe.train.max_skipped_steps
        if not skipped:
            learner.skipped_in_a_row = 0
            return
        learner.skipped_in_a_row += 1
        folder = skipped_rollouts(learner.recipe.run.dir)
        if learner.topology.is_driver:
            try:
                where = f"the batch is in {folder.write(self._number, batch)}"
            except OSError as error:  # it is not worth the run
                where = f"the batch could not be kept: {error}"
            for name, norm in skipped.items():
                print(
                    f"step {self._number + 1}: the norm of the {name}'s gradient is {norm}; its optimizer step is "
                    f"skipped, {where}",
                    flush=True,
                )
        if learner.skipped_in_a_row >= most:
            raise GradientError(
                f"step {self._number + 1}: the gradient of {' and '.join(skipped)} was not finite; that is "
                f"{learner.skipped_in_a_row} optimizer steps in a row that were skipped for such a gradient "
                f"(train.max_skipped_steps); the batches are in {folder.folder}"
            )


def _of_micro_batch(
    loss: Callable[..., LossTerm], micro: MicroBatch, known: KnownLogProbs, minibatch: int, index: int
) -> Callable[[Tensor], LossTerm]:
    return lambda output_R: loss(output_R, micro, partial(known.of, minibatch, index))


def _means(parts: Sequence[Part]) -> dict[str, float]:
    """What all parts' targets tell, each a mean over the sequences that are learned from."""
    if len(parts) == 1:
        return dict(parts[0].prepared.metrics)
    weights = [len(part.learned.rows) for part in parts]
    names: Mapping[str, float] = parts[0].prepared.metrics
    return {
        name: sum(weight * part.prepared.metrics[name] for weight, part in zip(weights, parts, strict=True) if weight)
        / sum(weights)
        if sum(weights)
        else math.nan
        for name in names
    }


def skipped_rollouts(run_dir: Path) -> RolloutFolder:
    """Where the batches of skipped optimizer steps are kept."""
    return RolloutFolder(run_dir / "rollouts" / "skipped")
