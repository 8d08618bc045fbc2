"""Runs what a plan asks for, each run in a folder of its own, and goes on where it was interrupted.

    OUT/compare.json                          the plan
    OUT/SETTING/METHOD/seed-N/attempt-K/      a run, with what `train` writes; attempt.json once it has ended
    OUT/SETTING/METHOD/rate-R/attempt-K/      a trial of a learning rate
    OUT/SETTING/rates.json                    the rates that were chosen, once all trials have ended
    OUT/results.json, OUT/compare.html        all numbers, and a page, written anew after each run

An attempt without attempt.json was interrupted: it is kept, and another one is made.
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_apo.compare import workload
from megatron_apo.compare.measured import Curve, Measured
from megatron_apo.compare.plan import Job, Plan, Setting, best_rate
from megatron_apo.compare.statistics import deviations
from megatron_apo.runtime import launch
from megatron_apo.runtime.files import write_whole
from megatron_apo.runtime.signals import ENDED_EARLY, RANK_LOST, TERMINATED
from megatron_apo.telemetry.metrics import read_metrics
from megatron_apo.telemetry.units import duration

RECORD, LOG, RATES = "attempt.json", "attempt.log", "rates.json"
_ASKED = (ENDED_EARLY, 128 + signal.SIGINT, TERMINATED)  # exit codes of a run that was asked to end
MOST_DEVIATION = 0.15  # of the reference workload's time, from the median of the seed's


@dataclass(frozen=True)
class Attempt:
    """A run that has ended. reference_s: the fixed workload's time before and after; None of a trial. failure: what it
    said when it failed. exit_code: then 1 where the training itself said why, others where a rank was killed or lost.
    sitting: when the command that made it was started; two of one sitting had no break between."""

    number: int
    sitting: str
    host: str
    launched: float
    wall_s: float
    cpu_s: float
    reference_s: tuple[float, float] | None = None
    failure: str | None = None
    exit_code: int = 0

    @property
    def is_lost(self) -> bool:
        """Whether it ended by what may be none of the method's, and is worth another attempt."""
        return self.exit_code == RANK_LOST or self.exit_code > 128


@dataclass(frozen=True)
class Counted:
    """A job's attempts that have ended, and the one of them that counts: of those that were not lost the one whose
    reference differs least from its seed's median. deviation: by how much, as a share."""

    job: Job
    attempts: list[Attempt]
    counts: Attempt
    deviation: float


class Campaign:
    """say: shows a line. told: called after each run."""

    def __init__(self, plan: Plan, out: Path, say: Callable[[str], object], told: Callable[[Campaign], object]):
        self.plan, self.out = plan, out
        self._say, self._told = say, told
        self._sitting = time.strftime("%Y-%m-%d %H:%M:%S")

    def run(self) -> None:
        """Everything that is not there yet."""
        for setting in self.plan.settings:
            if (trials := self.plan.trials(setting)) and not self._chosen(setting).is_file():
                for job in trials:
                    while not (ended := self.attempts(job)) or (ended[-1].is_lost and len(ended) < self.plan.attempts):
                        self._run(job)
                write_whole(self._chosen(setting), json.dumps(self.rates(setting)) + "\n")
            rates = self.rates(setting)
            for seed in self.plan.seeds:
                jobs = self.plan.jobs(setting, seed, rates)
                for job in jobs:
                    if not self.attempts(job):
                        self._run(job)
                while again := to_repeat(self.counted(jobs), self.plan.attempts):
                    for job in again:
                        self._run(job)

    def rates(self, setting: Setting) -> dict[str, float]:
        """The learning rate of each method, by label: the best trial's, or where all have failed the plan's middle
        one. Of trials that are not there yet nothing is said; what was chosen from all stays."""
        if self._chosen(setting).is_file():
            return json.loads(self._chosen(setting).read_text())
        found = {}
        for method in self.plan.methods:
            own = [job for job in self.plan.trials(setting) if job.method == method]
            scores = [(job.rate, self.score(job)) for job in own if self.attempts(job)]
            found[method.label] = best_rate(scores) or self.plan.rates[len(self.plan.rates) // 2]
        return found

    def score(self, job: Job) -> float | None:
        """What a trial is judged by: the mean reward of the last `train.target_responses`, but of a third of its steps
        at most, so that none is judged by how it began; None where it failed."""
        last = self.attempts(job)[-1:]
        if not last or last[0].failure is not None:
            return None
        curve = Curve.of(read_metrics(self.folder(job, last[0])), 1)
        window = min(self.plan.window(job.setting, job.method), max(1, len(curve.rewards) // 3))
        return curve.smoothed(window)[-1]

    def attempts(self, job: Job) -> list[Attempt]:
        """Those that have ended, the oldest first."""
        found = [json.loads(path.read_text()) for path in (self.out / job.folder).glob(f"attempt-*/{RECORD}")]
        for one in found:
            one["reference_s"] = one["reference_s"] and tuple(one["reference_s"])
        return sorted((Attempt(**one) for one in found), key=lambda one: one.number)

    def counted(self, jobs: Sequence[Job]) -> list[Counted]:
        """Of one seed's jobs those that have an attempt."""
        ended = [(job, attempts) for job in jobs if (attempts := self.attempts(job))]
        if not ended:
            return []
        # the median is of all attempts, so that it does not depend on which of them count
        flat = [(index, one) for index, (_, attempts) in enumerate(ended) for one in attempts]
        found = deviations([one.reference_s or (1.0, 1.0) for _, one in flat])
        best = [
            min((one.is_lost, off, one.number) for off, (of, one) in zip(found, flat, strict=True) if of == index)
            for index in range(len(ended))
        ]
        return [
            Counted(job, attempts, next(one for one in attempts if one.number == number), deviation)
            for (job, attempts), (_, deviation, number) in zip(ended, best, strict=True)
        ]

    def measured(self, job: Job, attempt: Attempt) -> Measured:
        recipe = self.plan.recipe_of(job, self.folder(job, attempt))
        samples = recipe.objective.samples_per_prompt
        return Measured.of(recipe.run.dir, samples, attempt.launched, attempt.wall_s, attempt.cpu_s)

    def folder(self, job: Job, attempt: Attempt) -> Path:
        return self._folder(job, attempt.number)

    def _folder(self, job: Job, number: int) -> Path:
        return self.out / job.folder / f"attempt-{number}"

    def _chosen(self, setting: Setting) -> Path:
        return self.out / setting / RATES

    def _run(self, job: Job) -> None:
        number = 1
        while self._folder(job, number).exists():
            number += 1
        folder = self._folder(job, number)
        recipe = self.plan.recipe_of(job, folder)
        recipe.save(folder / "recipe.yaml")
        what = f"learning rate {job.rate:g}" if job.is_trial else f"seed {job.seed}, attempt {number}"
        self._say(f"{job.setting}: {job.method.label}, {what}: {folder}")
        before = None if job.is_trial else workload.reference_s()
        launched, start, start_cpu_s = time.time(), time.monotonic(), _children_cpu_s()
        failure, code = None, 0
        try:
            launch.run_command(["train", "--recipe", str(folder / "recipe.yaml")], folder / LOG)
        except launch.RankFailed as error:
            if error.exit_code in _ASKED:
                raise
            failure, code = str(error), error.exit_code
        wall_s, cpu_s = time.monotonic() - start, _children_cpu_s() - start_cpu_s
        both = None if before is None else (before, workload.reference_s())
        host = socket.gethostname()
        attempt = Attempt(number, self._sitting, host, launched, wall_s, cpu_s, both, failure, code)
        write_whole(folder / RECORD, json.dumps(asdict(attempt), indent=1) + "\n")
        outcome = f"failed, see {folder / LOG}" if failure else "done"
        self._say(f"  {outcome} after {duration(wall_s)}, {duration(cpu_s)} of CPU")
        self._told(self)


def to_repeat(counted: Sequence[Counted], most: int) -> list[Job]:
    """The jobs whose reference differs too much, or that were lost, and that have attempts left."""
    return [
        one.job
        for one in counted
        if (one.counts.is_lost or one.deviation > MOST_DEVIATION) and len(one.attempts) < most
    ]


def _children_cpu_s() -> float:
    """Of all processes that this one's have waited for, user and system. What a command starts is waited for within it:
    its ranks by the launcher, vLLM's by their guard, which is a subreaper, and so is the launcher."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
