"""Stage 2, online: responses of the policy itself, and a step by what they say (A*-PO's: objectives/apo.py).

A step: sample on the policy's own weights -> log-probs that the objective asks for -> for each minibatch, one optimizer
step -> give the new weights to vLLM. With train.streamed, what comes first is computed while the rest is still sampled
(`learner/streamed.py`). The loop does what the objective declares and never reads its name; what learns
from a batch is `learner/learner.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial

from rich.progress import Progress

from megatron_apo.config import Recipe
from megatron_apo.data.prompt_source import PromptSource
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.learner.checkpoint import Checkpoints, exported
from megatron_apo.learner.diagnostics import StepRecord
from megatron_apo.learner.learner import Learner, recorded_rollouts
from megatron_apo.learner.masking import Learned
from megatron_apo.learner.rollout_metrics import source_metrics
from megatron_apo.learner.streamed import StreamedStep
from megatron_apo.preflight import open_training
from megatron_apo.rollout.engines import Engines
from megatron_apo.rollout.eval_schedule import EvalSchedule
from megatron_apo.rollout.fleet import Fleet
from megatron_apo.rollout.groups import Drawn, sample_groups
from megatron_apo.rollout.replay import Replay
from megatron_apo.rollout.rollouts import Rollouts
from megatron_apo.rollout.training_data import TrainingData
from megatron_apo.runtime.collective import driver_only, on_driver
from megatron_apo.runtime.deadline import Deadline
from megatron_apo.runtime.ending import EndedEarly, Interrupted, request
from megatron_apo.runtime.garbage import garbage_collection_frozen
from megatron_apo.runtime.launch import write_recipe
from megatron_apo.runtime.topology import Topology
from megatron_apo.telemetry.recorder import DRAWN_REWARD, GENERATE_S, SAVE_S, STEP_S, Recorder
from megatron_apo.values.baselines import Baseline
from megatron_apo.weights.stream import WeightStream, export_hf


def train(recipe: Recipe, topology: Topology, fleet: Fleet | None) -> None:
    """The whole of stage 2, on every rank. fleet: engines that were begun before, if any (`rollout/early.py`)."""
    data = driver_only(topology, lambda: open_training(recipe))
    if topology.is_driver:
        write_recipe("train", recipe)
    starting = nullcontext() if recipe.train.replay else Engines(recipe, topology, fleet)
    with starting as engines:  # beside what follows
        learner = _trained(recipe, topology, data, engines)
    stream = WeightStream(learner.policy, learner.spec, topology)
    export_hf(stream, topology, source=recipe.model.path, out=exported(recipe.run.dir))


def _trained(recipe: Recipe, topology: Topology, data: TrainingData | None, engines: Engines | None) -> Learner:
    """The learner after all steps."""
    learner = Learner.build(recipe, topology)
    prompts = PromptSource(recipe, data.prompts) if data else None
    source = recipe.objective.value_source
    baseline = data.baseline(source) if data and source else None
    checkpoints = Checkpoints(recipe, topology, learner, prompts, baseline)
    start = checkpoints.restore()
    with (
        _rollouts(recipe, topology, learner, data, engines) as rollouts,
        Recorder(recipe, topology, rollouts.memory_pids, start) as recorder,
        Deadline(topology, rollouts.interrupt) as deadline,
        Progress(disable=not (topology.is_driver and recipe.telemetry.progress)) as progress,
        garbage_collection_frozen(),
    ):
        deadline.expect(*map(recorder.last, (STEP_S, GENERATE_S, SAVE_S)))
        done = start
        evaluations = EvalSchedule(recipe, topology, rollouts, recorder)

        def sampled() -> None:
            if not deadline.is_asked:
                evaluations.begin()

        steps = _Steps(recipe, topology, learner, rollouts, prompts, baseline, sampled)

        def save() -> None:
            if (seconds := checkpoints.save(done)) is not None:
                recorder.saved(done, seconds)
                deadline.has_saved(seconds)

        def is_over() -> bool:
            return on_driver(topology, lambda: _is_over(recipe, recorder, done))

        try:
            recorder.synced(rollouts.sync(start))
            recorder.proved(rollouts.prove())
            ends = is_over()
            evaluations.at_start(start, is_last=ends)
            task = progress.add_task("training", total=recipe.train.steps, completed=start)
            while not ends:
                step = done
                deadline.require_time()
                learner.timer.pop()  # what was between steps is none's
                with learner.timer.phase("step"):
                    with deadline.sampling():
                        batch, drawn, learn = steps.begin(step)
                    masked_B = Learned.of(recipe, batch).masked_B
                    with deadline.learning():
                        if recipe.train.record:
                            on_driver(topology, partial(recorded_rollouts(recipe.run.dir).write, step, batch))
                        record = learn()
                    if prompts:
                        prompts.step_is_done()
                    if baseline:
                        baseline.update(step, batch.prompt_ids, batch.group_B, batch.reward_B, ~masked_B)
                    done = step + 1
                with deadline.put_off():
                    evaluations.end(done)
                with deadline.put_off(), learner.timer.phase("step"), learner.timer.phase("sync"):
                    recorder.synced(rollouts.sync(done))
                if step == 0 and recipe.model.reference_path == recipe.model.path:
                    record.require_no_log_ratio(learner.first_log_ratio_tolerance)
                if done % recipe.sync.probe_every == 0:
                    with deadline.put_off():
                        recorder.proved(rollouts.prove())
                phases = learner.timer.pop()
                by_source = source_metrics(batch, data.source_names(batch), masked_B) if data else {}
                metrics = learner.step_metrics(record, batch, phases)
                if baseline:
                    metrics["value/fallbacks"] = baseline.num_fallbacks / len(batch)
                if drawn.draws:
                    metrics |= drawn.metrics(phases["step"].seconds, phases["generate"].seconds)
                recorder.log(done, {**metrics, **by_source, **rollouts.step_metrics()}, phases)
                if checkpoints.is_due(done):
                    save()
                progress.advance(task)
                deadline.require_time()
                ends = is_over()
                evaluations.after(done, is_last=ends)
            deadline.require_time()
        except Interrupted:
            why, unsaved = on_driver(topology, lambda: request.why), recipe.why_unsaved
            if not unsaved:
                save()
            outcome = f"which cannot be saved with {unsaved}" if unsaved else "which are saved"
            raise EndedEarly(f"ended early after {done} of {recipe.train.steps} steps, {outcome} ({why})") from None
        recorder.finish(rollouts.grader_failures)
    return learner


# (A step's batch, how it was drawn, and what learns from it.)
Begun = tuple[RolloutBatch, Drawn, Callable[[], StepRecord]]


@dataclass(frozen=True)
class _Steps:
    """Begins a run's steps. prompts, baseline: on the driver, where there are any. sampled: called when engines have
    answered all of a step."""

    recipe: Recipe
    topology: Topology
    learner: Learner
    rollouts: Rollouts | Replay
    prompts: PromptSource | None
    baseline: Baseline | None
    sampled: Callable[[], None]

    def begin(self, step: int) -> Begun:
        return self._streamed(step) if self.recipe.train.streamed else self._sampled(step)

    def _sampled(self, step: int) -> Begun:
        """A step that has been sampled."""
        learner, train = self.learner, self.recipe.train
        drawn = sample_groups(
            self.topology,
            self.rollouts,
            self.prompts,
            learner.objective,
            train.prompts_per_step,
            step,
            may_redraw=train.replay is None,
        )
        self.sampled()
        batch = learner.receive(drawn.batch)
        return batch, drawn, lambda: learner.learn(batch, self._values(step, batch), step)

    def _streamed(self, step: int) -> Begun:
        """The same, of which all is computed that could be before its first optimizer step."""
        learner, train = self.learner, self.recipe.train
        streamed, is_sampled = StreamedStep(learner, step), train.replay is None
        asked = self.prompts.draw(train.prompts_per_step) if self.prompts and is_sampled else []
        samples, enough = learner.objective.samples_per_prompt, train.tokens_per_micro_batch * self.topology.dp
        with closing(self.rollouts.stream(asked, step, num_samples=samples, enough=enough)) as waves:
            missing = self.recipe.responses_per_step
            for rows, wave in waves:
                missing -= len(rows)
                if not missing:
                    self.sampled()
                own = streamed.receive(rows, wave)
                streamed.add(own, self._values(step, own))
        batch = streamed.batch()
        if is_sampled:
            learner.timer.add("generate", float(batch.seconds_B.max()))
        return batch, Drawn(batch, [batch] if asked else []), lambda: streamed.finish(batch)

    def _values(self, step: int, batch: RolloutBatch) -> list[float] | None:
        """The baseline of each response of a step's batch, or of some whole groups of it, where the method takes
        one."""

        def work() -> list[float] | None:
            if self.baseline is None:
                return None
            learned_B = ~Learned.of(self.recipe, batch).masked_B
            return self.baseline.values(step, batch.prompt_ids, batch.group_B, batch.reward_B, learned_B).tolist()

        return on_driver(self.topology, work)


def _is_over(recipe: Recipe, recorder: Recorder, step: int) -> bool:
    """On the driver, whether a training that has taken `step` steps takes no more."""
    train = recipe.train
    if step == train.steps:
        return True
    reward = None if train.target_reward is None else recorder.mean_of_last(DRAWN_REWARD, recipe.target_window)
    if reward is not None and reward >= train.target_reward:
        print(f"after {step} steps the reward is {reward:.3f}, train.target_reward {train.target_reward}", flush=True)
        return True
    if train.max_minutes is not None and recorder.total(STEP_S) >= 60 * train.max_minutes:
        print(f"after {step} steps the time is up, train.max_minutes {train.max_minutes:g}", flush=True)
        return True
    return False


def _rollouts(
    recipe: Recipe, topology: Topology, learner: Learner, data: TrainingData | None, engines: Engines | None
) -> AbstractContextManager[Rollouts | Replay]:
    """Where batches come from: vLLM, or without engines a folder of recorded ones."""
    if engines is None:
        return Replay(recipe, topology)
    return Rollouts(
        recipe,
        topology,
        learner.policy,
        learner.spec,
        data.inputs if data else None,
        partial(learner.offloaded, recipe.train.offload_while_sampling),
        learner.timer.phase,
        engines,
    )
