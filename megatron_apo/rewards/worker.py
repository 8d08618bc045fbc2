"""A grader process, started and killed by `pool.py`. It reads batches of requests and answers each batch.

    python -m megatron_apo.rewards.worker SOCKET_FD PROGRESS_FD PARENT_PID

A fresh interpreter rather than a fork or a spawn of the trainer: it inherits no thread, no lock and no main module.
"""

from __future__ import annotations

import math
import mmap
import numbers
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from megatron_apo.rewards import Explains, Explanation, GradeRequest, Reward, describe, get_reward
from megatron_apo.runtime import guard

_PROGRESS = struct.Struct("@Qd")  # native: each is written at once


@dataclass(frozen=True)
class WorkerSpec:
    """The pool's first message: what to grade with."""

    rewards: tuple[tuple[str, dict[str, Any]], ...]  # module:attribute and options of each
    memory_limit_bytes: int


@dataclass(frozen=True)
class Ready:
    """The worker's first message."""


@dataclass(frozen=True)
class Refused:
    """The worker's first message when the recipe's reward cannot be built."""

    reason: str


@dataclass(frozen=True)
class Answer:
    """One request graded, or explained in place of it if the reward can; `error` says why not."""

    reward: float
    error: str | None = None
    explanation: Explanation | None = None


@dataclass(frozen=True)
class Graded:
    """A batch graded, in order, and what it took."""

    answers: list[Answer]
    seconds: float


class Progress:
    """Which request of its batch a worker is at, and since when: 16 bytes that it shares with the pool."""

    def __init__(self, fd: int):
        self._memory = mmap.mmap(fd, _PROGRESS.size)

    @classmethod
    @contextmanager
    def shared(cls) -> Iterator[tuple[Progress, int]]:
        """A new one, and within the block a file descriptor by which a child process gets at it."""
        fd = os.memfd_create("progress")
        try:
            os.ftruncate(fd, _PROGRESS.size)
            yield cls(fd), fd
        finally:
            os.close(fd)

    def begin(self, index: int) -> None:
        _PROGRESS.pack_into(self._memory, 0, index, time.monotonic())

    def read(self) -> tuple[int, float]:
        """(index, time by the monotonic clock, which all processes of a machine share)."""
        return _PROGRESS.unpack_from(self._memory)


def main() -> None:
    socket_fd, progress_fd, parent_pid = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Die with the pool even where a grader never returns to Python and the parent was killed outright.
    guard.LIBC.prctl(guard.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        return
    with Connection(socket_fd) as channel:
        try:
            _serve(channel, Progress(progress_fd))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass  # the pool is gone


def _serve(channel: Connection, progress: Progress) -> None:
    spec: WorkerSpec = channel.recv()
    resource.setrlimit(resource.RLIMIT_AS, (spec.memory_limit_bytes, spec.memory_limit_bytes))
    try:
        rewards = [get_reward(reward, options) for reward, options in spec.rewards]
    except ValueError as error:
        channel.send(Refused(str(error)))
        return
    channel.send(Ready())
    while True:
        requests, start = channel.recv(), time.monotonic()
        answers = []
        for index, request in enumerate(requests):
            progress.begin(index)
            answers.append((_explain if request.is_explained else _grade)(rewards[request.grader], request))
        channel.send(Graded(answers, time.monotonic() - start))


def _grade(reward: Reward, request: GradeRequest) -> Answer:
    try:
        value = reward(request)
    except (Exception, SystemExit) as error:  # whatever a grader raises fails its own sample only
        return Answer(math.nan, describe(error))
    if not isinstance(value, numbers.Real):
        return Answer(math.nan, f"returned a {type(value).__name__}, not a number")
    if not math.isfinite(value):
        return Answer(math.nan, f"returned {float(value)}")
    return Answer(float(value))


def _explain(reward: Reward, request: GradeRequest) -> Answer:
    """Made anew of what a user's code gave, so that the pool can read it and anyone write it into a file."""
    if not isinstance(reward, Explains):
        return Answer(math.nan)
    try:
        found = reward.explain(request)
        if not isinstance(found, Explanation):
            return Answer(math.nan, f"returned a {type(found).__name__}, not an Explanation")
        told = {"reference": found.reference, "answer": found.answer, "why": found.why}
        for name, text in told.items():
            if not isinstance(text, str):
                return Answer(math.nan, f"returned an Explanation whose {name} is no str")
        texts = {name: text.encode(errors="replace").decode() for name, text in told.items()}
        return Answer(math.nan, explanation=Explanation(float(found.reward), **texts))
    except (Exception, SystemExit) as error:
        return Answer(math.nan, describe(error))


if __name__ == "__main__":
    # As an imported module, so that the messages' classes are the ones the pool knows.
    from megatron_apo.rewards import worker

    worker.main()
