"""When a training's weights are evaluated: before its first step, after its last, and every eval.every steps.

    schedule.at_start(start, is_last=False)    # the engines hold the weights after `start` steps
    schedule.begin()                           # the next step is sampled: what is due begins
    schedule.end(start + 1)                    # it is learned: before the engines get its weights
    schedule.after(start + 1, is_last=False)   # they have them

Ranks wait for an evaluation, or with eval.overlapped for what is left of it when the next step is learned. The first
one is always waited for: it is of the weights that a run is held against. One that is lost, with the engines or since
the run ends, is made up for by the next weights.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_apo.config import Recipe
from megatron_apo.rollout.replay import Replay
from megatron_apo.rollout.rollouts import Rollouts
from megatron_apo.runtime.collective import on_driver
from megatron_apo.runtime.topology import Topology
from megatron_apo.telemetry.recorder import Evaluation, Recorder
from megatron_apo.telemetry.timers import PhaseTimer


class EvalSchedule:
    """Every method is collective. Call none within a phase of the learner's timer but `begin`: both take the process's
    peaks of memory. A replay evaluates nothing."""

    def __init__(self, recipe: Recipe, topology: Topology, rollouts: Rollouts | Replay, recorder: Recorder):
        self._every = recipe.eval.every
        self._is_overlapped = recipe.eval.overlapped
        self._topology = topology
        self._rollouts = rollouts if isinstance(rollouts, Rollouts) else None
        self._recorder = recorder
        self._timer = PhaseTimer()
        self._due: int | None = None  # the weights after so many steps, beside the next one
        self._begun: int | None = None

    def at_start(self, start: int, *, is_last: bool) -> None:
        """Before the first step of this process, `start` steps into the run."""
        last = start - start % self._every if self._every else 0
        if is_last or not on_driver(self._topology, lambda: self._recorder.has_evaluated(last)):
            self._evaluate(start, is_last)

    def after(self, step: int, *, is_last: bool) -> None:
        """is_last: no step follows."""
        if is_last or (self._every and step % self._every == 0):
            self._evaluate(step, is_last)

    def begin(self) -> None:
        """Engines work on what is due, until `end`."""
        if self._rollouts and self._due is not None:
            self._begun, self._due = self._due, None
            self._rollouts.begin_evaluation(self._begun)

    def end(self, done: int) -> None:
        """Wait for what has begun. Where it is lost the weights after `done` steps are due."""
        if self._rollouts is None or self._begun is None:
            return
        step, self._begun = self._begun, None
        if not self._told(step, self._rollouts.end_evaluation):
            self._due = done

    def _evaluate(self, step: int, is_last: bool) -> None:
        if self._rollouts is None:
            return
        if self._is_overlapped and step and not is_last:
            self._due = step
            return
        self._due = None
        self._told(step, self._rollouts.evaluate)

    def _told(self, step: int, wait: Callable[[int], Evaluation | None]) -> bool:
        """Wait for the evaluation of the weights after `step` steps and write it down; whether there is one."""
        with self._timer.phase("evaluation"):
            found = wait(step)
        phase = self._timer.pop()["evaluation"]
        if found is not None:
            self._recorder.evaluated(step, found, phase)
        return found is not None
