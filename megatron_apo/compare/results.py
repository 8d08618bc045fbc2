"""What a comparison has found so far: of each setting a line a method, over the seeds that have ended.

The first method is what the others are held against.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean

import numpy as np

from megatron_apo.compare.campaign import Attempt, Campaign
from megatron_apo.compare.measured import Curve, Measured, Stage1, Target
from megatron_apo.compare.plan import Job, Setting
from megatron_apo.compare.statistics import Cost, Estimate, mean_cost, over_prompts, over_seeds, ratio
from megatron_apo.runtime.files import write_whole

FILE_NAME = "results.json"


@dataclass(frozen=True)
class Run:
    """A run that counts. attempts: all that were made. final: mean over prompts; None of a failed run. target: None
    where the plan has none. at_equal_time: reward when the fastest of the seed's runs that did not fail was done,
    stage 1 counted; None of one that failed, or that had no step by then."""

    seed: int
    folder: str
    attempts: list[Attempt]
    attempt: int
    deviation: float
    failure: str | None
    measured: Measured
    target: Target | None
    final: float | None
    at_equal_time: float | None = None


@dataclass(frozen=True)
class Trial:
    """Of a learning rate. score: mean reward of its last steps; None where it failed. seconds: of its steps."""

    rate: float
    score: float | None
    seconds: float
    folder: str


@dataclass(frozen=True)
class Line:
    """A method in a setting.

    window: steps whose mean reward is told as one's. ratio: its seconds to the target over the first method's, stage 1
    counted, and ratio_of_steps, not counted; ratio_by_evaluations: the latter, each run's seconds in units of an
    evaluation of its own. final_of_prompts: interval of the final reward's mean over prompts, by bootstrap; gained:
    final reward above the first method's of the same seed; gained_of_prompts: its interval over prompts. kl: at the
    last step.
    A run that failed counts in what is spent until the target, as a bound, and in nothing else.
    """

    label: str
    rate: float
    window: int
    trials: list[Trial]
    stage_1: Stage1
    runs: list[Run]
    seconds: Estimate | None
    seconds_of_steps: Estimate | None
    samples: Estimate | None
    tokens: Estimate | None
    ratio: Estimate | None
    ratio_of_steps: Estimate | None
    ratio_by_evaluations: Estimate | None
    at_equal_time: Estimate
    final: Estimate
    final_of_prompts: tuple[float, float] | None
    gained: Estimate | None
    gained_of_prompts: tuple[float, float] | None
    kl: Estimate | None
    step_s: Estimate
    wall_s: dict[str, float]
    cpu_s: dict[str, float]


def results(campaign: Campaign) -> dict[Setting, list[Line]]:
    """Of each setting that has run anything; a line a method, in the plan's order."""
    found = {}
    for setting in campaign.plan.settings:
        lines = _lines(campaign, setting)
        if any(line.runs or line.trials for line in lines):
            found[setting] = lines
    return found


def write_results(campaign: Campaign, found: dict[Setting, list[Line]]) -> None:
    """OUT/results.json."""
    tree = {setting: [asdict(line) for line in lines] for setting, lines in found.items()}
    write_whole(campaign.out / FILE_NAME, json.dumps(tree, indent=1) + "\n")


def _lines(campaign: Campaign, setting: Setting) -> list[Line]:
    plan, rates = campaign.plan, campaign.rates(setting)
    stage_1 = {}
    windows = {method.label: plan.window(setting, method) for method in plan.methods}
    runs: dict[str, list[Run]] = {method.label: [] for method in plan.methods}
    for method in plan.methods:
        own = next(job for job in plan.jobs(setting, plan.seeds[0], rates) if job.method == method)
        stage_1[method.label] = Stage1.of(plan.recipe_of(own, campaign.out))
    for seed in plan.seeds:
        of_seed = {}
        for one in campaign.counted(plan.jobs(setting, seed, rates)):
            label, folder = one.job.method.label, campaign.folder(one.job, one.counts)
            measured = campaign.measured(one.job, one.counts)
            target = None
            if plan.target is not None:
                target = Target.of(measured.curve, stage_1[label], plan.target, windows[label])
            final = fmean(measured.final.values()) if measured.final and one.counts.failure is None else None
            of_seed[label] = Run(
                seed,
                str(folder.relative_to(campaign.out)),
                one.attempts,
                one.counts.number,
                one.deviation,
                one.counts.failure,
                measured,
                target,
                final,
            )
        for label, run in with_equal_time(of_seed, stage_1, windows).items():
            runs[label].append(run)
    first = runs[plan.methods[0].label]
    return [
        _line(
            method.label,
            rates[method.label],
            windows[method.label],
            [_trial(campaign, job) for job in plan.trials(setting) if job.method == method and campaign.attempts(job)],
            stage_1[method.label],
            runs[method.label],
            first if method != plan.methods[0] else None,
        )
        for method in plan.methods
    ]


def with_equal_time(runs: dict[str, Run], stage_1: dict[str, Stage1], windows: dict[str, int]) -> dict[str, Run]:
    """A seed's runs, each with its reward at the time when the first of them was done. One that failed has no say in
    when that was, and no reward then."""
    curves = {label: run.measured.curve for label, run in runs.items() if run.failure is None}
    ends = [stage_1[label].seconds + curve.seconds[-1] for label, curve in curves.items() if curve.seconds]
    if not ends:
        return runs

    def reward(label: str) -> float | None:
        return curves[label].reward_at(min(ends) - stage_1[label].seconds + 1e-9, windows[label])

    return {label: replace(run, at_equal_time=reward(label)) if label in curves else run for label, run in runs.items()}


def _trial(campaign: Campaign, job: Job) -> Trial:
    last = campaign.attempts(job)[-1]
    seconds = campaign.measured(job, last).curve.seconds
    folder = campaign.folder(job, last).relative_to(campaign.out)
    return Trial(job.rate, campaign.score(job), seconds[-1] if seconds else 0.0, str(folder))


def _line(
    label: str, rate: float, window: int, trials: list[Trial], stage_1: Stage1, runs: list[Run], first: list[Run] | None
) -> Line:
    targets = [run.target for run in runs if run.target]

    def cost(name: str) -> Estimate | None:
        return mean_cost([getattr(target, name) for target in targets]) if targets else None

    def against(spent: Callable[[Run], Cost | None]) -> Estimate | None:
        """None where that is not known of every run: one that is left out may be a bound."""
        both = [(spent(ours), spent(theirs)) for ours, theirs in _of_same_seeds(runs, first or [])]
        known = [(ours, theirs) for ours, theirs in both if ours and theirs]
        return ratio(*zip(*known, strict=True)) if known and len(known) == len(both) else None

    ended = [run for run in runs if run.failure is None]

    def mean(values: Callable[[Run], float | None]) -> Estimate:
        return over_seeds([value for run in ended if (value := values(run)) is not None])

    finals = [run.measured.final for run in ended if run.measured.final]
    gains = _gains(runs, first or [])
    kl = mean(lambda run: run.measured.kl)
    return Line(
        label=label,
        rate=rate,
        window=window,
        trials=trials,
        stage_1=stage_1,
        runs=runs,
        seconds=cost("seconds_with_stage_1"),
        seconds_of_steps=cost("seconds"),
        samples=cost("samples_with_stage_1"),
        tokens=cost("tokens_with_stage_1"),
        ratio=against(lambda run: run.target.seconds_with_stage_1 if run.target else None),
        ratio_of_steps=against(lambda run: run.target.seconds if run.target else None),
        ratio_by_evaluations=against(_in_evaluations),
        at_equal_time=mean(lambda run: run.at_equal_time),
        final=mean(lambda run: run.final),
        final_of_prompts=over_prompts(_by_prompt(finals)) if finals else None,
        gained=over_seeds([fmean(one.values()) for one in gains]) if gains else None,
        gained_of_prompts=over_prompts(_by_prompt(gains)) if gains else None,
        kl=kl if kl.count else None,
        step_s=mean(lambda run: _step_s(run.measured.curve)),
        wall_s=_mean_phases([run.measured.wall_s for run in ended]),
        cpu_s=_mean_phases([run.measured.cpu_s for run in ended]),
    )


def _of_same_seeds(ours: Sequence[Run], theirs: Sequence[Run]) -> list[tuple[Run, Run]]:
    by_seed = {run.seed: run for run in theirs}
    return [(run, by_seed[run.seed]) for run in ours if run.seed in by_seed]


def _in_evaluations(run: Run) -> Cost | None:
    """What it has spent until the target, in units of an evaluation of its own."""
    if run.target is None or run.measured.evaluation_s is None:
        return None
    return replace(run.target.seconds, value=run.target.seconds.value / run.measured.evaluation_s)


def _gains(runs: Sequence[Run], first: Sequence[Run]) -> list[dict[str, float]]:
    """Final reward above the first method's, of each seed by prompt."""
    return [
        {key: reward - theirs.measured.final[key] for key, reward in ours.measured.final.items()}
        for ours, theirs in _of_same_seeds(runs, first)
        if all(run.failure is None and run.measured.final for run in (ours, theirs))
    ]


def _by_prompt(found: Sequence[dict[str, float]]) -> np.ndarray:
    """[P] each prompt's mean over the seeds."""
    return np.array([[one[key] for key in found[0]] for one in found]).mean(axis=0)


def _step_s(curve: Curve) -> float | None:
    return curve.seconds[-1] / len(curve.seconds) if curve.seconds else None


def _mean_phases(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each phase that any run had; a run without it spent nothing there."""
    names = dict.fromkeys(name for one in found for name in one)
    return {name: fmean(one.get(name, 0.0) for one in found) for name in names}
