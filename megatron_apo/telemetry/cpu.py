"""CPU seconds, user and system, of a process and of all that it has started.

    clock = CpuClock()
    clock.seconds()  # 12.34

A process that has ended counts in whoever waited for it, so that nothing is lost while its parent is below this one.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from megatron_apo.runtime import guard

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_LOOK_EVERY_S = 1.0


class CpuClock:
    """Rises by what this process and its descendants compute. What was started within the last second may be missing
    until it is a second old: looking for processes takes milliseconds, reading those that are known does not."""

    def __init__(self) -> None:
        self._below: list[int] = []
        self._looked_at = -_LOOK_EVERY_S

    def seconds(self) -> float:
        if time.monotonic() - self._looked_at >= _LOOK_EVERY_S:
            self._below, self._looked_at = _descendants(os.getpid()), time.monotonic()
        waited_for = os.times()
        own = time.process_time() + waited_for.children_user + waited_for.children_system
        return own + sum(map(_process_s, self._below))


def _descendants(pid: int) -> list[int]:
    """Also those that nobody has waited for yet."""
    return [below for child in guard.children(pid) for below in (child, *_descendants(child))]


def _process_s(pid: int) -> float:
    """Of a process and of those that it has waited for (proc(5)); 0 where it is no more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, fields[11:15])) / _TICKS_PER_S
