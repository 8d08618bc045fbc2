"""Grades samples in worker processes that are killed at the time limit, so that no grader can stop a run.

    with RewardPool(recipe.reward, recipe.graders) as pool:
        grades = pool.grade(requests)

A worker gets samples in batches and answers a batch at once, since each answer would take the interpreter from whoever
is at work here. Which sample it is at, and since when, it says in memory shared with the pool: if it hangs or dies,
that sample alone gets the failure reward, and the others go to another worker. Why not a library's pool: those that
kill at a limit import the trainer's main module (torch, Megatron) in each worker, and give up when an idle worker is
killed.
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
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait

from megatron_apo.config import GraderConfig, RewardConfig
from megatron_apo.rewards import Explanation, GradeRequest, reward_target
from megatron_apo.rewards.text import thinking_is_unfinished
from megatron_apo.rewards.worker import Answer, Graded, Progress, Ready, Refused, WorkerSpec
from megatron_apo.runtime.job import without_job

_BATCH_S = 0.1  # what a worker gets should last about so long: it hides a round trip, and enough is left to share out
_LARGEST_BATCH = 256  # samples
_START_LIMIT_S = 120.0  # a reward's imports


UNFINISHED, TRUNCATED = "unfinished thinking", "truncated"


@dataclass(frozen=True)
class Grade:
    """reward: the grader's, or the recipe's failure reward where there is a failure; NaN for a masked response.

    failure: None; of the response, which no grader sees then: "unfinished thinking", or "truncated" by the recipe's
    rule; of the grader: "timeout", "died" or "error: ...". explanation: what was compared, where that was asked for and
    the reward can tell; unexplained: why not, where it failed to.
    """

    reward: float
    failure: str | None = None
    explanation: Explanation | None = None
    unexplained: str = ""

    @property
    def is_graders_failure(self) -> bool:
        return self.failure not in (None, UNFINISHED, TRUNCATED)


@dataclass
class _Sample:
    request: GradeRequest
    grade: Future[Grade] = field(default_factory=Future)
    num_deaths: int = 0  # of workers that were at it


class InlineRewardPool:
    """`config.workers` grader processes that get on whenever `poll` is called. Raises `ValueError` if the reward cannot
    be built.

    `failures` counts samples by kind: timeout, died, error.
    """

    def __init__(
        self,
        config: RewardConfig,
        graders: Sequence[GraderConfig] | None = None,
        stop: socket.socket | None = None,
    ):
        """graders: what `GradeRequest.grader` counts; none: the config's own. stop: a byte from it ends the wait for
        the workers' start."""
        self._config = config
        rewards = tuple((reward_target(one.name), one.options) for one in graders or [config])
        self._spec = WorkerSpec(rewards, int(config.memory_limit_gib * 2**30))
        self.failures: Counter[str] = Counter()
        self._queue: deque[_Sample] = deque()
        self._broken: str | None = None
        self._is_ready = False  # the first worker
        self._workers: list[_Worker] = []
        try:
            self._workers.extend(_Worker(self._spec) for _ in range(config.workers))
            while not self._is_ready:
                if self._poll(waker=stop):
                    raise RuntimeError("the reward pool was closed while it started")
        except _StartError as error:
            self.close()
            raise ValueError(str(error)) from None
        except BaseException:
            self.close()
            raise

    def submit(self, request: GradeRequest, *, masks: bool = False) -> Future[Grade]:
        """Let one sample be graded. From any thread. masks: whether the recipe's reward.truncated=mask is heeded."""
        sample = _Sample(request)
        if (found := self._without_grader(request, masks)) is not None:
            sample.grade.set_result(found)
            return sample.grade
        self._queue.append(sample)
        if self._broken:  # set before the queue is emptied for the last time, so no sample is left waiting
            raise RuntimeError(self._broken)
        return sample.grade

    def poll(self, wait_s: float = 0.0) -> None:
        """Take what the workers have graded and give them what there is, waiting at most `wait_s` for something to do.

        Raises `RuntimeError` when no worker can be started any more.
        """
        if self._broken:
            raise RuntimeError(self._broken)
        try:
            self._poll(wait_s)
        except _StartError as error:
            self.close(str(error))
            raise RuntimeError(str(error)) from None

    def close(self, why: str = "the reward pool is closed") -> None:
        """Kill the workers. Grades still awaited raise `RuntimeError`."""
        self._broken = self._broken or why
        unfinished = [sample for worker in self._workers for sample in worker.batch] + list(self._queue)
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
        self._queue.clear()
        for sample in unfinished:
            sample.grade.set_exception(RuntimeError(self._broken))

    def __enter__(self) -> InlineRewardPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _without_grader(self, request: GradeRequest, masks: bool) -> Grade | None:
        """The grade of a response that no grader is to see."""
        rule = self._config.truncated if request.finish_reason == "length" else "grade"
        if rule == "mask" and masks:
            return Grade(math.nan, TRUNCATED)
        if thinking_is_unfinished(request):
            return Grade(self._config.failure_reward, UNFINISHED)
        return Grade(self._config.failure_reward, TRUNCATED) if rule == "fail" else None

    def _poll(self, wait_s: float = math.inf, waker: socket.socket | None = None) -> bool:
        """As `poll`; a byte from `waker` also ends the wait. Whether there was one."""
        self._hand_out()
        woken = False
        now = time.monotonic()
        wait_s = max(0.0, min(wait_s, *(worker.deadline - now for worker in self._workers)))
        channels: dict[object, _Worker] = {worker.channel: worker for worker in self._workers}
        sources = [worker.channel for worker in self._workers] + ([waker] if waker else [])
        for source in wait(sources, None if wait_s == math.inf else wait_s):
            if isinstance(source, socket.socket):
                woken = bool(source.recv(4096))
            else:
                self._read(channels[source])
        for worker in [worker for worker in self._workers if time.monotonic() > worker.deadline]:
            if worker.is_overdue(self._config.time_limit_s):
                self._replace(worker, "timeout")
        self._hand_out()
        return woken

    def _hand_out(self) -> None:
        for worker in self._workers:
            if worker.ready and not worker.batch and self._queue:
                share = min(worker.most, math.ceil(len(self._queue) / len(self._workers)))
                worker.batch = [self._queue.popleft() for _ in range(share)]
                worker.progress.begin(0)
                worker.deadline = worker.progress.read()[1] + self._config.time_limit_s
                try:
                    worker.channel.send([sample.request for sample in worker.batch])
                except OSError:  # it died between batches: no sample's fault
                    self._queue.extendleft(reversed(worker.batch))
                    worker.batch = []
                    self._replace(worker, "died")

    def _read(self, worker: _Worker) -> None:
        try:
            message = worker.channel.recv()
        except (EOFError, OSError):
            self._replace(worker, "died")
            return
        worker.deadline = math.inf
        if isinstance(message, Graded):
            for sample, answer in zip(worker.batch, message.answers, strict=True):
                sample.grade.set_result(self._grade_of(sample.request, answer))
            worker.batch = []
            is_short = message.seconds < _BATCH_S
            worker.most = min(2 * worker.most, _LARGEST_BATCH) if is_short else max(worker.most // 2, 1)
        elif isinstance(message, Ready):
            worker.ready = self._is_ready = True
        else:
            assert isinstance(message, Refused)
            raise _StartError(message.reason)

    def _grade_of(self, request: GradeRequest, answer: Answer) -> Grade:
        if answer.error is not None:
            return self._failed(request, f"error: {answer.error}")
        return Grade(answer.reward, explanation=answer.explanation)

    def _replace(self, worker: _Worker, failure: str) -> None:
        """Kill a worker, fail the sample it was at, put the rest of its batch back, and start another.

        A sample fails by its second death only: the first may be somebody else's doing (the kernel short of memory).
        One that was late but done before the kill is graded again.
        """
        worker.kill()
        if not worker.ready:
            named = ", ".join(target for target, _ in self._spec.rewards)
            raise _StartError(f"reward.name: {named}: the grader process {_START_FAILURES[failure]}")
        if worker.batch:
            index = worker.progress.read()[0]
            sample = worker.batch[index]
            sample.num_deaths += failure == "died"
            if index == worker.late if failure == "timeout" else sample.num_deaths > 1:
                worker.batch.pop(index)
                sample.grade.set_result(self._failed(sample.request, failure))
        self._queue.extendleft(reversed(worker.batch))
        self._workers[self._workers.index(worker)] = _Worker(self._spec)

    def _failed(self, request: GradeRequest, failure: str) -> Grade:
        if request.is_explained:  # no grade is lost by it
            return Grade(math.nan, unexplained=f"explain: {failure.removeprefix('error: ')}")
        self.failures[failure.partition(":")[0]] += 1
        return Grade(self._config.failure_reward, failure)


class RewardPool(AbstractContextManager["RewardPool"]):
    """An `InlineRewardPool` with a thread of its own, for who waits for something else meanwhile."""

    def __init__(self, config: RewardConfig, graders: Sequence[GraderConfig] | None = None):
        self._config, self._graders = config, graders
        self._waker, self._wakened = socket.socketpair()
        self._waker.setblocking(False)
        self._closing = False
        self._started: Future[InlineRewardPool] = Future()
        # The workers live as long as the thread that started them (PDEATHSIG), so one thread starts them all.
        self._thread = threading.Thread(target=self._run, name="reward-pool", daemon=True)
        self._thread.start()
        try:
            self._pool = self._started.result()
        except BaseException:
            self.close()
            raise

    @property
    def failures(self) -> Counter[str]:
        return self._pool.failures

    def submit(self, request: GradeRequest, *, masks: bool = False) -> Future[Grade]:
        """Grade one sample in the background; masks: see `InlineRewardPool.submit`."""
        grade = self._pool.submit(request, masks=masks)
        self._wake()
        return grade

    def grade(self, requests: Sequence[GradeRequest]) -> list[Grade]:
        """Grade samples, in order."""
        grades = [self._pool.submit(request) for request in requests]
        self._wake()
        return [grade.result() for grade in grades]

    def explain(self, requests: Sequence[GradeRequest], grades: Sequence[Grade]) -> list[Grade]:
        """The same grades with what their graders compared. It is asked for afterwards, under a time limit of its own,
        so that no grade is changed or lost by it, and not where there is a failure."""
        places = [place for place, grade in enumerate(grades) if grade.failure is None]
        explained = list(grades)
        told = self.grade([replace(requests[place], is_explained=True) for place in places])
        for place, one in zip(places, told, strict=True):
            explained[place] = replace(grades[place], explanation=one.explanation, unexplained=one.unexplained)
        return explained

    def close(self) -> None:
        """Kill the workers. Grades still awaited raise `RuntimeError`."""
        if self._closing:
            return
        self._closing = True
        self._wake()
        self._thread.join()
        self._waker.close()
        self._wakened.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _wake(self) -> None:
        try:
            self._waker.send(b"!")
        except BlockingIOError:
            pass  # wakes enough are waiting to be read

    def _run(self) -> None:
        """The thread."""
        try:
            pool = InlineRewardPool(self._config, self._graders, stop=self._wakened)
        except BaseException as error:
            self._started.set_exception(error)
            return
        self._started.set_result(pool)
        why = "the reward pool failed"
        try:
            while not self._closing:
                pool._poll(waker=self._wakened)
            why = "the reward pool is closed"
        except _StartError as error:
            why = str(error)
        finally:
            pool.close(why)


_START_FAILURES = {"died": "died while it started", "timeout": f"was not ready after {_START_LIMIT_S:.0f} s"}


class _StartError(Exception):
    """A worker that cannot start: the pool is of no use."""


class _Worker:
    """One grader process.

    batch: samples it is at, at most `most` at a time, in the order in which it grades them; deadline: when to see
    whether it is at one for too long; late: the one it was at then.
    """

    def __init__(self, spec: WorkerSpec):
        ours, theirs = socket.socketpair()
        with theirs, Progress.shared() as (self.progress, progress_fd):
            self._process = subprocess.Popen(
                # -P and PYTHONPATH: exactly this process's import path, so that a user's reward is found as it is here.
                [sys.executable, "-P", "-m", "megatron_apo.rewards.worker"]
                + [str(theirs.fileno()), str(progress_fd), str(os.getpid())],
                env=without_job(
                    os.environ
                )  # a reward is a user's code: it is no rank, and has no business with the secret
                | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), progress_fd],
                process_group=0,  # Ctrl-C is the trainer's to handle, and what a grader starts dies with it
            )
        self.channel = Connection(ours.detach())
        self.channel.send(spec)
        self.ready = False
        self.batch: list[_Sample] = []
        self.most, self.late = 1, -1
        self.deadline = time.monotonic() + _START_LIMIT_S

    def is_overdue(self, time_limit_s: float) -> bool:
        """At one sample for longer than the limit, or not ready in time. Where not, the deadline is moved."""
        if self.channel.poll():  # an answer that came in time but was not read yet counts
            return False
        if self.ready:
            self.late, since = self.progress.read()
            self.deadline = since + time_limit_s
        return time.monotonic() > self.deadline

    def kill(self) -> None:
        self.channel.close()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
