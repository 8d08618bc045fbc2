"""Whether this run was asked to end before its work is done, and how long it has for that.

    request.ask("SIGUSR1", 600)             from any thread; the first counts
    with request.heard_by(listener): ...    called when it is asked, or at once if it was

Any process of the job is asked by SIGUSR1, and rank 0 hears of it: from ranks by their heartbeat, from nodes of engines
by theirs. Rank 0 decides what is still finished (`deadline.py`), and the others follow. Imports nothing heavy.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_apo.runtime.signals import ENDED_EARLY


class EndedEarly(RuntimeError):
    """The run was asked to end, has saved what it has, and goes on from there when it is started again."""

    exit_code = ENDED_EARLY


class Interrupted(Exception):
    """What the engines were asked is dropped, since the run ends."""


class Request:
    """To end this process's run early. `why`: who asked; None as long as nobody has."""

    def __init__(self) -> None:
        self.why: str | None = None
        self._end_s = math.inf
        self._lock = threading.RLock()  # a signal may come while one is handled
        self._listeners: list[Callable[[], None]] = []

    @property
    def left_s(self) -> float:
        """Seconds until the run is ended from outside, as far as is known."""
        return self._end_s - time.monotonic()

    def ask(self, why: str, notice_s: float = math.inf) -> None:
        """notice_s: how long the run has from now on."""
        with self._lock:
            if self.why is not None:
                return
            self.why, self._end_s = why, time.monotonic() + notice_s
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    @contextmanager
    def heard_by(self, listener: Callable[[], None]) -> Iterator[None]:
        with self._lock:
            self._listeners.append(listener)
            was_asked = self.why is not None
        if was_asked:
            listener()
        try:
            yield
        finally:
            with self._lock:
                self._listeners.remove(listener)


request = Request()  # of this process
