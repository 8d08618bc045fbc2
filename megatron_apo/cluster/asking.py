"""Whether a job's run is to end now, why, and what becomes of the job then.

    asking.hear(signal.SIGUSR1)        from a signal's handler
    asking.look(state, lead_s, now_s)  what SLURM says of the job, and how long before a limit the run has to be asked
    asking.reason, asking.is_again     who has asked it first; whether it was asked once more and ends at once

SIGUSR1 is SLURM's before a limit, or somebody's who means now. SLURM's comes at a fixed time, which may be earlier than
there is need: once it is known how long a step and a save take, it waits for the run's own clock.
"""

from __future__ import annotations

import math
import signal
import time
from dataclasses import dataclass
from typing import Literal

from megatron_apo.cluster.slurm import JobState

_EARLIEST_S = 900.0  # before a limit, that a signal may come for it
AGAIN_S = 2.0  # one request may come as several signals

By = Literal["limit", "SIGUSR1", "SIGTERM", "preemption"]
Next = Literal["requeue", "wait", "leave"]


@dataclass(frozen=True)
class Reason:
    """why: as it is told. by: limit is of the job's own clock."""

    why: str
    by: By


class Asking:
    """limit_s: the run's own limit, after so many seconds of this attempt."""

    def __init__(self, limit_s: float | None = None):
        self._limit_s = limit_s
        self._start_s = time.monotonic()
        self._usr1 = False  # has come, and waits for `look`
        self._heard_s = -math.inf
        self._is_timed = False  # whether the clock can tell when the run has to end
        self.reason: Reason | None = None
        self.is_again = False

    def hear(self, number: int) -> None:
        """SIGUSR1 or SIGTERM has come."""
        if number == signal.SIGTERM:
            self._ask(Reason("SIGTERM", "SIGTERM"))
        elif self.reason is None and self._is_timed:
            self._usr1 = True
        elif self.reason is None or self.reason.by != "limit":  # else it is for the same limit
            self._ask(Reason("SIGUSR1", "SIGUSR1"))

    @property
    def is_waiting(self) -> bool:
        """Whether a signal waits for `look`."""
        return self._usr1

    def look(self, state: JobState | None, lead_s: float | None, now_s: float) -> None:
        """state: None where SLURM does not answer. now_s: seconds since the epoch, as the state's."""
        if self.reason is not None:
            return
        usr1, self._usr1 = self._usr1, False
        end_s = state.end_s if state and state.runs else None
        self._is_timed = lead_s is not None
        if state and state.is_preempted:
            self._ask(Reason("the job is preempted", "preemption"))
        elif self._limit_s is not None and time.monotonic() - self._start_s > self._limit_s:
            self._ask(Reason("--limit", "limit"))
        elif end_s is not None and lead_s is not None and end_s - now_s <= lead_s:
            self._ask(Reason(f"the job's limit is {end_s - now_s:.0f} s away", "limit"))
        elif usr1 and (end_s is None or end_s - now_s > _EARLIEST_S):
            self._ask(Reason("SIGUSR1", "SIGUSR1"))

    def _ask(self, reason: Reason) -> None:
        now = time.monotonic()
        if self.reason is None:
            self.reason, self._heard_s = reason, now
        elif now - self._heard_s > AGAIN_S:
            self.is_again = True


def what_next(reason: Reason | None, state: JobState) -> tuple[Next, str]:
    """What becomes of a job whose run has ended early, and why it is left if it is."""
    if not state.runs:
        return "leave", f"the job is {state.name}, and is not requeued from here"
    if state.is_preempted:
        return "wait", ""
    if reason is None:
        return "leave", "as a process of it was asked to; submitted again it goes on"
    if reason.by == "SIGTERM":
        return "leave", "by SIGTERM, which is no limit; submitted again it goes on"
    return "requeue", ""
