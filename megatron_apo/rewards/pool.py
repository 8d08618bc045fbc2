"""Grades samples in worker processes that are killed at the time limit, so that no grader can stop a run.

    with RewardPool(recipe.reward) as pool:
        grades = pool.grade(requests)

A worker gets samples in batches and answers them one by one, so the first one unanswered is the one that hung or died:
it alone gets the failure reward, and the rest of its batch goes to another worker. Why not a library's pool: those
that kill at a limit import the trainer's main module (torch, Megatron) in each worker, and give up when an idle worker
is killed.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import TracebackType

from megatron_apo.config import RewardConfig
from megatron_apo.rewards import GradeRequest, reward_target
from megatron_apo.rewards.text import thinking_is_unfinished
from megatron_apo.rewards.worker import Answer, Ready, Refused, WorkerSpec

_BATCH_SIZE = 16  # enough to hide a round trip, few enough to share out
_START_LIMIT_S = 120.0  # a reward's imports


UNFINISHED, TRUNCATED = "unfinished thinking", "truncated"


@dataclass(frozen=True)
class Grade:
    """reward: the grader's, or the recipe's failure reward where there is a failure.

    failure: None; of the response, which no grader sees then: "unfinished thinking", or "truncated" by the recipe's
    rule; of the grader: "timeout", "died" or "error: ...".
    """

    reward: float
    failure: str | None = None

    @property
    def is_graders_failure(self) -> bool:
        return self.failure not in (None, UNFINISHED, TRUNCATED)


@dataclass
class _Sample:
    request: GradeRequest
    grade: Future[Grade] = field(default_factory=Future)
    num_deaths: int = 0  # of workers that were at it


class RewardPool:
    """`config.workers` grader processes. Raises `ValueError` if the reward cannot be built.

    `reward_name` and `reward_version` are the reward's own. `failures` counts samples by kind: timeout, died, error.
    """

    def __init__(self, config: RewardConfig):
        self._config = config
        self._spec = WorkerSpec(reward_target(config.name), config.options, int(config.memory_limit_gib * 2**30))
        self.failures: Counter[str] = Counter()
        self._queue: deque[_Sample] = deque()
        self._waker, self._wakened = socket.socketpair()
        self._waker.setblocking(False)
        self._closing = False
        self._broken: str | None = None
        self._identity: Future[Ready] = Future()
        # The workers live as long as the thread that started them (PDEATHSIG), so one thread starts them all.
        self._thread = threading.Thread(target=self._run, name="reward-pool", daemon=True)
        self._thread.start()
        try:
            ready = self._identity.result()
        except BaseException:
            self.close()
            raise
        self.reward_name, self.reward_version = ready.name, ready.version

    def submit(self, request: GradeRequest) -> Future[Grade]:
        """Grade one sample in the background."""
        sample = self._enqueue(request)
        self._wake()
        return sample.grade

    def grade(self, requests: Sequence[GradeRequest]) -> list[Grade]:
        """Grade samples, in order."""
        samples = [self._enqueue(request) for request in requests]
        self._wake()
        return [sample.grade.result() for sample in samples]

    def close(self) -> None:
        """Kill the workers. Grades still awaited raise `RuntimeError`."""
        self._closing = True
        self._wake()
        self._thread.join()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _enqueue(self, request: GradeRequest) -> _Sample:
        sample = _Sample(request)
        if (failure := self._response_failure(request)) is not None:
            sample.grade.set_result(Grade(self._config.failure_reward, failure))
            return sample
        self._queue.append(sample)
        if self._broken:  # set before the thread empties the queue for the last time, so no sample is left waiting
            raise RuntimeError(self._broken)
        return sample

    def _response_failure(self, request: GradeRequest) -> str | None:
        if thinking_is_unfinished(request.prompt, request.response):
            return UNFINISHED
        return TRUNCATED if self._config.truncated == "fail" and request.finish_reason == "length" else None

    def _wake(self) -> None:
        try:
            self._waker.send(b"!")
        except BlockingIOError:
            pass  # wakes enough are waiting to be read
        except OSError:
            assert self._broken, "the pool's thread closes its socket last"

    def _run(self) -> None:
        """The pool's thread."""
        workers: list[_Worker] = []
        try:
            workers.extend(_Worker(self._spec) for _ in range(self._config.workers))
            while not self._closing:
                self._hand_out(workers)
                now = time.monotonic()
                limit_s = min((worker.deadline for worker in workers), default=math.inf) - now
                channels: dict[object, _Worker] = {worker.channel: worker for worker in workers}
                for source in wait(
                    [self._wakened, *(worker.channel for worker in workers)],
                    None if limit_s == math.inf else max(0.0, limit_s),
                ):
                    if source is self._wakened:
                        self._wakened.recv(4096)
                    else:
                        self._read(channels[source], workers)
                for worker in [worker for worker in workers if time.monotonic() > worker.deadline]:
                    if not worker.channel.poll():  # an answer that came in time but was not read yet counts
                        self._replace(worker, workers, "timeout")
            self._broken = "the reward pool is closed"
        except _StartError as error:
            self._broken = str(error)
            if not self._identity.done():
                self._identity.set_exception(ValueError(self._broken))
        finally:
            self._broken = self._broken or "the reward pool failed"
            unfinished = [sample for worker in workers for sample in worker.batch] + list(self._queue)
            for worker in workers:
                worker.kill()
            for sample in unfinished:
                sample.grade.set_exception(RuntimeError(self._broken))
            if not self._identity.done():
                self._identity.set_exception(RuntimeError(self._broken))
            self._waker.close()
            self._wakened.close()

    def _hand_out(self, workers: list[_Worker]) -> None:
        for worker in workers:
            if worker.ready and not worker.batch and self._queue:
                share = min(_BATCH_SIZE, math.ceil(len(self._queue) / len(workers)))
                batch = [self._queue.popleft() for _ in range(share)]
                worker.batch.extend(batch)
                worker.deadline = time.monotonic() + self._config.time_limit_s
                try:
                    worker.channel.send([sample.request for sample in batch])
                except OSError:  # it died between batches: no sample's fault
                    self._queue.extendleft(reversed(batch))
                    worker.batch.clear()
                    self._replace(worker, workers, "died")

    def _read(self, worker: _Worker, workers: list[_Worker]) -> None:
        try:
            message = worker.channel.recv()
        except (EOFError, OSError):
            self._replace(worker, workers, "died")
            return
        if isinstance(message, Answer):
            grade = Grade(message.reward) if message.error is None else self._failed(f"error: {message.error}")
            worker.batch.popleft().grade.set_result(grade)
            worker.deadline = time.monotonic() + self._config.time_limit_s if worker.batch else math.inf
        elif isinstance(message, Ready):
            worker.ready, worker.deadline = True, math.inf
            if not self._identity.done():
                self._identity.set_result(message)
        else:
            assert isinstance(message, Refused)
            raise _StartError(message.reason)

    def _replace(self, worker: _Worker, workers: list[_Worker], failure: str) -> None:
        """Kill a worker, fail the sample it was at, put the rest of its batch back, and start another.

        A sample fails by its second death only: the first may be somebody else's doing (the kernel short of memory).
        """
        worker.kill()
        if not worker.ready:
            raise _StartError(f"reward.name: {self._spec.reward}: the grader process {_START_FAILURES[failure]}")
        if worker.batch:
            sample = worker.batch[0]
            sample.num_deaths += failure == "died"
            if failure != "died" or sample.num_deaths > 1:
                worker.batch.popleft().grade.set_result(self._failed(failure))
        self._queue.extendleft(reversed(worker.batch))
        workers[workers.index(worker)] = _Worker(self._spec)

    def _failed(self, failure: str) -> Grade:
        self.failures[failure.partition(":")[0]] += 1
        return Grade(self._config.failure_reward, failure)


_START_FAILURES = {"died": "died while it started", "timeout": f"was not ready after {_START_LIMIT_S:.0f} s"}


class _StartError(Exception):
    """A worker that cannot start: the pool is of no use."""


class _Worker:
    """One grader process. `batch`: samples it has not answered, in order; `deadline`: when its next message is due."""

    def __init__(self, spec: WorkerSpec):
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # -P and PYTHONPATH: exactly this process's import path, so that a user's reward is found as it is here.
                [sys.executable, "-P", "-m", "megatron_apo.rewards.worker", str(theirs.fileno()), str(os.getpid())],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C is the trainer's to handle, and what a grader starts dies with it
            )
        self.channel = Connection(ours.detach())
        self.channel.send(spec)
        self.ready = False
        self.batch: deque[_Sample] = deque()
        self.deadline = time.monotonic() + _START_LIMIT_S

    def kill(self) -> None:
        self.channel.close()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
