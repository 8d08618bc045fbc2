"""Private memory of processes.

The resident set counts every page of a mapped file (weights, shared libraries) once in each process that
touched it, so sums over processes mean little. What is counted here is each process's share of memory that no
file on disk backs: Pss_Anon + Pss_Shmem of /proc/PID/smaps_rollup (proc(5), Linux 5.9), where a page shared by
n processes counts 1/n in each.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_SHARE = re.compile(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB$", re.M)
_RESIDENT = re.compile(r"^(VmHWM|RssFile|RssShmem):\s+(\d+) kB$", re.M)


def private_bytes(pid: int) -> int:
    """Private memory of one process, bytes; 0 if it has ended (or is another user's)."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return 1024 * sum(map(int, _SHARE.findall(text)))


def tree_private_bytes(pid: int, without: Set[int] = frozenset()) -> int:
    """Private memory of a process and its descendants, bytes, leaving out the subtrees rooted at `without`."""
    total, waiting = 0, [pid]
    while waiting:
        current = waiting.pop()
        total += private_bytes(current)
        try:
            children = [child.pid for child in psutil.Process(current).children()]
        except psutil.NoSuchProcess:
            continue
        waiting += [child for child in children if child not in without]
    return total


def pop_private_peak_bytes() -> int:
    """About the peak private memory of this process since the last call, bytes; takes 0.2 ms.

    The kernel's peak of the resident set, which is then set back (proc(5), clear_refs), without the mapped files and
    shared memory that are resident now: those that were dropped in between are counted. Where it may not be set back,
    it is the peak since the process's start.
    """
    sizes = dict(_RESIDENT.findall(Path("/proc/self/status").read_text()))
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * (int(sizes["VmHWM"]) - int(sizes["RssFile"]) - int(sizes["RssShmem"]))


class MemorySampler:
    """Peak private memory of labelled process trees, sampled by a thread.

    with MemorySampler() as memory, memory.watch("vllm server", server.pid):
        ...
    memory.peaks()  # {"vllm server": 1_288_490_188}

    A process watched under a label of its own is not counted again in its parent's.
    """

    def __init__(self, interval_s: float = 2.0):
        self._interval_s = interval_s
        self._watched: dict[str, Callable[[], int | None]] = {}
        self._labelled: set[int] = set()  # also those no longer watched: they never fall to their parent's label
        self._peaks: dict[str, int] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)

    @contextmanager
    def watch(self, label: str, pid: int | Callable[[], int | None]) -> Iterator[None]:
        """Sample `pid` and its descendants under `label` inside this block, once at its end at the least.

        A callable is asked at every sample: for a process that is restarted (None: it is not running).
        """
        with self._lock:
            self._watched[label] = pid if callable(pid) else lambda: pid
            self._processes()
        try:
            yield
        finally:
            self.sample()
            with self._lock:
                del self._watched[label]

    def sample(self) -> None:
        """Measure everything that is watched now."""
        with self._lock:
            for label, pid in self._processes().items():
                used = tree_private_bytes(pid, without=self._labelled - {pid})
                self._peaks[label] = max(used, self._peaks.get(label, 0))

    def _processes(self) -> dict[str, int]:
        """What runs under each label now."""
        pids = {label: pid for label, ask in self._watched.items() if (pid := ask()) is not None}
        self._labelled.update(pids.values())
        return pids

    def peaks(self) -> dict[str, int]:
        """Largest sample of each label so far, bytes."""
        with self._lock:
            return dict(self._peaks)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.sample()
