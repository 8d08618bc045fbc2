"""Sees that every rank of a job lives, and ends the run where one is silent: stopped, or behind a link that was cut.

A wait in a collective does not tell work that takes long from a rank that is gone without a word, and the ranks wait
for the driver for days. So every rank beats: a thread counts up in the job's store, however long its main thread works
or waits. Rank 0 looks at all counters, the others at rank 0's; one that stands still for `LIMIT` of
`parallel.timeout_s` ends the run, which takes until `timeout_s` at most. Rank 0 says which, and tells the others by its
own counter. Each process then ends from a thread, since its main thread may hang. A rank that is asked to end the run
early (`ending.py`) tells rank 0 the same way.

A call to a store whose host is gone can hang too. So a second thread looks at when the first was last answered.
Only time in which a process runs counts: a job that is stopped as a whole and continued later goes on.

All beats go through rank 0's store: a link that is cut between two other hosts alone is not seen. Nor does a rank beat
while its main thread is in a call that keeps Python's interpreter lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType

import torch.distributed as dist

from megatron_apo.runtime.ending import EndedEarly, request
from megatron_apo.runtime.hosts import store_client
from megatron_apo.runtime.job import Job
from megatron_apo.runtime.signals import RANK_LOST, end_now

LIMIT = 2 / 3  # of parallel.timeout_s; the rest is for beats, for telling the others, and for ending
_BEATS = 30  # in parallel.timeout_s
_LONGEST_INTERVAL_S = 10.0
_LEAVING_INTERVAL_S = 0.05
_UNWIND_LIMIT_S = 30.0  # a rank that has seen another fail has servers to stop, and a reason to tell
_FAILED_LIMIT_S = 1.0  # for a rank that fails to say so
_ASKED = "asked"  # key of whether a rank was asked to end the run
_DONE, _FAILED, _LOST = "done", "failed", "lost "  # what a counter says last


def announce(job: Job, store: dist.Store) -> None:
    """Put this rank's counter into the job's store, before the ranks meet: who reads one waits for nothing."""
    store.set(_key(job.rank), "0")
    if job.rank == 0:
        store.set(_ASKED, "")


class Heartbeat:
    """This rank's beats, within `with`. One that ends well leaves without a word being missed; rank 0, which may hold
    the store, then stays until the others have left."""

    def __init__(self, job: Job, hosts: Sequence[str], timeout_s: float):
        """hosts: the name of each rank's. Every rank has called `announce` before."""
        self._job = job
        self._hosts = hosts
        self._wake = threading.Event()
        self._timeout_s = timeout_s
        self._interval_s = min(timeout_s / _BEATS, _LONGEST_INTERVAL_S)
        self._watched = [rank for rank in range(job.world_size) if rank != job.rank] if job.rank == 0 else [0]
        self._seen: dict[int, str] = {}
        self._answers = 0
        self._last_word = ""
        self._has_passed_on = False  # that the run is asked to end
        self._heard = request.heard_by(self._wake.set)
        self._leaving = False
        self._given = threading.Event()  # the last word is in the store
        self._ended = threading.Event()
        self._all_left = threading.Event()

    def __enter__(self) -> Heartbeat:
        for work in (self._beat, self._watch):
            threading.Thread(target=work, name=f"heartbeat-{work.__name__.strip('_')}", daemon=True).start()
        self._heard.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._heard.__exit__(kind, error, trace)
        self._leaving = True
        self._wake.set()
        ends_well = error is None or isinstance(error, EndedEarly)
        if ends_well and self._job.rank == 0:
            self._all_left.wait()
        self._say(_DONE if ends_well else _FAILED)
        # A word that is lost would be missed: a rank that ends well waits for it as long as others wait for the rank.
        self._given.wait(LIMIT * self._timeout_s if ends_well else _FAILED_LIMIT_S)
        self._ended.set()

    @property
    def _pause_s(self) -> float:
        """Between two beats."""
        return min(self._interval_s, _LEAVING_INTERVAL_S) if self._leaving else self._interval_s

    def _beat(self) -> None:
        client, count = None, 0
        while True:
            self._wake.wait(self._pause_s if count else 0)
            self._wake.clear()
            last = self._last_word
            try:
                client = client or store_client(self._job, self._timeout_s)
                client.set(_key(self._job.rank), last or str(count + 1))
                if self._job.rank and request.why is not None and not self._has_passed_on:
                    client.set(_ASKED, f"{request.left_s} {request.why}")
                    self._has_passed_on = True
                *values, asked = client.multi_get([*map(_key, self._watched), _ASKED])
            except (RuntimeError, OSError):  # the store is gone, for good or for a moment
                client = None
                time.sleep(self._pause_s)
                continue
            if self._job.rank == 0 and asked:
                left_s, _, why = asked.decode().partition(" ")
                request.ask(why, float(left_s))
            self._seen = {rank: value.decode() for rank, value in zip(self._watched, values, strict=True)}
            self._answers += 1
            if all(word in (_DONE, _FAILED) for word in self._seen.values()):
                self._all_left.set()
            count += 1
            if last:
                self._given.set()
                return

    def _watch(self) -> None:
        ages, seen = dict.fromkeys(self._watched, 0.0), dict[int, str]()
        unanswered_s, answers = 0.0, 0
        limit, before = LIMIT * self._timeout_s, time.monotonic()
        while not self._ended.wait(tick := min(self._pause_s / 2, 1.0)):
            now = time.monotonic()
            passed, before = min(now - before, 4 * tick), now
            unanswered_s = 0.0 if self._answers != answers else unanswered_s + passed
            answers, new = self._answers, self._seen
            for rank in self._watched:
                ages[rank] = (
                    0.0 if new.get(rank) in (None, _DONE) or new[rank] != seen.get(rank) else ages[rank] + passed
                )
            seen = new
            if self._job.rank and seen.get(0, "").startswith(_LOST):
                end_now(RANK_LOST, seen[0].removeprefix(_LOST))
            if unanswered_s > limit and seen.get(0) != _DONE:
                self._end_run(self._unanswered(unanswered_s))
            patience = {_FAILED: max(limit, _UNWIND_LIMIT_S)}
            if silent := [rank for rank in self._watched if ages[rank] > patience.get(seen.get(rank, ""), limit)]:
                self._end_run(self._silent(silent, max(ages[rank] for rank in silent)))

    def _unanswered(self, age_s: float) -> str:
        if self._job.rank and not self._job.agent_has_store:
            return self._silent([0], age_s)
        where = f"{self._job.master_address}:{self._job.master_port}"
        return f"error: the job's store at {where} has been silent for {age_s:.1f} s {self._setting()}"

    def _silent(self, ranks: Sequence[int], age_s: float) -> str:
        if failed := [rank for rank in ranks if self._seen.get(rank) == _FAILED]:
            return f"error: {self._names(failed)} ended with an error, {age_s:.1f} s ago {self._setting()}"
        have = "has" if len(ranks) == 1 else "have"
        return f"error: {self._names(ranks)} {have} been silent for {age_s:.1f} s {self._setting()}"

    def _names(self, ranks: Sequence[int]) -> str:
        return ", ".join(f"rank {rank} ({self._hosts[rank]})" for rank in ranks)

    def _setting(self) -> str:
        return f"(parallel.timeout_s={self._timeout_s:g})"

    def _end_run(self, message: str) -> None:
        if self._job.rank == 0:
            self._say(_LOST + message)
            if self._given.wait(self._interval_s):
                time.sleep(2 * self._interval_s)  # the store may end with this process: the others read it before
        end_now(RANK_LOST, message)

    def _say(self, word: str) -> None:
        self._last_word = word
        self._wake.set()


def _key(rank: int) -> str:
    return f"beat/{rank}"
