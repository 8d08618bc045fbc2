"""Seconds by phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Adds up the wall-clock seconds spent in named phases.

    with timer.phase("generate"):
        ...
    timer.pop()  # {"generate": 0.62}

    A phase that raises counts too. A phase inside another counts in both.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def pop(self) -> dict[str, float]:
        """Seconds of each phase since the last `pop`, in the order of first use."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds
