"""What a batch of rollouts does to the policy: one optimizer step for each minibatch.

    learner = Learner.build(recipe, topology)     # policy, optimizer and reference on this rank
    batch = learner.receive(batch)                # the driver's batch in; this rank's part of it out
    record = learner.learn(batch, value_B)        # log-probs the objective asks for -> targets -> minibatches -> steps

The objective declares what it needs and the learner obeys; it never reads a method's name. Every method is called on
every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_apo.config import Recipe
from megatron_apo.data.batch import MicroBatch, by_sequence
from megatron_apo.data.layout import BatchPlan, plan_batch
from megatron_apo.data.rollouts import RolloutBatch, RolloutFolder
from megatron_apo.learner.checkpoint import CRITIC, POLICY
from megatron_apo.learner.diagnostics import StepRecord, diagnose
from megatron_apo.learner.known import KnownLogProbs, by_minibatch
from megatron_apo.learner.masking import Learned
from megatron_apo.learner.mismatch import MismatchWatch
from megatron_apo.learner.optim import Trainable, make_trainable
from megatron_apo.learner.rollout_metrics import peak_flops, rollout_metrics
from megatron_apo.learner.step import Minibatches, Part, Step
from megatron_apo.model.build import LogProbModel, build_model
from megatron_apo.model.hf_config import ModelSpec, read_hf_config
from megatron_apo.model.placement import Reference, place_reference
from megatron_apo.model.precision import Precision
from megatron_apo.model.value import build_critic
from megatron_apo.objectives import LossTerm, Micro, Objective, Prepared, Samples, Stats, objective_of
from megatron_apo.objectives.base import LogProbs, first_tokens
from megatron_apo.objectives.importance import importance_weights, weight_gradient
from megatron_apo.parallel.pipeline import forward_only
from megatron_apo.parallel.scatter import scatter
from megatron_apo.runtime.topology import Topology
from megatron_apo.telemetry.timers import Phase, PhaseTimer
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.parameters import TensorReader, load_weights


class Learner:
    """Policy and its optimizer, reference and critic of a run, on this rank; the last two where the objective asks for
    them.

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
        critic: Trainable | None = None,
    ):
        self.recipe = recipe
        self.spec = spec
        self.topology = topology
        self.objective = objective
        self.trainable = trainable
        self.reference = reference
        self.critic = critic
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
        objective = objective_of(recipe)
        assert recipe.train.importance in ("none", *objective.importance_levels), "this objective takes no such weights"

        def build(logits: bool = False) -> list[LogProbModel]:
            return build_model(
                spec,
                recipe.parallel,
                topology,
                Precision.of(recipe.model, recipe.parallel),
                temperature=recipe.sampling.temperature,
                train=recipe.train,
                logits=logits,
            )

        policy = build(objective.needs_first_logit)
        load_weights(policy, spec, topology, policy_weights or HFReader(recipe.model.path))
        total_steps = recipe.train.steps * recipe.train.minibatches
        trainable = make_trainable(policy, recipe.optimizer, total_steps=total_steps)
        reference = None
        if objective.needs_reference:
            weights = reference_weights or HFReader(recipe.model.reference_path)
            reference = place_reference(
                recipe.model.reference_mode,
                policy,
                build=build,
                load=lambda chunks: load_weights(chunks, spec, topology, weights),
            )
        critic = _critic(recipe, spec, topology, total_steps) if objective.needs_critic else None
        return cls(recipe, spec, topology, objective, trainable, reference, critic)

    @property
    def first_log_ratio_tolerance(self) -> float:
        """Largest |log pi/pi_ref| of a token on the first batch, where both are one model."""
        chosen = self.recipe.train.first_log_ratio_tolerance
        precision = Precision.of(self.recipe.model, self.recipe.parallel)
        return precision.log_ratio_tolerance if chosen is None else chosen

    @property
    def trainables(self) -> dict[str, Trainable]:
        """All that learns, by the names that checkpoints have for it."""
        return {POLICY: self.trainable} | ({CRITIC: self.critic} if self.critic else {})

    @contextmanager
    def offloaded(self, wanted: bool = True) -> Iterator[None]:
        """Within, if `wanted`: nothing but weights is on the device (`Trainable.offloaded`)."""
        with ExitStack() as stack:
            for trainable in self.trainables.values():
                stack.enter_context(trainable.offloaded(wanted))
            yield

    @property
    def policy(self) -> list[LogProbModel]:
        """This rank's model chunks, as they were before they were wrapped for training."""
        return [chunk.module for chunk in self.trainable.chunks]

    def plan(self, batch: RolloutBatch) -> BatchPlan:
        """Which replica computes which of a rollout batch's sequences, and in which micro-batches; a function of
        lengths, and of groups where the objective couples them."""
        minibatches, dp = self.recipe.train.minibatches, self.recipe.parallel.dp
        groups = batch.group_B.tolist() if self.objective.couples else None
        return plan_batch(self.recipe, batch.sequences, num_minibatches=minibatches, dp=dp, groups=groups)

    def receive(self, batch: RolloutBatch | None) -> RolloutBatch:
        """This rank's part of the driver's `batch` (None elsewhere): all scalars, and its replica's tokens."""

        def rows_of(whole: RolloutBatch) -> list[list[int]]:
            plan = self.plan(whole)
            return [plan.rows_of(replica) for replica in range(self.topology.dp)]

        return scatter(self.topology, batch, rows_of)

    def learn(self, batch: RolloutBatch, value_B: Sequence[float] | None = None, step: int = 0) -> StepRecord:
        """Every optimizer step on one rollout batch, as `receive` gave it: that of step `step` of the run, from 0.

        value_B: the baseline of each response, where the objective takes one. Raises what `Step.finish` does.
        """
        plan, learning = self.plan(batch), Step(self, step)
        learning.add(self.part(plan, batch, value_B))
        return learning.finish(plan, batch)

    def part(self, plan: BatchPlan, batch: RolloutBatch, value_B: Sequence[float] | None = None) -> Part:
        """A batch, or some whole groups of one, with all that is known of it before the first optimizer step."""
        minibatches = self.micro_batches(plan, batch)
        learned = Learned.of(self.recipe, batch)
        known = self._known_log_probs(minibatches, batch)
        prepared = self._prepare(minibatches, known, batch, learned, value_B)
        return Part(batch, plan, minibatches, learned, known, prepared)

    def _loss(
        self,
        output_R: Tensor,
        micro: MicroBatch,
        known_by: Callable[[Tensor], Mapping[LogProbs, Tensor]],
        *,
        batch: RolloutBatch,
        learned: Learned,
        prepared: Prepared,
        others_K: Tensor | None,
    ) -> LossTerm:
        """The objective's loss of a micro-batch, with what is told of it.

        output_R: log-probs, and beside them [R, 2] raw logits if the objective asks for those. known_by(log-probs): the
        tokens' log-probs by others.
        """
        log_prob_R, logit_R = output_R.unbind(1) if self.objective.needs_first_logit else (output_R, None)
        known, part = known_by(log_prob_R), learned.part(micro)
        token_R, count = part.token_R, len(part.places)
        fixed: dict[LogProbs, Tensor] = {name: value_R[token_R] for name, value_R in known.items()}
        weighted_R, weights = log_prob_R[token_R], Stats({})
        if self.recipe.train.importance != "none":
            level, cap = self.recipe.train.importance, self.recipe.train.importance_cap
            weight_R, weights = importance_weights(
                level, cap, fixed["old_policy"], fixed["sampler"], part.sequence_R, count
            )
            weighted_R = weight_gradient(weighted_R, weight_R)
        first_logit_B = None if logit_R is None else logit_R[token_R][first_tokens(part.sequence_R)]
        seen = Micro(weighted_R, part.places, part.sequence_R, fixed, first_logit_B, others_K)
        term = self.objective.loss(seen, prepared)
        assert term.count == (len(weighted_R) if self.objective.unit == "token" else count)
        stats = diagnose(
            term,
            log_prob_R.detach(),
            known.get("reference"),
            known["sampler"],
            micro.sequence_R,
            len(micro.indices),
        )
        return replace(term, stats=replace(stats, sums={**stats.sums, **weights.sums}))

    def _prepare(
        self,
        minibatches: Minibatches,
        known: KnownLogProbs,
        batch: RolloutBatch,
        learned: Learned,
        value_B: Sequence[float] | None,
    ) -> Prepared:
        """The objective's targets, on the last stage, which alone has log-probs; none on the others."""
        micro_batches = [micro for minibatch in minibatches for micro in minibatch]
        values = self._critic_values(micro_batches)
        if not self.topology.is_last_stage:
            return Prepared()
        samples = self._own_samples(micro_batches, batch, learned, value_B)

        def of_own(found: Sequence[Tensor]) -> list[Tensor]:
            return _of_own(micro_batches, learned, found)

        log_probs: dict[LogProbs, Sequence[Tensor]] = {
            name: of_own(known.whole(name)) for name in self.objective.target_log_probs
        }
        critic = of_own(values) if self.critic else ()
        return self.objective.prepare(replace(samples, log_probs=log_probs, critic=critic))

    def _own_samples(
        self,
        micro_batches: Sequence[MicroBatch],
        batch: RolloutBatch,
        learned: Learned,
        value_B: Sequence[float] | None = None,
    ) -> Samples:
        """`samples`, of which those of these micro-batches are this replica's own, in the order of `_of_own`."""
        own = [learned.place_of[row] for row in _own_rows(micro_batches, learned)]
        return replace(self.samples(batch, value_B), own=own, share=self._share(own, learned))

    def _share(self, own: Sequence[int], learned: Learned) -> Callable[[Tensor], Tensor]:
        """See `Samples.share`: context- and tensor-parallel ranks of a replica have the same numbers."""
        places, count = torch.tensor(own, dtype=torch.int64, device=self.topology.device), len(learned.rows)

        def share(values_O: Tensor) -> Tensor:
            values_K = values_O.new_zeros(count).index_copy(0, places, values_O)
            if self.topology.dp > 1:  # 0 where a replica has none: the sum is exact
                dist.all_reduce(values_K, group=self.topology.dp_group)
            return values_K

        return share

    def micro_batches(self, plan: BatchPlan, batch: RolloutBatch) -> Minibatches:
        """This replica's micro-batches of each minibatch, on this rank's device."""
        found = plan.micro_batches(batch.sequences, self.topology.dp_rank)
        return [[micro.to(self.topology.device) for micro in micro_batches] for micro_batches in found]

    def samples(self, batch: RolloutBatch, value_B: Sequence[float] | None = None) -> Samples:
        """What an objective sees of the batch that every rank has: numbers of the responses that are not masked."""
        device, rows = self.topology.device, Learned.of(self.recipe, batch).rows
        reward_K = torch.tensor(batch.reward_B[rows], dtype=torch.float32, device=device)
        return Samples(
            torch.tensor(batch.group_B[rows], dtype=torch.int64, device=device),
            reward_K,
            torch.tensor(batch.sequences.response_lengths_B[rows], dtype=torch.int64, device=device),
            reward_K.new_tensor([value_B[row] for row in rows]) if value_B is not None else None,
        )

    def _sampler_log_probs(self, micro: MicroBatch, batch: RolloutBatch) -> Tensor:
        """[R] as the engine computed them when it sampled."""
        return torch.from_numpy(batch.log_probs(micro.indices)).to(self.topology.device)

    def _known_log_probs(self, minibatches: Minibatches, batch: RolloutBatch) -> KnownLogProbs:
        """Those that the objective asks for, and the sampler's; on the last stage.

        The old policy's of the first minibatch, which only the loss asks for, are not computed: its own forward pass is
        at the weights that sampled.
        """
        micro_batches = [micro for minibatch in minibatches for micro in minibatch]
        asked = self.objective.target_log_probs | self.objective.loss_log_probs
        found: dict[LogProbs, list[list[Tensor] | None]] = {}
        found["sampler"] = by_minibatch([self._sampler_log_probs(micro, batch) for micro in micro_batches], minibatches)
        with self.timer.phase("reference"):
            if self.reference:
                found["reference"] = by_minibatch(self._reference_log_probs(micro_batches), minibatches)
        if "old_policy" in self.objective.target_log_probs:
            found["old_policy"] = by_minibatch(self._policy_log_probs(micro_batches), minibatches)
        elif "old_policy" in asked or self.recipe.train.importance != "none":
            later = [micro for minibatch in minibatches[1:] for micro in minibatch]
            found["old_policy"] = [None, *by_minibatch(self._policy_log_probs(later), minibatches[1:])]
        return KnownLogProbs(found)

    def _reference_log_probs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Nothing for nothing."""
        assert self.reference is not None
        if not micro_batches:
            return []
        with self.reference.active() as chunks:
            return forward_only(chunks, micro_batches)

    def _policy_log_probs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """At the present weights, without gradient; nothing for nothing."""
        if not micro_batches:
            return []
        with self.timer.phase("old_policy"):
            return forward_only(self.trainable.chunks, micro_batches)

    def _critic_values(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """[R] of each micro-batch, the critic's value before each response token; nothing without a critic, or before
        the last stage."""
        if self.critic is None:
            return []
        with self.timer.phase("critic"):
            return forward_only(self.critic.chunks, micro_batches)

    def _others_log_ratios(
        self,
        plan: BatchPlan,
        number: int,
        micro_batches: Sequence[MicroBatch],
        known: KnownLogProbs,
        batch: RolloutBatch,
        learned: Learned,
    ) -> Tensor | None:
        """[K] see `Micro.others_K`: of minibatch `number`, where the objective couples a group's sequences.

        Before the first step policy and old policy are one. Where each group is in one micro-batch no other's is asked
        for. Else it takes a forward pass of the minibatch: of all of it, since pipelines and experts keep step.
        """
        if not self.objective.couples:
            return None
        at_start_K = torch.zeros(len(learned.rows), device=self.topology.device)
        if number == 0 or not plan.splits_groups(number, batch.group_B.tolist()):
            return at_start_K
        present = self._policy_log_probs(micro_batches)
        if not self.topology.is_last_stage:
            return at_start_K
        old = known.whole("old_policy", number)
        ratios = [now - before for now, before in zip(present, old, strict=True)]
        return self._own_samples(micro_batches, batch, learned).shared_sums(_of_own(micro_batches, learned, ratios))

    def step_metrics(self, record: StepRecord, batch: RolloutBatch, phases: Mapping[str, Phase]) -> dict[str, float]:
        """What is known of a step, by the names of metrics.jsonl; nothing except on the driver. phases: of `timer`."""
        if not self.topology.is_driver:
            return {}
        seconds = {name: phase.seconds for name, phase in phases.items()}
        rollouts = rollout_metrics(
            batch,
            seconds,
            self.spec,
            masked_B=Learned.of(self.recipe, batch).masked_B,
            num_ranks=self.topology.world_size,
            peak_flops=peak_flops(self.recipe, self.topology.device),
            has_reference=self.reference is not None,
            critic=self.spec.as_critic() if self.critic else None,
        )
        rates = {"lr": self.trainable.lr} | ({"critic/lr": self.critic.lr} if self.critic else {})
        return {**rollouts, **record.metrics(), **rates}


def _own_rows(micro_batches: Sequence[MicroBatch], learned: Learned) -> list[int]:
    """The rows of the batch that are learned from and in these micro-batches."""
    return [row for micro in micro_batches for row in micro.indices if row in learned.place_of]


def _of_own(micro_batches: Sequence[MicroBatch], learned: Learned, found: Sequence[Tensor]) -> list[Tensor]:
    """[O] numbers a token, of [R] of each micro-batch."""
    rows = by_sequence(micro_batches, found)
    return [rows[row] for row in _own_rows(micro_batches, learned)]


def _critic(recipe: Recipe, spec: ModelSpec, topology: Topology, total_steps: int) -> Trainable:
    """The objective's critic, with its own optimizer and schedule."""
    config = recipe.objective.own_critic
    assert config is not None
    own, precision = spec.as_critic(), Precision.of(recipe.model, recipe.parallel)
    chunks = build_critic(own, recipe.parallel, topology, precision, train=recipe.train)
    load_weights(chunks, own, topology, HFReader(config.path or recipe.model.path))
    return make_trainable(chunks, config.optimizer, total_steps=total_steps)


def recorded_rollouts(run_dir: Path) -> RolloutFolder:
    """Where train.record keeps each step's batch."""
    return RolloutFolder(run_dir / "rollouts")
