"""What numbers of seeds and prompts are worth, by hand and by brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from megatron_apo.compare.statistics import (
    Cost,
    Estimate,
    deviations,
    mean_cost,
    over_prompts,
    over_seeds,
    ratio,
    reached,
)


def costs(*values: float, censored: tuple[int, ...] = ()) -> list[Cost]:
    return [Cost(value, place in censored) for place, value in enumerate(values)]


def test_the_target_is_reached_by_a_full_window_of_rewards_that_are_there() -> None:
    assert reached([0.9, 0.1, 0.5, 0.5], 0.5, 2) == 0 + 1  # (0.9 + 0.1) / 2
    assert reached([0.9], 0.5, 2) is None and reached([], 0.5, 1) is None
    assert reached([0.4, None, 0.7], 0.55, 2) == 2  # (0.4 + 0.7) / 2
    assert reached([0.4, None], 0.3, 2) is None
    assert reached([0.0, 0.0, 1.0, 0.0], 0.5, 1) == 2


def test_a_ratio_of_few_seeds_is_their_geometric_mean_and_range() -> None:
    found = ratio(costs(20, 80), costs(10, 10))  # twice and eight times
    assert (found.kind, found.count) == ("range", 2)
    assert [found.value, found.low, found.high] == pytest.approx([4, 2, 8])


def test_a_ratio_of_five_seeds_has_the_interval_of_a_paired_t_test_on_logarithms() -> None:
    """Logarithms to base 2 of the ratios: 0, 1, 2, 1, 1: mean 1, variance 1/2. t of 4 degrees: 2.776."""
    theirs, ours = costs(3, 8, 20, 2, 14), costs(3, 4, 5, 1, 7)
    found = ratio(theirs, ours)
    margin = 2.7764451 * math.sqrt(0.5) / math.sqrt(5)
    assert found.kind == "interval"
    assert [found.value, found.low, found.high] == pytest.approx([2, 2 ** (1 - margin), 2 ** (1 + margin)], rel=1e-6)
    logs = [[math.log(cost.value) for cost in of] for of in (theirs, ours)]
    low, high = stats.ttest_rel(*logs).confidence_interval()
    assert [found.low, found.high] == pytest.approx([math.exp(low), math.exp(high)])


@pytest.mark.parametrize(
    ("theirs", "ours", "kind"),
    [
        ((1,), (), "at least"),  # they have not come as far: the true ratio is larger
        ((), (0,), "at most"),
        ((1,), (0,), "unknown"),
        ((0,), (0,), "unknown"),
    ],
)
def test_what_is_censored_makes_a_bound(theirs: tuple[int, ...], ours: tuple[int, ...], kind: str) -> None:
    found = ratio(costs(*[20] * 5, censored=theirs), costs(*[10] * 5, censored=ours))
    assert found.kind == kind and found.low is None and found.high is None
    assert found.value == (None if kind == "unknown" else pytest.approx(2))


def test_a_cost_that_is_nothing_has_no_ratio() -> None:
    assert ratio(costs(1, 0), costs(1, 1)).kind == "unknown" and ratio([], []).kind == "unknown"


def test_a_mean_over_seeds() -> None:
    assert over_seeds([1.0, 3.0]) == Estimate("range", 2.0, 1.0, 3.0, 2)
    assert over_seeds([]) == Estimate("unknown", None, None, None, 0)
    values = [1.0, 2.0, 4.0, 8.0, 3.0, 9.0]
    low, high = stats.ttest_1samp(values, 0).confidence_interval()
    found = over_seeds(values)
    assert found.kind == "interval" and [found.value, found.low, found.high] == pytest.approx([4.5, low, high])
    assert mean_cost(costs(10, 30)) == Estimate("range", 20.0, 10.0, 30.0, 2)
    assert mean_cost(costs(10, 30, censored=(1,))) == Estimate("at least", 20.0, None, None, 2)


def test_the_bootstrap_over_prompts_is_that_of_all_resamples() -> None:
    """Of four prompts all 256 resamples can be listed."""
    values = np.array([0.0, 0.1, 0.4, 1.0])
    means = [values[list(rows)].mean() for rows in itertools.product(range(4), repeat=4)]
    exact = np.quantile(means, [0.025, 0.975])
    assert over_prompts(values) == pytest.approx(exact, abs=0.06)
    assert over_prompts(values) == over_prompts(values)
    many = np.random.default_rng(1).random(400)
    margin = 1.96 * many.std() / 20
    assert over_prompts(many) == pytest.approx((many.mean() - margin, many.mean() + margin), abs=0.005)
    assert over_prompts(np.array([0.5])) == (0.5, 0.5)


def test_a_deviation_is_from_the_median_of_all() -> None:
    assert deviations([(2.0, 2.0), (2.0, 2.6), (1.0, 2.0)]) == pytest.approx([0.0, 0.3, 0.5])
