"""Seconds, CPU seconds and peak memory by phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron_apo.telemetry.cpu import CpuClock
from megatron_apo.telemetry.memory import pop_private_peak_bytes


@dataclass(frozen=True)
class Phase:
    """What a phase took: wall-clock seconds, added up, and this process's peak memory in it.

    Memory is what tensors take of the GPU, or without one the process's private memory; 0 where it was not measured.
    cpu_s: of this process and of those that it has started, CPU seconds.
    """

    seconds: float
    peak_bytes: int
    cpu_s: float = 0.0


class PhaseTimer:
    """Measures named phases.

    with timer.phase("generate"):
        ...
    timer.pop()  # {"generate": Phase(seconds=0.62, peak_bytes=810_000_000)}

    A phase that raises counts too. A phase inside another counts in both. A phase waits for the GPU at its
    begin and at its end, so that what it took is its own: keep phases few and long.
    """

    def __init__(self) -> None:
        self._pop_peak = _pop_cuda_peak_bytes if torch.cuda.is_available() else pop_private_peak_bytes
        self._cpu = CpuClock()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._cpu_s: defaultdict[str, float] = defaultdict(float)
        self._peaks: defaultdict[str, int] = defaultdict(int)
        self._running: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._close_interval()
        start, start_cpu_s = time.perf_counter(), self._cpu.seconds()
        self._running.append(name)
        try:
            yield
        finally:
            self._close_interval()
            self._running.remove(name)
            self._seconds[name] += time.perf_counter() - start
            self._cpu_s[name] += self._cpu.seconds() - start_cpu_s

    def add(self, name: str, seconds: float) -> None:
        """A phase that ran beside others and was measured elsewhere; nobody knows its memory."""
        self._seconds[name] += seconds

    def pop(self) -> dict[str, Phase]:
        """Each phase since the last `pop`, in the order in which they first ended."""
        phases = {name: Phase(seconds, self._peaks[name], self._cpu_s[name]) for name, seconds in self._seconds.items()}
        self._seconds.clear()
        self._cpu_s.clear()
        self._peaks.clear()
        return phases

    def _close_interval(self) -> None:
        """The peak since the last call belongs to every phase that ran in between."""
        peak = self._pop_peak()
        for name in self._running:
            self._peaks[name] = max(peak, self._peaks[name])


class Stopwatch:
    """Seconds of named phases, added up. A phase inside another counts in its own alone."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._count()
        self._running.append(name)
        try:
            yield
        finally:
            self._count()
            self._running.pop()

    def _count(self) -> None:
        """The time since the last call is the innermost phase's."""
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


def _pop_cuda_peak_bytes() -> int:
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak
