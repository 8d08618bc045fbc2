"""What a batch of rollouts does to the policy: one optimizer step for each minibatch.

    learner = Learner.build(recipe, topology)     # policy, optimizer and reference on this rank
    batch = learner.receive(batch)                # the driver's batch in; this rank's part of it out
    record = learner.learn(batch, values)         # log-probs the objective asks for -> targets -> minibatches -> steps

The objective declares what it needs and the learner obeys; it never reads a method's name. Every method is called on
every rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_apo.config import Recipe
from megatron_apo.data.batch import MicroBatch
from megatron_apo.data.layout import BatchPlan, plan_batch
from megatron_apo.data.rollouts import RolloutBatch, RolloutFolder
from megatron_apo.data.sequences import Sequences
from megatron_apo.learner.diagnostics import StepRecord, diagnose
from megatron_apo.learner.masking import Learned
from megatron_apo.learner.mismatch import MismatchWatch
from megatron_apo.learner.optim import Trainable, make_trainable
from megatron_apo.learner.rollout_metrics import peak_flops, rollout_metrics
from megatron_apo.model.build import LogProbModel, build_model
from megatron_apo.model.hf_config import ModelSpec, read_hf_config
from megatron_apo.model.placement import Reference, place_reference
from megatron_apo.model.precision import Precision
from megatron_apo.objectives import LossTerm, Objective, Prepared, Samples, Stats, build_objective
from megatron_apo.objectives.importance import importance_weights, weight_gradient
from megatron_apo.parallel.pipeline import forward_backward, forward_log_probs
from megatron_apo.parallel.scatter import scatter
from megatron_apo.runtime.topology import Topology
from megatron_apo.telemetry.timers import Phase, PhaseTimer
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.parameters import TensorReader, load_weights

# [minibatch][micro-batch]
Minibatches = list[list[MicroBatch]]


class GradientError(RuntimeError):
    """Gradients that were not finite, in so many optimizer steps in a row that the run cannot go on."""


class Learner:
    """Policy, optimizer and reference of a run, on this rank.

    skipped_in_a_row: optimizer steps that were skipped since the last one that was not.
    mismatch: what the distance between trainer and sampler is held against.
    """

    def __init__(
        self,
        recipe: Recipe,
        spec: ModelSpec,
        topology: Topology,
        objective: Objective,
        trainable: Trainable,
        reference: Reference | None,
    ):
        self.recipe = recipe
        self.spec = spec
        self.topology = topology
        self.objective = objective
        self.trainable = trainable
        self.reference = reference
        self.timer = PhaseTimer()
        self.skipped_in_a_row = 0
        self.mismatch = MismatchWatch(recipe.mismatch, recipe.mismatch.least_baseline(recipe.model, recipe.rollout))

    @classmethod
    def build(
        cls,
        recipe: Recipe,
        topology: Topology,
        *,
        spec: ModelSpec | None = None,
        policy_weights: TensorReader | None = None,
        reference_weights: TensorReader | None = None,
    ) -> Learner:
        """The recipe's. By default architecture and weights are read from its Hugging Face folders.

        Raises `RecipeError` for what this machine cannot do.
        """
        spec = spec or read_hf_config(recipe.model.path)
        objective = build_objective(recipe.objective)
        assert not objective.needs_critic, "this learner has no critic"
        assert recipe.train.importance in ("none", *objective.importance_levels), "this objective takes no such weights"

        def build() -> list[LogProbModel]:
            precision, temperature = Precision.of(recipe.model, recipe.parallel), recipe.sampling.temperature
            return build_model(spec, recipe.parallel, topology, precision, temperature=temperature, train=recipe.train)

        policy = build()
        load_weights(policy, spec, topology, policy_weights or HFReader(recipe.model.path))
        total_steps = recipe.train.steps * recipe.train.minibatches
        trainable = make_trainable(policy, recipe.optimizer, total_steps=total_steps)
        reference = None
        if objective.ratio_denominator == "reference":
            weights = reference_weights or HFReader(recipe.model.reference_path)
            reference = place_reference(
                recipe.model.reference_mode,
                policy,
                build=build,
                load=lambda chunks: load_weights(chunks, spec, topology, weights),
            )
        return cls(recipe, spec, topology, objective, trainable, reference)

    @property
    def first_log_ratio_tolerance(self) -> float:
        """Largest |log pi/pi_ref| of a token on the first batch, where both are one model."""
        chosen = self.recipe.train.first_log_ratio_tolerance
        precision = Precision.of(self.recipe.model, self.recipe.parallel)
        return precision.log_ratio_tolerance if chosen is None else chosen

    @property
    def policy(self) -> list[LogProbModel]:
        """This rank's model chunks, as they were before they were wrapped for training."""
        return [chunk.module for chunk in self.trainable.chunks]

    def plan(self, sequences: Sequences) -> BatchPlan:
        """Which replica computes which of a rollout batch's sequences, and in which micro-batches."""
        minibatches, dp = self.recipe.train.minibatches, self.recipe.parallel.dp
        return plan_batch(self.recipe, sequences, num_minibatches=minibatches, dp=dp)

    def receive(self, batch: RolloutBatch | None) -> RolloutBatch:
        """This rank's part of the driver's `batch` (None elsewhere): all scalars, and its replica's tokens."""

        def rows_of(sequences: Sequences) -> list[list[int]]:
            plan = self.plan(sequences)
            return [plan.rows_of(replica) for replica in range(self.topology.dp)]

        return scatter(self.topology, batch, rows_of)

    def learn(self, batch: RolloutBatch, values: Mapping[str, float], step: int = 0) -> StepRecord:
        """Every optimizer step on one rollout batch, as `receive` gave it: that of step `step` of the run, from 0.

        values: V* by prompt id.

        A minibatch of which every response is masked (`Learned`) takes no optimizer step, and is counted. A step whose
        gradient is not finite changes nothing and is counted; the batch is kept in RUN/rollouts/skipped. Raises
        `GradientError` after train.max_skipped_steps such steps in a row, and `MismatchError` before the first
        optimizer step where the sampler's log-probs are too far from the policy's.
        """
        plan = self.plan(batch.sequences)
        minibatches = self.micro_batches(plan, batch)
        learned = Learned.of(self.recipe, batch)
        targets = self.objective.prepare(self.samples(batch), values)
        denominators = self._denominator_log_probs(minibatches, batch)
        old_policy = self._old_log_probs(minibatches, denominators)
        record = StepRecord(self.objective.reinforce_scale, plan.metrics())
        for number, (micro_batches, denominator, old) in enumerate(
            zip(minibatches, denominators, old_policy, strict=True)
        ):
            with self.timer.phase("train"):
                self.trainable.zero_grad()
                stats = forward_backward(
                    self.trainable.chunks,
                    micro_batches,
                    lambda log_prob_R, index, micro_batches=micro_batches, denominator=denominator, old=old: self._loss(
                        log_prob_R,
                        micro_batches[index],
                        denominator[index],
                        targets,
                        batch,
                        learned,
                        old and old[index],
                    ),
                )
                record.add(stats)
            if number == 0:  # the weights are still those that sampled
                self._judge_mismatch(record.gather(self.topology), step)
            with self.timer.phase("optimizer"):  # by a gradient of 0 Adam would move weights too
                grad_norm = self.trainable.step() if learned.has_any(plan.plans[number]) else None
            record.add_step(grad_norm)
            if grad_norm is not None:
                self._count_skipped(grad_norm, batch, step)
        return record.gather(self.topology)

    def _loss(
        self,
        log_prob_R: Tensor,
        micro: MicroBatch,
        denominator_R: Tensor,
        targets: Prepared,
        batch: RolloutBatch,
        learned: Learned,
        old_R: Tensor | None,
    ) -> LossTerm:
        """The objective's loss of a micro-batch, with what is told of it.

        old_R: log-probs at the weights that sampled; None: `log_prob_R` is.
        """
        sampler_R = self._sampler_log_probs(micro, batch)
        part = learned.part(micro)
        token_R, count = part.token_R, len(part.places)
        weighted_R, weights = log_prob_R[token_R], Stats({})
        if self.recipe.train.importance != "none":
            old_R = log_prob_R.detach() if old_R is None else old_R
            level, cap = self.recipe.train.importance, self.recipe.train.importance_cap
            weight_R, weights = importance_weights(
                level, cap, old_R[token_R], sampler_R[token_R], part.sequence_R, count
            )
            weighted_R = weight_gradient(weighted_R, weight_R)
        term = self.objective.loss(weighted_R, denominator_R[token_R], part.sequence_R, targets.select(part.places))
        assert term.count == (len(weighted_R) if self.objective.unit == "token" else count)
        stats = diagnose(term, log_prob_R.detach(), denominator_R, sampler_R, micro.sequence_R, len(micro.indices))
        return replace(term, stats=replace(stats, sums={**stats.sums, **weights.sums}))

    def _judge_mismatch(self, record: StepRecord, step: int) -> None:
        """By the numbers that every rank has, so that all of them raise `MismatchError` or none.

        Where policy or reference computed no number, so will the gradient: that step is skipped (`_count_skipped`).
        """
        if not record.is_finite:
            return
        told, warning = self.mismatch.judge(record.mismatch, step)
        record.tell(told)
        if warning and self.topology.is_driver:
            print(f"warning: {warning}", flush=True)

    def micro_batches(self, plan: BatchPlan, batch: RolloutBatch) -> Minibatches:
        """This replica's micro-batches of each minibatch, on this rank's device."""
        found = plan.micro_batches(batch.sequences, self.topology.dp_rank)
        return [[micro.to(self.topology.device) for micro in micro_batches] for micro_batches in found]

    def samples(self, batch: RolloutBatch) -> Samples:
        """The batch as an objective sees it: without the responses that are masked."""
        device, rows = self.topology.device, Learned.of(self.recipe, batch).rows
        return Samples(
            tuple(batch.prompt_ids[row] for row in rows),
            torch.tensor(batch.reward_B[rows], dtype=torch.float32, device=device),
            torch.tensor(batch.sequences.response_lengths_B[rows], dtype=torch.int64, device=device),
        )

    def _sampler_log_probs(self, micro: MicroBatch, batch: RolloutBatch) -> Tensor:
        """[R] as the engine computed them when it sampled."""
        return torch.from_numpy(batch.log_probs(micro.indices)).to(self.topology.device)

    def _denominator_log_probs(self, minibatches: Minibatches, batch: RolloutBatch) -> list[list[Tensor]]:
        """[minibatch][micro-batch] log-probs [R] that the ratio is against, on the last stage."""
        micro_batches = [micro for minibatch in minibatches for micro in minibatch]
        with self.timer.phase("reference"):
            match self.objective.ratio_denominator:
                case "reference":
                    assert self.reference is not None
                    with self.reference.active() as chunks:
                        found = forward_log_probs(chunks, micro_batches)
                case "old_policy":
                    found = forward_log_probs(self.trainable.chunks, micro_batches)
                case "sampler":
                    found = [self._sampler_log_probs(micro, batch) for micro in micro_batches]
                case "none":
                    found = [
                        micro.sequence_R.new_zeros(len(micro.sequence_R), dtype=torch.float32)
                        for micro in micro_batches
                    ]
        return _by_minibatch(found, minibatches)

    def _old_log_probs(
        self, minibatches: Minibatches, denominators: list[list[Tensor]]
    ) -> Sequence[list[Tensor] | None]:
        """[minibatch][micro-batch] log-probs [R] at the weights that sampled, on the last stage; None for a minibatch
        that needs none: the first, whose own forward pass is at these weights, and all without importance weights."""
        if self.recipe.train.importance == "none":
            return [None] * len(minibatches)
        if self.objective.ratio_denominator == "old_policy":
            return denominators
        later = [micro for minibatch in minibatches[1:] for micro in minibatch]
        if not later:
            return [None]
        with self.timer.phase("old_policy"):
            found = forward_log_probs(self.trainable.chunks, later)
        return [None, *_by_minibatch(found, minibatches[1:])]

    def step_metrics(
        self, record: StepRecord, batch: RolloutBatch, values: Mapping[str, float], phases: Mapping[str, Phase]
    ) -> dict[str, float]:
        """What is known of a step, by the names of metrics.jsonl; nothing except on the driver.

        values: V* by prompt id; phases: of `timer`.
        """
        if not self.topology.is_driver:
            return {}
        seconds = {name: phase.seconds for name, phase in phases.items()}
        rollouts = rollout_metrics(
            batch,
            values,
            seconds,
            self.spec,
            masked_B=Learned.of(self.recipe, batch).masked_B,
            num_ranks=self.topology.world_size,
            peak_flops=peak_flops(self.recipe, self.topology.device),
            denominator_computed=self.objective.ratio_denominator in ("reference", "old_policy"),
        )
        return {**rollouts, **record.metrics(), "lr": self.trainable.lr}

    def _count_skipped(self, grad_norm: float, batch: RolloutBatch, step: int) -> None:
        if math.isfinite(grad_norm):
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        folder = skipped_rollouts(self.recipe.run.dir)
        if self.topology.is_driver:
            try:
                where = f"the batch is in {folder.write(step, batch)}"
            except OSError as error:  # it is not worth the run
                where = f"the batch could not be kept: {error}"
            print(
                f"step {step + 1}: the gradient's norm is {grad_norm}; the optimizer step is skipped, {where}",
                flush=True,
            )
        if self.skipped_in_a_row >= self.recipe.train.max_skipped_steps:
            raise GradientError(
                f"step {step + 1}: the gradient was not finite in {self.skipped_in_a_row} optimizer steps in a row "
                f"(train.max_skipped_steps); the weights are those before them, the batches are in {folder.folder}"
            )


def _by_minibatch(found: Iterable[Tensor], minibatches: Minibatches) -> list[list[Tensor]]:
    """[minibatch][micro-batch], of one tensor after the other; there are none before the last stage."""
    each = iter(found)
    return [[next(each, torch.empty(0)) for _ in minibatch] for minibatch in minibatches]


def recorded_rollouts(run_dir: Path) -> RolloutFolder:
    """Where train.record keeps each step's batch."""
    return RolloutFolder(run_dir / "rollouts")


def skipped_rollouts(run_dir: Path) -> RolloutFolder:
    """Where the batches of skipped optimizer steps are kept."""
    return RolloutFolder(run_dir / "rollouts" / "skipped")
