"""Stage 1, offline, once: responses of the reference policy for every prompt, graded, into a V* store.

    V*(x) = b1 log( 1/N sum_i exp(r(x, y_i) / b1) ),   y_i ~ pi_ref(.|x)

The store keeps rewards; V* is derived when it is read. Any number of workers fill one store, now or later: each takes
the next free shard while it still samples the last (`values/claims.py`), so its engine never runs dry. What a killed
one left is sampled again from the same seeds. A worker that finds every shard written closes the store, or reads it if
another has.
"""

from __future__ import annotations

import json
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rich.progress import Progress

from megatron_apo.config import Recipe
from megatron_apo.data.order import sample_seed
from megatron_apo.data.prompts import Prompt
from megatron_apo.preflight import open_sampling
from megatron_apo.rewards.pool import UNFINISHED, Grade, InlineRewardPool
from megatron_apo.rollout.inputs import Inputs, load_inputs, store_fingerprint
from megatron_apo.rollout.offline import OfflineEngine, Sample
from megatron_apo.rollout.server import device_name
from megatron_apo.runtime.garbage import garbage_collection_frozen
from megatron_apo.runtime.job import log_path
from megatron_apo.telemetry.summary import RunSummary
from megatron_apo.values.claims import Claims
from megatron_apo.values.sampling import more_samples
from megatron_apo.values.store import StoreError, StoreRow, StoreWriter, VStarStore
from megatron_apo.values.summary import summarize

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
class SamplingJob:
    """The store to be filled. Raises before any sampling if the recipe's files do not fit together."""

    recipe: Recipe
    inputs: Inputs
    writer: StoreWriter

    @classmethod
    def open(cls, recipe: Recipe) -> SamplingJob:
        return cls(recipe, *open_sampling(recipe))

    def prompts(self, index: int) -> list[Prompt]:
        """The prompts of shard `index`."""
        size = self.recipe.vstar.prompts_per_shard
        return self.inputs.training.prompts[index * size : (index + 1) * size]

    def claims(self, worker: Worker) -> Claims:
        """To be entered by who samples."""
        vstar, shards = self.recipe.vstar, self.writer.num_shards
        first = worker.index * shards // worker.count
        hangs_s = self.recipe.rollout.start_timeout_s
        return Claims(vstar.dir, shards, self.writer.written, vstar.claim_expires_s, hangs_s, first)


def run(recipe: Recipe, worker: Worker) -> None:
    """Work on `recipe.vstar.dir` until it is finished, alone or with other workers."""
    job = SamplingJob.open(recipe)
    if (shards := job.writer.num_shards) < worker.count and worker.index == 0:
        print(
            f"vstar.prompts_per_shard: {recipe.vstar.prompts_per_shard} makes {shards} shards, so that "
            f"{worker.count - shards} of {worker.count} workers have nothing to do; a new store could have smaller ones"
        )
    with job.claims(worker) as claims, RunSummary(recipe.run.dir).phase("estimate_vstar") as summary:
        left_out = job.inputs.training.left_out
        if any(left_out.values()):
            (recipe.vstar.dir / "left_out.json").write_text(json.dumps(left_out, indent=1) + "\n")
        _fill(job, worker, claims)
        summary["vstar"] = _close(job, claims)


def merge(recipe: Recipe) -> None:
    """Close a store whose shards are all written. Raises `StoreError` listing those that are not."""
    job = SamplingJob.open(recipe)
    RunSummary(recipe.run.dir).add({"vstar": _close(job, job.claims(Worker()))})


def check(recipe: Recipe) -> None:
    """Read the finished store whole, and compare it with the recipe. Raises `StoreError`."""
    store, inputs = VStarStore.open(recipe.vstar.dir), load_inputs(recipe)
    store.check(store_fingerprint(recipe, inputs))
    _check_prompts(store, inputs)
    print(f"{store.folder}: whole, {len(store)} prompts x {store.rewards.samples}, and of this recipe")


def _check_prompts(store: VStarStore, inputs: Inputs) -> None:
    """Raise `StoreError` unless the store has the prompts of data.train, each and no others."""
    ids = [prompt.prompt_id for prompt in inputs.training.prompts]
    store.rows_of(ids)
    if len(store) != len(ids):
        raise StoreError(f"{store.folder}: has {len(store)} prompts where data.train has {len(ids)}; estimate V* again")


def _close(job: SamplingJob, claims: Claims) -> dict[str, Any]:
    """See to the manifest; for the summary: what the store holds."""
    store = job.writer.finish()
    _check_prompts(store, job.inputs)
    claims.remove()
    found = summarize(store, [job.recipe.vstar.beta1], "log_mean_exp")
    print(f"V* store: {store.folder}, {found.prompts} prompts x {found.samples}, mean reward {found.reward.mean:.3f}")
    return {
        "prompts": found.prompts,
        "samples_per_prompt": found.samples,
        "samples": found.responses.count,
        "mean_reward": found.reward.mean,
        "mean_reward_stderr": found.reward.stderr,
        "truncated": found.responses.truncated,
        "unfinished_thinking": found.responses.num_unfinished,
        "grader_failures": found.responses.num_failures,
        "left_out": {why: len(rows) for why, rows in job.inputs.training.left_out.items()},
        "hours": found.hours,
        "settings": store.settings,
    }


def _fill(job: SamplingJob, worker: Worker, claims: Claims) -> None:
    """Start an engine, if there is anything to sample, and do."""
    recipe = job.recipe
    index = _wait_for_shard(claims, job.writer)
    if index is None:
        return
    job.writer.reopen()
    start = time.monotonic()
    progress = Progress(disable=not recipe.telemetry.progress)
    with InlineRewardPool(recipe.reward) as pool, progress:
        engine = OfflineEngine(
            recipe.model.reference_path,
            recipe.rollout,
            seed=recipe.vstar.seed,
            max_sequence_tokens=recipe.max_sequence_tokens,
            prefix_caching=recipe.vstar.prefix_caching,
            log_path=log_path(recipe.run.dir, f"vllm-estimate-vstar{worker.suffix}.log"),
        )
        sample_all(job, Sampler(job, engine, pool, start), claims, index, progress)


def sample_all(job: SamplingJob, sampler: Sampler, claims: Claims, index: int | None, progress: Progress) -> None:
    """Sample shards, `index` first, until all are written, by this worker or by others."""
    bar = progress.add_task("V*: sampling the reference", total=len(job.inputs.training.prompts))
    while index is not None:
        sampler.open(index)
        ask_again = 0.0
        with garbage_collection_frozen():
            while sampler.is_busy:
                if sampler.wants_more and time.monotonic() >= ask_again:
                    if (following := claims.take()) is not None:
                        sampler.open(following)
                    else:
                        ask_again = time.monotonic() + _WAIT_S
                sampler.advance()
                claims.alive()
                progress.update(bar, completed=sampler.num_done)
        index = _wait_for_shard(claims, job.writer)


def _wait_for_shard(claims: Claims, writer: StoreWriter) -> int | None:
    """A shard to sample; None when all are written. Waits while the rest is with others, one of whom may die."""
    is_told = False
    while (index := claims.take()) is None:
        num_missing = writer.num_shards - len(writer.written())
        if not num_missing:
            return None
        if not is_told:
            print(f"waiting for {num_missing} shards that other workers are at", flush=True)
            is_told = True
        time.sleep(_WAIT_S)
    return index


@dataclass(eq=False)
class _Open:
    """A prompt that is being sampled or graded."""

    prompt: Prompt
    shard: int
    seed: int
    lengths: list[int] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    responses: list[list[int]] = field(default_factory=list)  # if they are kept
    grades: list[Future[Grade]] = field(default_factory=list)
    num_ungraded: int = 0


class Sampler:
    """Samples and grades shards, several at a time; writes each when its last prompt is done.

    since: the time from which on the first shard is charged.
    """

    def __init__(self, job: SamplingJob, engine: OfflineEngine, pool: InlineRewardPool, since: float):
        self._job, self._engine, self._pool, self._since = job, engine, pool, since
        self._sampling = job.inputs.sampling(job.recipe.sampling)
        self._enough = 2 * job.recipe.rollout.max_num_seqs
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
        recipe = self._job.recipe
        prompts = [
            _Open(prompt, index, sample_seed(recipe.vstar.seed, "vstar", 0, prompt.prompt_id))
            for prompt in self._job.prompts(index)
        ]
        self._shards[index], self._unfinished[index] = prompts, len(prompts)
        self._own.add(index)
        others = self._job.writer.written() - self._own
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
            if self._job.recipe.vstar.keep_responses:
                one.responses.append(sample.token_ids)
            grade = self._submit(one.prompt, sample)
            one.grades.append(grade)
            grade.add_done_callback(lambda _: self._graded.append(one))

    def _submit(self, prompt: Prompt, sample: Sample) -> Future[Grade]:
        return self._pool.submit(self._job.inputs.grade_request(prompt, sample.token_ids, sample.finish_reason))

    def _continue(self, one: _Open) -> None:
        """Ask for the prompt's next samples, if it needs any; else it is done, and perhaps its shard."""
        vstar = self._job.recipe.vstar
        rewards = [grade.result().reward for grade in one.grades]
        more = more_samples(rewards, vstar.samples_per_prompt, vstar.adaptive)
        if more:
            seed = one.seed + len(one.grades)
            self._engine.add(one, one.prompt.token_ids, self._sampling, num_samples=more, seed=seed)
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
        self._job.writer.write_shard(index, rows, seconds, self._device)
        self._since = now

    def _row(self, one: _Open) -> StoreRow:
        grades = [grade.result() for grade in one.grades]
        return StoreRow(
            prompt_id=one.prompt.prompt_id,
            text_hash=one.prompt.text_hash,
            rewards=[grade.reward for grade in grades],
            lengths=one.lengths,
            finish_reasons=one.finish_reasons,
            responses=one.responses if self._job.recipe.vstar.keep_responses else None,
            num_failures=sum(grade.is_graders_failure for grade in grades),
            num_unfinished=sum(grade.failure == UNFINISHED for grade in grades),
        )
