"""Which worker samples which shard, settled by files in the store's folder: no server, no locks.

    STORE/claims/shard-00003.0     made with O_EXCL by the worker that took shard 3; it touches the file while it lives
    STORE/claims/shard-00003.1     made the same way by one that found claim 0 expired: the highest number counts

Exclusive creation is atomic on local and on network file systems, and no claim is removed or renamed while the job
lasts, so two workers that find the same claim expired cannot both take it over. A claim has expired when its file was
not touched for `expires_s` by the file system's own clock (clocks of hosts differ), or at once when its process was on
this host and is gone. A worker whose loop hangs stops touching. Should one come back from the dead (a suspended node)
both write the same shard; samples are functions of their seeds, and the first shard written stays.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

_BEATS = 5  # touches within the time that a claim lasts


@dataclass(frozen=True)
class _Owner:
    """A process, told apart from a later one of the same number, and from one of another container."""

    host: str
    pid: int
    started: int | None

    @classmethod
    def this(cls) -> _Owner:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        host = f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
        return cls(host, os.getpid(), _started(os.getpid()))

    def is_known_dead(self, here: str) -> bool:
        return self.host == here and _started(self.pid) != self.started


class Claims:
    """Claims of one worker on the shards of `store`. Use as a context manager: it keeps its claims alive meanwhile.

    written: the shards that need no work. hangs_s: how long the worker may go without a sign of life (`alive`) before
    its claims are left to expire. first: where it begins to look, so that workers meet seldom.
    """

    def __init__(
        self,
        store: Path,
        num_shards: int,
        written: Callable[[], set[int]],
        expires_s: float,
        hangs_s: float,
        first: int = 0,
    ):
        self._folder = store / "claims"
        self._order = [(first + i) % num_shards for i in range(num_shards)]
        self._written, self._expires_s, self._hangs_s = written, expires_s, hangs_s
        self._me = _Owner.this()
        self._mine: dict[int, Path] = {}
        self._end = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        self._folder.mkdir(parents=True, exist_ok=True)
        self.alive()
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._heart.join()

    def take(self) -> int | None:
        """A shard for this worker to sample, or None: all others are finished or with workers that live."""
        self.alive()
        newest, done = self._newest(), self._written() | self._mine.keys()
        for index in self._order:
            if index in done:
                continue
            number = newest.get(index, -1)
            if (
                (number < 0 or self._has_expired(self._path(index, number)))
                and self._make(index, number + 1)
                and index not in self._written()  # its owner may have written it after the first look, and ended
            ):
                return index
        return None

    def alive(self) -> None:
        """This worker gets on."""
        self._alive_at = time.monotonic()

    def remove(self) -> None:
        """Forget all claims, when every shard is finished."""
        for path in self._folder.glob("*"):
            path.unlink(missing_ok=True)
        try:
            self._folder.rmdir()
        except OSError:
            pass  # another worker has just asked for the time

    def _path(self, index: int, number: int) -> Path:
        return self._folder / f"shard-{index:05d}.{number}"

    def _newest(self) -> dict[int, int]:
        """The highest claim on each shard that has one."""
        newest: dict[int, int] = {}
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:  # the job is finished
            names = []
        for name in names:
            stem, _, number = name.partition(".")
            if stem.startswith("shard-"):
                index = int(stem.removeprefix("shard-"))
                newest[index] = max(newest.get(index, -1), int(number))
        return newest

    def _make(self, index: int, number: int) -> bool:
        path = self._path(index, number)
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except (FileExistsError, FileNotFoundError):  # the latter: the job is finished, whatever an old listing says
            return False
        with os.fdopen(file, "w") as claim:
            json.dump(asdict(self._me), claim)
        self._mine[index] = path
        return True

    def _has_expired(self, path: Path) -> bool:
        try:
            owner = _read_owner(path)
            if owner is not None and owner.is_known_dead(self._me.host):
                return True
            return self._now() - path.stat().st_mtime > self._expires_s
        except FileNotFoundError:  # the job is finished
            return False

    def _now(self) -> float:
        """The file system's time, seconds."""
        clock = self._folder / f"clock-{self._me.pid}-{threading.get_ident()}"
        clock.touch()
        try:
            os.utime(clock)
            return clock.stat().st_mtime
        finally:
            clock.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._end.wait(self._expires_s / _BEATS):
            if time.monotonic() - self._alive_at > self._hangs_s:
                continue
            for path in list(self._mine.values()):
                try:
                    os.utime(path)
                except OSError:
                    continue  # removed at the end of the job, or the file system is away: the next beat tries again


def _started(pid: int) -> int | None:
    """When a process started, in ticks since the boot, which no clock's step changes; None: it is gone or a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else int(fields[18])  # proc(5)'s field 22


def _read_owner(path: Path) -> _Owner | None:
    """None: its maker has not written it yet, or died before it could."""
    try:
        return _Owner(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        return None
