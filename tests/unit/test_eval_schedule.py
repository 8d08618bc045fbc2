"""When a training's weights are evaluated, and when one that was lost is made up for. The counterpart of an engine is
an HTTP server without a model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from megatron_apo.rollout.eval_schedule import EvalSchedule
from megatron_apo.rollout.rollouts import Rollouts
from tests.engines import until
from tests.unit.test_rollouts import PROMPTS, Job, start  # noqa: F401 (a fixture)

Start = Callable[..., tuple[Rollouts, Job]]


class Told:
    """A recorder's part in evaluations. steps: of which weights there are some."""

    def __init__(self, steps: list[int]):
        self.steps = steps

    def evaluated(self, step: int, found: object, phase: object) -> None:
        assert found is not None and phase is not None
        self.steps.append(step)

    def has_evaluated(self, step: int) -> bool:
        return any(one >= step for one in self.steps)


def schedule_of(rollouts: Rollouts, steps: list[int]) -> EvalSchedule:
    rollouts.inputs.evaluation.prompts.extend(PROMPTS[:2])
    return EvalSchedule(rollouts._recipe, rollouts._topology, rollouts, Told(steps))  # type: ignore[arg-type]


@pytest.mark.parametrize("overlapped", ["false", "true"])
@pytest.mark.parametrize(("every", "wanted"), [(0, [0, 5]), (1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5])])
def test_each_is_made_once(start: Start, every: int, overlapped: str, wanted: list[int]) -> None:  # noqa: F811
    rollouts, _ = start(1, f"eval.every={every}", f"eval.overlapped={overlapped}", "eval.samples=1")
    steps: list[int] = []
    with rollouts:
        schedule = schedule_of(rollouts, steps)
        rollouts.sync(0)
        schedule.at_start(0, is_last=False)
        assert steps == [0], "the first is waited for"
        for done in range(1, 6):
            schedule.begin()
            schedule.end(done)
            rollouts.sync(done)
            schedule.after(done, is_last=done == 5)
            assert (done in steps) == (done in wanted and (overlapped == "false" or done == 5))
    assert steps == wanted


@pytest.mark.parametrize(
    ("every", "there", "resumed_at", "is_made"),
    [
        (0, [0], 3, False),
        (0, [], 3, True),
        (2, [0, 2], 3, False),
        (2, [0], 2, True),
        (2, [0], 3, True),  # that of step 2 was lost
        (2, [0, 3], 3, False),  # and made up for
        (2, [0, 2], 4, True),
    ],
)
def test_what_was_lost_is_made_up_for_by_a_resumed_run(
    start: Start,  # noqa: F811
    every: int,
    there: list[int],
    resumed_at: int,
    is_made: bool,
) -> None:
    rollouts, _ = start(1, f"eval.every={every}", "eval.samples=1")
    steps = list(there)
    with rollouts:
        rollouts.sync(resumed_at)
        schedule_of(rollouts, steps).at_start(resumed_at, is_last=False)
    assert steps == there + [resumed_at] * is_made


def test_one_whose_engines_die_is_of_the_next_weights(start: Start) -> None:  # noqa: F811
    rollouts, job = start(1, "eval.overlapped=true", "eval.every=2", "eval.samples=1")
    steps = [0]
    with rollouts:
        schedule = schedule_of(rollouts, steps)
        rollouts.sync(2)
        schedule.after(2, is_last=False)
        job.servers[0].held = True
        schedule.begin()
        until(lambda: job.servers[0].asked)
        job.servers[0].die()
        schedule.end(3)
        job.servers[0].held = False
        rollouts.sync(3)
        schedule.after(3, is_last=False)
        assert steps == [0]
        schedule.begin()
        schedule.end(4)
        assert steps == [0, 3]
        schedule.begin()
        schedule.end(5)
    assert steps == [0, 3]


def test_one_that_is_not_begun_is_not_waited_for(start: Start) -> None:  # noqa: F811
    """A run that is asked to end begins none."""
    rollouts, job = start(1, "eval.overlapped=true", "eval.every=1", "eval.samples=1")
    steps = [0]
    with rollouts:
        schedule = schedule_of(rollouts, steps)
        rollouts.sync(1)
        schedule.after(1, is_last=False)
        schedule.end(2)
    assert steps == [0] and not job.servers[0].asked


def test_a_replay_evaluates_nothing(start: Start) -> None:  # noqa: F811
    rollouts, _ = start(1, "eval.overlapped=true", "eval.every=1")
    schedule = EvalSchedule(rollouts._recipe, rollouts._topology, SimpleNamespace(), Told([]))  # type: ignore[arg-type]
    schedule.at_start(0, is_last=False)
    schedule.after(1, is_last=False)
    schedule.begin()
    schedule.end(2)
    schedule.after(2, is_last=True)
