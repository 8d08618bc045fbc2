"""Fills stores with graded samples of prompts, shard by shard, as one of several workers: stage 1, and evaluations.

Any number of workers fill the stores of one job, now or later: each takes the next free shard while it still samples
the last (`values/claims.py`), so its engine never runs dry. What a killed one left is sampled again from the same
seeds: a sample depends on its prompt, its number and the store's fingerprint alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rich.progress import Progress

from megatron_apo.config import AdaptiveConfig, Recipe
from megatron_apo.data.order import sample_seed
from megatron_apo.data.prompts import Prompt
from megatron_apo.rewards.pool import UNFINISHED, Grade, InlineRewardPool
from megatron_apo.rollout.client import Sampling
from megatron_apo.rollout.inputs import Inputs
from megatron_apo.rollout.offline import OfflineEngine, Sample
from megatron_apo.rollout.server import device_name
from megatron_apo.rollout.stored_prompts import check_prompts, check_shard
from megatron_apo.runtime.ending import EndedEarly, request
from megatron_apo.runtime.garbage import garbage_collection_frozen
from megatron_apo.runtime.job import log_path
from megatron_apo.values.claims import Claims
from megatron_apo.values.sampling import more_samples
from megatron_apo.values.shards import shard_name
from megatron_apo.values.store import StoreRow, StoreWriter, VStarStore

_WAIT_S = 2.0  # between looks at what other workers do


@dataclass(frozen=True)
class Worker:
    """Worker `index` (from 0) of `count`. The numbers only spread workers over the shards and name their logs."""

    index: int = 0
    count: int = 1

    @property
    def suffix(self) -> str:
        return f"-{self.index}" if self.count > 1 else ""


@dataclass(frozen=True)
class Filling:
    """A store that is being filled. Its fingerprint says how many samples a prompt gets, and with which seeds."""

    writer: StoreWriter
    prompts: Sequence[Prompt]
    prompts_per_shard: int
    sampling: Sampling
    adaptive: AdaptiveConfig | None = None
    keep_responses: bool = False

    def of_shard(self, index: int) -> Sequence[Prompt]:
        return self.prompts[index * self.prompts_per_shard : (index + 1) * self.prompts_per_shard]

    def seed(self, prompt: Prompt) -> int:
        """Of its sample 0."""
        fingerprint = self.writer.fingerprint
        return sample_seed(fingerprint.seed, fingerprint.purpose, 0, prompt.prompt_id)

    def more_samples(self, rewards: Sequence[float]) -> int:
        """How many further samples a prompt with these rewards (NaN: masked) needs."""
        return more_samples(rewards, self.writer.fingerprint.samples_per_prompt, self.adaptive)

    def check_written(self) -> None:
        """Raise `StoreError` for a shard whose prompts were rendered otherwise: a store must not mix the two."""
        for index in sorted(self.writer.written()):
            check_shard(self.writer.folder / shard_name(index), self.writer.fingerprint, self.of_shard(index))

    def finish(self) -> VStarStore:
        """The store, closed, with the prompts that it was to have, each and no others. Raises `StoreError`."""
        store = self.writer.finish()
        check_prompts(store, self.prompts)
        return store


@dataclass(frozen=True)
class SamplingJob:
    """Stores that workers fill together from one engine each. A shard's number counts through all stores.

    model: whose samples they are. folder: what workers share. prefix_caching: of the engines. title: of the bar.
    """

    recipe: Recipe
    inputs: Inputs
    model: Path
    folder: Path
    stores: tuple[Filling, ...]
    prefix_caching: bool
    title: str

    def checked(self) -> SamplingJob:
        """The job, whose prompts are those of what is written already. Raises `StoreError`."""
        for one in self.stores:
            one.check_written()
        return self

    @property
    def num_shards(self) -> int:
        return sum(one.writer.num_shards for one in self.stores)

    @property
    def num_prompts(self) -> int:
        """Counted anew in each store."""
        return sum(len(one.prompts) for one in self.stores)

    def place(self, index: int) -> tuple[Filling, int]:
        """The store of shard `index`, and its number there."""
        for one in self.stores:
            if index < one.writer.num_shards:
                return one, index
            index -= one.writer.num_shards
        raise IndexError(index)

    def prompts(self, index: int) -> Sequence[Prompt]:
        """The prompts of shard `index`."""
        one, local = self.place(index)
        return one.of_shard(local)

    def written(self) -> set[int]:
        """Numbers of the shards that are there."""
        found, first = set(), 0
        for one in self.stores:
            found |= {first + index for index in one.writer.written()}
            first += one.writer.num_shards
        return found

    def claims(self, worker: Worker) -> Claims:
        """To be entered by who samples."""
        first = worker.index * self.num_shards // worker.count
        expires_s, hangs_s = self.recipe.vstar.claim_expires_s, self.recipe.rollout.start_timeout_s
        return Claims(self.folder, self.num_shards, self.written, expires_s, hangs_s, first)

    def fair_share(self, worker: Worker) -> int:
        """Samples that a worker has of all, where each has as many."""
        num_samples = sum(len(one.prompts) * one.writer.fingerprint.samples_per_prompt for one in self.stores)
        return -(-num_samples // worker.count)


class SamplingEngine(Protocol):
    """`OfflineEngine`, or the servers of a training (`served.py`)."""

    num_samples_open: int

    def add(
        self, key: Hashable, token_ids: Sequence[int], sampling: Sampling, *, num_samples: int, seed: int
    ) -> None: ...
    def step(self) -> list[tuple[Hashable, list[Sample]]]: ...


def offline_engine(job: SamplingJob, log_name: str) -> OfflineEngine:
    """One in this process."""
    recipe = job.recipe
    return OfflineEngine(
        job.model,
        recipe.rollout,
        seed=job.stores[0].writer.fingerprint.seed,
        max_sequence_tokens=recipe.max_sequence_tokens,
        prefix_caching=job.prefix_caching,
        log_path=log_path(recipe.run.dir, f"{log_name}.log"),
    )


def fill(job: SamplingJob, worker: Worker, claims: Claims, start_engine: Callable[[], SamplingEngine]) -> None:
    """Start an engine, if there is anything to sample, and work until every shard is written, by whomever."""
    if (shards := job.num_shards) < worker.count and worker.index == 0:
        key = job.stores[0].writer.fingerprint.words.prompts_per_shard
        print(
            f"{key}: {job.stores[0].prompts_per_shard} makes {shards} shards, so that {worker.count - shards} of "
            f"{worker.count} workers have nothing to do; a new store could have smaller ones"
        )
    recipe = job.recipe
    index = _wait_for_shard(job, claims)
    if index is None:
        return
    for one in job.stores:
        one.writer.reopen()
    start = time.monotonic()
    progress = Progress(disable=not recipe.telemetry.progress)
    with InlineRewardPool(recipe.reward, recipe.graders) as pool, progress:
        sample_all(job, Sampler(job, worker, start_engine(), pool, start), claims, index, progress)


def sample_all(job: SamplingJob, sampler: Sampler, claims: Claims, index: int | None, progress: Progress) -> None:
    """Sample shards, `index` first, until all are written, by this worker or by others. Raises EndedEarly in a run that
    was asked to end."""
    bar = progress.add_task(job.title, total=job.num_prompts)
    while index is not None:
        sampler.open(index)
        ask_again = 0.0
        with garbage_collection_frozen():
            while sampler.is_busy:
                _end_if_asked()
                if sampler.wants_more and time.monotonic() >= ask_again:
                    if (following := claims.take()) is not None:
                        sampler.open(following)
                    else:
                        ask_again = time.monotonic() + _WAIT_S
                sampler.advance()
                claims.alive()
                progress.update(bar, completed=sampler.num_done)
        index = _wait_for_shard(job, claims)


def _wait_for_shard(job: SamplingJob, claims: Claims) -> int | None:
    """A shard to sample; None when all are written. Waits while the rest is with others, one of whom may die."""
    is_told = False
    while (index := claims.take()) is None:
        _end_if_asked()
        num_missing = job.num_shards - len(job.written())
        if not num_missing:
            return None
        if not is_told:
            print(f"waiting for {num_missing} shards that other workers are at", flush=True)
            is_told = True
        time.sleep(_WAIT_S)
    return index


def _end_if_asked() -> None:
    if request.why is not None:
        raise EndedEarly(f"ended early in stage 1, whose written shards are kept ({request.why})")


@dataclass(eq=False)
class _Open:
    """A prompt that is being sampled or graded."""

    prompt: Prompt
    shard: int
    store: Filling
    lengths: list[int] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    responses: list[list[int]] = field(default_factory=list)  # if they are kept
    grades: list[Future[Grade]] = field(default_factory=list)
    num_ungraded: int = 0


class Sampler:
    """Samples and grades shards, several at a time; writes each when its last prompt is done.

    since: the time from which on the first shard is charged.
    """

    def __init__(self, job: SamplingJob, worker: Worker, engine: SamplingEngine, pool: InlineRewardPool, since: float):
        self._job, self._engine, self._pool, self._since = job, engine, pool, since
        # No more than its share where all is less than what engines hold: the others would have nothing to do.
        self._enough = min(2 * job.recipe.rollout.max_num_seqs, job.fair_share(worker))
        self._shards: dict[int, list[_Open]] = {}
        self._num_ungraded = 0
        self._graded: deque[_Open] = deque()  # once for each grade
        self._unfinished: dict[int, int] = {}  # prompts of each open shard
        self._device = device_name()
        self._own: set[int] = set()
        self._num_own_done = self._num_done_elsewhere = 0

    @property
    def is_busy(self) -> bool:
        return bool(self._shards)

    @property
    def num_done(self) -> int:
        """Prompts that are done, by this worker or, when last looked, in shards of others."""
        return self._num_own_done + self._num_done_elsewhere

    @property
    def wants_more(self) -> bool:
        """Fewer samples are open than would keep the engine full to the end of the shards it has, and the graders keep
        up: with slow ones, the engine would run away with all shards and finish none."""
        return self._engine.num_samples_open < self._enough and self._num_ungraded < self._enough

    def open(self, index: int) -> None:
        """Begin shard `index`."""
        assert index not in self._own, f"shard {index} is begun already"
        if self._own and not self._shards:
            self._since = time.monotonic()  # it only waited for others
        store, _ = self._job.place(index)
        prompts = [_Open(prompt, index, store) for prompt in self._job.prompts(index)]
        self._shards[index], self._unfinished[index] = prompts, len(prompts)
        self._own.add(index)
        others = self._job.written() - self._own
        self._num_done_elsewhere = sum(len(self._job.prompts(other)) for other in others)
        for one in prompts:
            self._continue(one)

    def advance(self) -> None:
        """One forward pass, and what came back from the graders; without anything to sample, wait for them."""
        if self._engine.num_samples_open:
            for one, samples in self._engine.step():
                self._grade(one, samples)
        # In this thread: another one would take the interpreter from the engine, again and again.
        self._pool.poll(wait_s=0.0 if self._engine.num_samples_open or self._graded else _WAIT_S)
        while self._graded:
            one = self._graded.popleft()
            self._num_ungraded -= 1
            one.num_ungraded -= 1
            if not one.num_ungraded:
                self._continue(one)

    def _grade(self, one: _Open, samples: list[Sample]) -> None:
        self._num_ungraded += len(samples)
        one.num_ungraded += len(samples)
        for sample in samples:
            one.lengths.append(len(sample.token_ids))
            one.finish_reasons.append(sample.finish_reason)
            if one.store.keep_responses:
                one.responses.append(sample.token_ids)
            grade = self._submit(one, sample)
            one.grades.append(grade)
            grade.add_done_callback(lambda _: self._graded.append(one))

    def _submit(self, one: _Open, sample: Sample) -> Future[Grade]:
        request = self._job.inputs.grade_request(one.prompt, sample.token_ids, sample.finish_reason)
        return self._pool.submit(request, masks=one.store.writer.fingerprint.masks)

    def _continue(self, one: _Open) -> None:
        """Ask for the prompt's next samples, if it needs any; else it is done, and perhaps its shard."""
        more = one.store.more_samples([grade.result().reward for grade in one.grades])
        if more:
            seed = one.store.seed(one.prompt) + len(one.grades)
            self._engine.add(one, one.prompt.token_ids, one.store.sampling, num_samples=more, seed=seed)
            return
        self._num_own_done += 1
        self._unfinished[one.shard] -= 1
        if not self._unfinished[one.shard]:
            self._write(one.shard)

    def _write(self, index: int) -> None:
        rows = [self._row(one) for one in self._shards.pop(index)]
        del self._unfinished[index]
        now = time.monotonic()
        seconds = (now - self._since) * self._job.recipe.rollout.tp
        store, local = self._job.place(index)
        store.writer.write_shard(local, rows, seconds, self._device)
        self._since = now

    def _row(self, one: _Open) -> StoreRow:
        grades = [grade.result() for grade in one.grades]
        return StoreRow(
            prompt_id=one.prompt.prompt_id,
            text_hash=one.prompt.text_hash,
            rewards=[grade.reward for grade in grades],
            lengths=one.lengths,
            finish_reasons=one.finish_reasons,
            responses=one.responses if one.store.keep_responses else None,
            num_failures=sum(grade.is_graders_failure for grade in grades),
            num_unfinished=sum(grade.failure == UNFINISHED for grade in grades),
        )
