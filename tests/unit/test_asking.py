"""Why and when a job's run is asked to end, and what becomes of the job then."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from megatron_apo.cluster import asking
from megatron_apo.cluster.asking import Asking, Reason, what_next
from megatron_apo.cluster.slurm import JobState

NOW_S = 1e9  # since the epoch
LEAD_S = 210.0  # before a limit, that the run needs
USR1, TERM = signal.SIGUSR1, signal.SIGTERM


def state_of(left_s: float | None, *, preempted: bool = False, name: str = "RUNNING") -> JobState:
    return JobState(name, None if left_s is None else NOW_S + left_s, preempted, 0)


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time passes by this alone."""
    now = [0.0]
    monkeypatch.setattr(asking.time, "monotonic", lambda: now[0])

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    return pass_by


@pytest.mark.parametrize(
    ("state", "lead_s", "by"),
    [
        (state_of(3600), LEAD_S, None),
        (state_of(LEAD_S - 1), LEAD_S, "limit"),
        (state_of(LEAD_S - 1), None, None),  # nobody knows what a save takes: SLURM's signal is waited for
        (state_of(3600, preempted=True), LEAD_S, "preemption"),
        (state_of(3600, preempted=True), None, "preemption"),
        (state_of(None), LEAD_S, None),
        (None, LEAD_S, None),
    ],
)
def test_by_the_clock(state: JobState | None, lead_s: float | None, by: str | None) -> None:
    one = Asking()
    one.look(state, lead_s, NOW_S)
    assert (one.reason.by if one.reason else None) == by and not one.is_again


@pytest.mark.parametrize(
    ("state", "lead_s", "by"),
    [
        (state_of(3600), LEAD_S, "SIGUSR1"),  # somebody's, who means now
        (state_of(600), LEAD_S, None),  # SLURM's, which comes earlier than there is need
        (state_of(600), None, "SIGUSR1"),
        (state_of(600, preempted=True), LEAD_S, "preemption"),
        (state_of(LEAD_S - 1), LEAD_S, "limit"),
        (None, LEAD_S, "SIGUSR1"),
    ],
)
def test_a_signal_before_a_limit_waits_for_the_clock(
    state: JobState | None, lead_s: float | None, by: str | None
) -> None:
    one = Asking()
    one.look(state_of(36000), lead_s, NOW_S)
    one.hear(USR1)
    one.look(state, lead_s, NOW_S)
    assert (one.reason.by if one.reason else None) == by and not one.is_waiting


def test_a_limit_of_its_own(wait: Callable[[float], None]) -> None:
    one = Asking(limit_s=1000)
    one.look(state_of(36000), None, NOW_S)
    assert one.reason is None
    wait(1001)
    one.look(state_of(36000), None, NOW_S)
    assert one.reason == Reason("--limit", "limit")


@pytest.mark.parametrize("lead_s", [None, LEAD_S])
@pytest.mark.parametrize("number", [USR1, TERM])
def test_asked_again(lead_s: float | None, number: int, wait: Callable[[float], None]) -> None:
    """Also once the run has saved. Signals that come together are one request."""
    one = Asking()
    one.look(state_of(36000), lead_s, NOW_S)
    for _ in range(3):
        one.hear(number)
        one.look(state_of(36000), lead_s, NOW_S)
    assert one.reason and not one.is_again
    wait(asking.AGAIN_S + 1)
    one.hear(number)
    assert one.is_again


def test_slurms_signal_after_the_clock_is_no_second_request(wait: Callable[[float], None]) -> None:
    one = Asking(limit_s=0.5)
    wait(1)
    one.look(state_of(36000), LEAD_S, NOW_S)
    wait(60)
    one.hear(USR1)
    assert one.reason == Reason("--limit", "limit") and not one.is_again
    one.hear(TERM)
    assert one.is_again


@pytest.mark.parametrize(
    ("by", "state", "expected", "why"),
    [
        ("limit", state_of(3600), "requeue", ""),
        ("SIGUSR1", state_of(3600), "requeue", ""),
        ("SIGTERM", state_of(3600), "leave", "by SIGTERM, which is no limit"),
        (None, state_of(3600), "leave", "as a process of it was asked to"),
        ("preemption", state_of(30, preempted=True), "wait", ""),
        ("SIGUSR1", state_of(30, preempted=True), "wait", ""),
        ("SIGTERM", state_of(30, preempted=True), "wait", ""),
        (None, state_of(30, preempted=True), "wait", ""),
        *(
            (by, state_of(None, name="COMPLETING"), "leave", "the job is COMPLETING")
            for by in ("limit", "SIGTERM", None)
        ),
    ],
)
def test_what_becomes_of_the_job(by: asking.By | None, state: JobState, expected: str, why: str) -> None:
    """It is requeued from here for its own limit or signal alone."""
    found, told = what_next(Reason("why", by) if by else None, state)
    assert found == expected and told.startswith(why)
