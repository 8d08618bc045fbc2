"""Stage 2, online: one response per prompt, and the regression of its log-ratio (see objectives/apo.py).

A step: sample on the policy's own weights -> log-probs of the frozen anchor -> for each minibatch, one optimizer step
-> give the new weights to vLLM. The loop does what the objective declares and never reads its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from rich.progress import Progress
from torch import Tensor

from megatron_apo.config import Recipe
from megatron_apo.data.batch import MicroBatch
from megatron_apo.data.layout import lay_out, minibatches
from megatron_apo.data.order import step_prompts
from megatron_apo.data.prompts import Prompt
from megatron_apo.data.rollout import Rollout
from megatron_apo.learner.checkpoint import Checkpoints
from megatron_apo.learner.diagnostics import StepRecord, diagnose
from megatron_apo.learner.optim import Trainable, make_trainable
from megatron_apo.model.build import LogProbModel, build_model
from megatron_apo.model.hf_config import ModelSpec, read_hf_config
from megatron_apo.model.placement import Reference, place_reference
from megatron_apo.model.precision import Precision
from megatron_apo.objectives import Objective, Samples, build_objective
from megatron_apo.parallel.pipeline import forward_backward, forward_log_probs
from megatron_apo.parallel.topology import Topology
from megatron_apo.rollout.failures import kept_on_driver
from megatron_apo.rollout.rollouts import Rollouts
from megatron_apo.stages.curriculum import Curriculum, open_curriculum
from megatron_apo.telemetry.memory import long_lived
from megatron_apo.telemetry.recorder import Recorder
from megatron_apo.telemetry.timers import PhaseTimer
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.stream import WeightStream, export_hf, load_weights


def train(recipe: Recipe, topology: Topology) -> None:
    """The whole of stage 2, on every rank."""
    spec = read_hf_config(recipe.model.path)
    objective = build_objective(recipe.objective)
    assert not objective.needs_critic, "this loop has no critic"
    curriculum = kept_on_driver(topology, lambda: open_curriculum(recipe))
    policy = _build(recipe, spec, topology)
    load_weights(policy, spec, topology, HFReader(recipe.model.path))
    trainable = make_trainable(policy, recipe.optimizer, total_steps=recipe.train.steps * recipe.train.minibatches)
    reference = None
    if objective.anchor == "reference":
        reference = place_reference(
            recipe.model.reference_mode,
            policy,
            build=lambda: _build(recipe, spec, topology),
            load=lambda chunks: load_weights(chunks, spec, topology, HFReader(recipe.model.reference_path)),
        )
    checkpoints = Checkpoints(recipe, topology, trainable)
    start = checkpoints.restore()
    timer = PhaseTimer()
    inputs = curriculum.inputs if curriculum else None
    parked = partial(trainable.parked, recipe.train.offload_while_sampling)
    with (
        Rollouts(recipe, topology, policy, spec, inputs, parked, timer.phase) as rollouts,
        Recorder(recipe, topology, lambda: rollouts.server_pid) as recorder,
        Progress(disable=not (topology.is_driver and recipe.telemetry.progress)) as progress,
        long_lived(),
    ):
        recorder.synced(rollouts.sync(start))
        if start == 0:
            recorder.evaluated(0, rollouts.evaluate(0))
        else:
            recorder.resumed(start)
        task = progress.add_task("A*-PO", total=recipe.train.steps, completed=start)
        for step in range(start, recipe.train.steps):
            timer.pop()  # an evaluation's phases are no step's
            with timer.phase("step"):
                batch = rollouts.sample(_next_prompts(recipe, objective, curriculum, step), step)
                values = topology.broadcast(curriculum.values(batch) if curriculum else None)
                if step == start:
                    recorder.proved(_prove(recipe, rollouts, batch))
                record = _learn(recipe, topology, objective, trainable, reference, batch, values, timer)
                with timer.phase("sync"):
                    recorder.synced(rollouts.sync(step + 1))
            if step == 0 and recipe.model.reference_path == recipe.model.path:
                record.require_no_log_ratio(recipe.train.first_log_ratio_tolerance)
            if (step + 1) % recipe.sync.probe_every == 0:
                recorder.proved(_prove(recipe, rollouts, batch))
            recorder.log(step + 1, record, batch, values, timer.pop(), lr=trainable.lr)
            if recipe.eval.every and (step + 1) % recipe.eval.every == 0 and step + 1 < recipe.train.steps:
                recorder.evaluated(step + 1, rollouts.evaluate(step))
            checkpoints.save_if_due(step + 1)
            progress.advance(task)
        recorder.evaluated(recipe.train.steps, rollouts.evaluate(recipe.train.steps))
        recorder.finish(rollouts.pool.failures if topology.is_driver else {})
    out = recipe.run.dir / "checkpoints" / "hf"
    export_hf(WeightStream(policy, spec, topology), topology, source=recipe.model.path, out=out)


def _build(recipe: Recipe, spec: ModelSpec, topology: Topology) -> list[LogProbModel]:
    return build_model(
        spec,
        recipe.parallel,
        topology,
        Precision.of(recipe.model, recipe.parallel),
        temperature=recipe.sampling.temperature,
        train=recipe.train,
    )


def _next_prompts(recipe: Recipe, objective: Objective, curriculum: Curriculum | None, step: int) -> list[Prompt]:
    """The step's prompts on the driver, each as often as the objective wants responses; none elsewhere."""
    if curriculum is None:
        return []
    prompts = curriculum.prompts
    chosen = step_prompts(
        step, num_prompts=len(prompts), prompts_per_step=recipe.train.prompts_per_step, seed=recipe.run.seed
    )
    return [prompts[index] for index in chosen for _ in range(objective.samples_per_prompt)]


def _learn(
    recipe: Recipe,
    topology: Topology,
    objective: Objective,
    trainable: Trainable,
    reference: Reference | None,
    batch: Sequence[Rollout],
    values: Mapping[str, float],
    timer: PhaseTimer,
) -> StepRecord:
    """Every optimizer step on one rollout batch."""
    targets = objective.prepare(_samples(batch, topology.device), values)
    minibatches = _lay_out(recipe, topology, batch)
    anchors = _anchors(objective, trainable, reference, minibatches, batch, timer)
    record = StepRecord(objective.reinforce_scale)
    for micro, anchor in zip(minibatches, anchors, strict=True):

        def loss(log_prob_R: Tensor, index: int, micro=micro, anchor=anchor):
            piece = micro[index]
            term = objective.loss(log_prob_R, anchor[index], piece.sequence_R, targets.select(piece.indices))
            assert term.count == (len(log_prob_R) if objective.unit == "token" else len(piece.indices))
            sampler_R = piece.gather([rollout.log_probs for rollout in batch])
            return replace(term, stats=diagnose(term, log_prob_R.detach(), anchor[index], sampler_R))

        with timer.phase("train"):
            trainable.zero_grad()
            stats = forward_backward(trainable.chunks, micro, loss)
        with timer.phase("optimizer"):
            record.add(stats, trainable.step())
    return record.gather(topology)


def _samples(batch: Sequence[Rollout], device: torch.device) -> Samples:
    """The batch as an objective sees it."""
    return Samples(
        [rollout.prompt_id for rollout in batch],
        torch.tensor([rollout.reward for rollout in batch], device=device),
        torch.tensor([len(rollout.response_ids) for rollout in batch], device=device),
    )


def _lay_out(recipe: Recipe, topology: Topology, batch: Sequence[Rollout]) -> list[list[MicroBatch]]:
    """This replica's micro-batches of each minibatch."""
    prompts = [rollout.prompt_ids for rollout in batch]
    responses = [rollout.response_ids for rollout in batch]
    return [lay_out(recipe, topology, prompts, responses, rows=rows) for rows in minibatches(recipe, len(batch))]


def _anchors(
    objective: Objective,
    trainable: Trainable,
    reference: Reference | None,
    minibatches: list[list[MicroBatch]],
    batch: Sequence[Rollout],
    timer: PhaseTimer,
) -> list[list[Tensor]]:
    """[minibatch][micro-batch] log-probs that the ratio is against, on the last stage."""
    flat = [piece for micro in minibatches for piece in micro]
    with timer.phase("reference"):
        match objective.anchor:
            case "reference":
                assert reference is not None
                with reference.active() as chunks:
                    found = forward_log_probs(chunks, flat)
            case "iterate":
                found = forward_log_probs(trainable.chunks, flat)
            case "sampler":
                found = [piece.gather([rollout.log_probs for rollout in batch]) for piece in flat]
            case "none":
                found = [piece.sequence_R.new_zeros(len(piece.sequence_R), dtype=torch.float32) for piece in flat]
    anchors = iter(found)
    return [[next(anchors, torch.empty(0)) for _ in micro] for micro in minibatches]


def _prove(recipe: Recipe, rollouts: Rollouts, batch: Sequence[Rollout]) -> float:
    probes = batch[: recipe.sync.probe_sequences]
    return rollouts.prove([rollout.prompt_ids for rollout in probes], [rollout.response_ids for rollout in probes])
