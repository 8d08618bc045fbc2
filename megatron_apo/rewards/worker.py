"""A grader process, started and killed by `pool.py`. It reads batches of requests and answers each request by itself.

    python -m megatron_apo.rewards.worker SOCKET_FD PARENT_PID

A fresh interpreter rather than a fork or a spawn of the trainer: it inherits no thread, no lock and no main module.
"""

from __future__ import annotations

import math
import numbers
import os
import resource
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from megatron_apo import guard
from megatron_apo.rewards import GradeRequest, Reward, get_reward


@dataclass(frozen=True)
class WorkerSpec:
    """The pool's first message: what to grade with."""

    reward: str  # module:attribute
    options: dict[str, Any]
    memory_limit_bytes: int


@dataclass(frozen=True)
class Ready:
    """The worker's first message."""

    name: str
    version: str


@dataclass(frozen=True)
class Refused:
    """The worker's first message when the recipe's reward cannot be built."""

    reason: str


@dataclass(frozen=True)
class Answer:
    """One request graded; `error` says why there is no reward."""

    reward: float
    error: str | None = None


def main() -> None:
    socket_fd, parent_pid = int(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Die with the pool even where a grader never returns to Python and the parent was killed outright.
    guard.LIBC.prctl(guard.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        return
    with Connection(socket_fd) as channel:
        try:
            _serve(channel)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass  # the pool is gone


def _serve(channel: Connection) -> None:
    spec: WorkerSpec = channel.recv()
    resource.setrlimit(resource.RLIMIT_AS, (spec.memory_limit_bytes, spec.memory_limit_bytes))
    try:
        reward = get_reward(spec.reward, spec.options)
    except Exception as error:  # the user's module may raise anything; the pool reports it
        known = isinstance(error, ValueError) and str(error).startswith("reward.")
        channel.send(Refused(str(error) if known else f"reward.name: {spec.reward}: {_describe(error)}"))
        return
    channel.send(Ready(reward.name, reward.version))
    while True:
        for request in channel.recv():
            channel.send(_grade(reward, request))


def _grade(reward: Reward, request: GradeRequest) -> Answer:
    try:
        value = reward(request)
    except (Exception, SystemExit) as error:  # whatever a grader raises fails its own sample only
        return Answer(math.nan, _describe(error))
    if not isinstance(value, numbers.Real):
        return Answer(math.nan, f"returned a {type(value).__name__}, not a number")
    if not math.isfinite(value):
        return Answer(math.nan, f"returned {float(value)}")
    return Answer(float(value))


def _describe(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


if __name__ == "__main__":
    # As an imported module, so that the messages' classes are the ones the pool knows.
    from megatron_apo.rewards import worker

    worker.main()
