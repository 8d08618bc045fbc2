"""What numbers of a few seeds and of many prompts say: paired ratios, intervals, bounds. Pure functions.

A run that misses its target has a cost that is censored: the true one is at least what the run has spent. Over five
seeds or more there is an interval of 95 % by Student's t; fewer are told as they are, by their range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEAST_SEEDS = 5  # of an interval
_LEVEL = 0.95
_RESAMPLES = 2000

Kind = Literal["interval", "range", "at least", "at most", "unknown"]


@dataclass(frozen=True)
class Estimate:
    """A number of `count` seeds. low, high: of its interval or range by `kind`; None of a bound."""

    kind: Kind
    value: float | None
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Cost:
    """What a run has spent until its target; censored: it has not reached it, and would have spent more."""

    value: float
    is_censored: bool


def reached(rewards: Sequence[float | None], target: float, window: int) -> int | None:
    """The first place at which the mean of the last `window` rewards is at least `target`; None: nowhere.

    A None is no reward, as `Recorder.mean_of_last` has it.
    """
    known: list[float] = []
    for place, reward in enumerate(rewards):
        if reward is not None:
            known.append(reward)
            if len(known) >= window and fmean(known[-window:]) >= target:
                return place
    return None


def ratio(theirs: Sequence[Cost], ours: Sequence[Cost]) -> Estimate:
    """theirs / ours of the same seeds: the geometric mean, and what it is worth.

    Where some of `theirs` are censored it is at least that, where some of `ours` are at most; where both are, and each
    run of a seed or runs of several, nothing is known.
    """
    pairs = list(zip(theirs, ours, strict=True))
    logs = [math.log(their.value / our.value) for their, our in pairs if their.value > 0 and our.value > 0]
    if len(logs) < len(pairs) or not pairs:
        return Estimate("unknown", None, None, None, len(pairs))
    is_least, is_most = (any(cost.is_censored for cost in costs) for costs in (theirs, ours))
    if is_least and is_most:
        return Estimate("unknown", None, None, None, len(pairs))
    if is_least or is_most:
        return Estimate("at least" if is_least else "at most", math.exp(fmean(logs)), None, None, len(pairs))
    found = over_seeds(logs)
    assert found.value is not None and found.low is not None and found.high is not None
    return Estimate(found.kind, math.exp(found.value), math.exp(found.low), math.exp(found.high), found.count)


def mean_cost(costs: Sequence[Cost]) -> Estimate:
    """Over seeds; at least that where some are censored."""
    found = over_seeds([cost.value for cost in costs])
    if not any(cost.is_censored for cost in costs):
        return found
    return Estimate("at least", found.value, None, None, found.count)


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean, with Student's interval from five seeds on, else with their range."""
    if not values:
        return Estimate("unknown", None, None, None, 0)
    mean, count = fmean(values), len(values)
    if count < LEAST_SEEDS:
        return Estimate("range", mean, min(values), max(values), count)
    margin = float(stats.t.ppf((1 + _LEVEL) / 2, count - 1)) * stdev(values) / math.sqrt(count)
    return Estimate("interval", mean, mean - margin, mean + margin, count)


def over_prompts(value_P: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """Of the mean over prompts, an interval of 95 % by bootstrap (percentiles)."""
    draw = np.random.default_rng(seed)
    means = np.array([value_P[draw.integers(len(value_P), size=len(value_P))].mean() for _ in range(_RESAMPLES)])
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def deviations(references: Sequence[tuple[float, float]]) -> list[float]:
    """By how much the one or the other of each run's two reference times differs from the median of all, as a share."""
    middle = median([seconds for both in references for seconds in both])
    return [max(abs(seconds / middle - 1) for seconds in both) for both in references]
