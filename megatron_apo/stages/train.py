"""Stage 2, online: one response per prompt, and the regression of its log-ratio (see objectives/apo.py).

A step: sample on the policy's own weights -> log-probs of the frozen reference -> for each minibatch, one optimizer
step -> give the new weights to vLLM. The loop does what the objective declares and never reads its name; what learns
from a batch is `learner/learner.py`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial

from rich.progress import Progress

from megatron_apo.config import Recipe
from megatron_apo.learner.checkpoint import Checkpoints
from megatron_apo.learner.learner import Learner, recorded_rollouts
from megatron_apo.preflight import open_training
from megatron_apo.rollout.replay import Replay
from megatron_apo.rollout.rollouts import Rollouts
from megatron_apo.rollout.training_data import TrainingData
from megatron_apo.runtime.collective import driver_only, on_driver
from megatron_apo.runtime.garbage import garbage_collection_frozen
from megatron_apo.runtime.launch import write_recipe
from megatron_apo.runtime.topology import Topology
from megatron_apo.telemetry.recorder import Recorder
from megatron_apo.weights.stream import WeightStream, export_hf


def train(recipe: Recipe, topology: Topology) -> None:
    """The whole of stage 2, on every rank."""
    data = driver_only(topology, lambda: open_training(recipe))
    if topology.is_driver:
        write_recipe("train", recipe)
    learner = Learner.build(recipe, topology)
    checkpoints = Checkpoints(recipe, topology, learner)
    start = checkpoints.restore()
    with (
        _rollouts(recipe, topology, learner, data) as rollouts,
        Recorder(recipe, topology, rollouts.memory_pids, start) as recorder,
        Progress(disable=not (topology.is_driver and recipe.telemetry.progress)) as progress,
        garbage_collection_frozen(),
    ):
        recorder.synced(rollouts.sync(start))
        recorder.proved(rollouts.prove())
        if start == 0:
            recorder.evaluated(0, rollouts.evaluate(0))
        task = progress.add_task("A*-PO", total=recipe.train.steps, completed=start)
        for step in range(start, recipe.train.steps):
            learner.timer.pop()  # an evaluation's phases are no step's
            with learner.timer.phase("step"):
                prompts = data.prompts_of(recipe, step, learner.objective.samples_per_prompt) if data else []
                batch = learner.receive(rollouts.sample(prompts, step))
                values = on_driver(topology, partial(TrainingData.values, data, batch))
                if recipe.train.record:
                    on_driver(topology, partial(recorded_rollouts(recipe.run.dir).write, step, batch))
                record = learner.learn(batch, values, step)
                with learner.timer.phase("sync"):
                    recorder.synced(rollouts.sync(step + 1))
            if step == 0 and recipe.model.reference_path == recipe.model.path:
                record.require_no_log_ratio(learner.first_log_ratio_tolerance)
            if (step + 1) % recipe.sync.probe_every == 0:
                recorder.proved(rollouts.prove())
            phases = learner.timer.pop()
            recorder.log(
                step + 1, {**learner.step_metrics(record, batch, values, phases), **rollouts.step_metrics()}, phases
            )
            if recipe.eval.every and (step + 1) % recipe.eval.every == 0 and step + 1 < recipe.train.steps:
                recorder.evaluated(step + 1, rollouts.evaluate(step))
            checkpoints.save_if_due(step + 1)
            progress.advance(task)
        recorder.evaluated(recipe.train.steps, rollouts.evaluate(recipe.train.steps))
        recorder.finish(rollouts.grader_failures)
    stream = WeightStream(learner.policy, learner.spec, topology)
    export_hf(stream, topology, source=recipe.model.path, out=recipe.run.dir / "checkpoints" / "hf")


def _rollouts(
    recipe: Recipe, topology: Topology, learner: Learner, data: TrainingData | None
) -> AbstractContextManager[Rollouts | Replay]:
    """Where batches come from: vLLM, or a folder of recorded ones."""
    if recipe.train.replay:
        return Replay(recipe, topology)
    return Rollouts(
        recipe,
        topology,
        learner.policy,
        learner.spec,
        data.inputs if data else None,
        partial(learner.trainable.offloaded, recipe.train.offload_while_sampling),
        learner.timer.phase,
    )
