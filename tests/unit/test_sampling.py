"""How many samples a prompt gets: the stopping rule by hand, its limits, and recipes that make no sense of it."""

from __future__ import annotations

from math import exp, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_apo.config import AdaptiveConfig, RecipeError, build_recipe, load_recipe
from megatron_apo.values.estimators import standard_error
from megatron_apo.values.sampling import more_samples

PATHS = ["model.path=m", "data.train=t.jsonl", "vstar.dir=v"]
FIRST = 4


def adaptive(**changes: Any) -> AdaptiveConfig:
    return AdaptiveConfig(**({"stderr": 0.1, "beta1": 0.5, "step": 4, "most": 64, "all_wrong": 0} | changes))


def rewards(right: int, n: int) -> list[float]:
    return [1.0] * right + [0.0] * (n - right)


def deviation(right: int, n: int, beta1: float = 0.5) -> float:
    """b1 c sqrt(p(1-p)/(n+1)) / (1+cp) at p = (k + 1/2) / (n + 1)."""
    c, p = exp(1 / beta1) - 1, (right + 0.5) / (n + 1)
    return beta1 * c * sqrt(p * (1 - p) / (n + 1)) / (1 + c * p)


def sampled(source: list[float], config: AdaptiveConfig | None) -> int:
    """Samples of a prompt whose responses would have the rewards `source`, one after another."""
    taken = 0
    while more := more_samples(source[:taken], FIRST, config):
        taken += more
    return taken


def test_without_adaptive_a_prompt_has_its_first_round_alone() -> None:
    assert more_samples([], 8, None) == 8
    assert more_samples([0.0] * 8, 8, None) == 0


@pytest.mark.parametrize("beta1", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("stderr", [0.05, 0.1, 0.2])
def test_a_prompt_is_sampled_until_its_standard_error_is_small_enough(stderr: float, beta1: float) -> None:
    config = adaptive(stderr=stderr, beta1=beta1)
    assert more_samples([], FIRST, config) == FIRST
    for n in range(FIRST, 64, 4):
        for right in range(n + 1):
            is_enough = deviation(right, n, beta1) <= stderr
            assert more_samples(rewards(right, n), FIRST, config) == (0 if is_enough else 4), (right, n)


def test_a_standard_error_equal_to_the_limit_is_enough() -> None:
    limit = float(standard_error(np.array([rewards(2, 8)]), 0.5, (0.0, 1.0))[0])
    assert more_samples(rewards(2, 8), FIRST, adaptive(stderr=limit)) == 0
    assert more_samples(rewards(2, 8), FIRST, adaptive(stderr=np.nextafter(limit, 0))) == 4


def test_equal_rewards_do_not_stop_at_once() -> None:
    """Their spread is 0, their uncertainty is not. Right ones, where V* is flat, are left sooner than wrong ones."""
    always_right, always_wrong = sampled([1.0] * 64, adaptive()), sampled([0.0] * 64, adaptive())
    assert FIRST < sampled([1.0] * 64, adaptive(stderr=0.05)) < 64
    assert always_right < always_wrong < 64
    assert always_right == next(n for n in range(4, 68, 4) if deviation(n, n) <= 0.1)
    assert always_wrong == next(n for n in range(4, 68, 4) if deviation(0, n) <= 0.1)


@pytest.mark.parametrize(("most", "step"), [(64, 4), (10, 4), (7, 16), (4, 1), (5, 1)])
def test_no_prompt_exceeds_the_cap(most: int, step: int) -> None:
    """The last round is cut to fit; a prompt that is never certain has exactly `most`."""
    config = adaptive(stderr=1e-6, most=most, step=step)
    source = np.random.default_rng(0).integers(0, 2, 64).astype(float).tolist()
    assert sampled(source, config) == most
    assert more_samples(rewards(1, most), FIRST, config) == more_samples(rewards(1, most + 5), FIRST, config) == 0


@pytest.mark.parametrize("all_wrong", [0, 4, 6, 16, 32])
def test_a_prompt_that_was_never_right_has_its_least_number(all_wrong: int) -> None:
    """In whole rounds; one that was right once stops where its standard error lets it."""
    config = adaptive(stderr=10.0, all_wrong=all_wrong)
    assert sampled([0.0] * 64, config) == max(FIRST, -(-all_wrong // 4) * 4)
    for place in range(FIRST):
        assert sampled([0.0] * place + [1.0] + [0.0] * 63, config) == FIRST
    if all_wrong > 8:
        assert sampled([0.0] * 6 + [1.0] + [0.0] * 57, config) == 8


def test_all_wrong_is_what_the_filter_leaves_out() -> None:
    config = adaptive(stderr=10.0, all_wrong=16, reward_range=(-1.0, 1.0))
    assert sampled([-1.0, 0.0] * 32, config) == 16
    assert sampled([-1.0, 0.1] * 32, config) == FIRST


def test_real_rewards_are_scaled_by_their_range() -> None:
    """4 r - 2.5 at 4 b1 is as uncertain as r at b1, times 4."""
    plain, stretched = adaptive(), adaptive(stderr=0.4, beta1=2.0, reward_range=(-2.5, 1.5))
    rng = np.random.default_rng(1)
    for source in rng.random((20, 64)).tolist():
        assert sampled(source, plain) == sampled([4 * reward - 2.5 for reward in source], stretched)


def test_the_order_of_rewards_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    config = adaptive(all_wrong=16)
    for source in (rng.random((30, 8)) < rng.random((30, 1))).astype(float):
        shuffled = rng.permutation(source).tolist()
        assert more_samples(shuffled, FIRST, config) == more_samples(source.tolist(), FIRST, config)


# --- recipes


def problems_of(*overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        build_recipe({}, [*PATHS, *overrides])
    return caught.value.problems


def test_adaptive_sampling_is_off_and_switched_on_by_any_of_its_keys() -> None:
    assert build_recipe({}, PATHS).vstar.adaptive is None
    recipe = build_recipe({}, [*PATHS, "vstar.adaptive.stderr=0.05"])
    assert recipe.vstar.adaptive == AdaptiveConfig(stderr=0.05)
    assert build_recipe({}, [*PATHS, "vstar.adaptive={}"]).vstar.adaptive == AdaptiveConfig()


@pytest.mark.parametrize(
    ("overrides", "key", "fix"),
    [
        (
            ["vstar.samples_per_prompt=8", "vstar.adaptive.most=6", "vstar.adaptive.all_wrong=0"],
            "vstar.adaptive.most",
            "8",
        ),
        (["vstar.adaptive.most=12"], "vstar.adaptive.all_wrong", "12"),
        (["vstar.adaptive.reward_range=[1, 1]"], "vstar.adaptive.reward_range", "[0, 1]"),
        (["vstar.adaptive.reward_range=[1, -1]"], "vstar.adaptive.reward_range", "[-1, 1]"),
        (["vstar.adaptive.reward_range=[-1, 0]", "reward.failure_reward=-2"], "reward.failure_reward", "-1"),
        (["vstar.filter=success_rate", "vstar.success_rate=[0.8, 0.2]"], "vstar.success_rate", "[0.2, 0.8]"),
        (["vstar.success_rate=[0, 1.5]"], "vstar.success_rate", "[0, 1]"),
        (["vstar.filter=success_rate", "vstar.success_rate=[-0.1, 1]"], "vstar.success_rate", "[0.1, 0.1]"),
        (["vstar.success_rate=[0.1, 0.9]"], "vstar.success_rate", "[0, 1]"),
    ],
)
def test_combinations_that_cannot_work(overrides: list[str], key: str, fix: str) -> None:
    problems = problems_of(*overrides)
    assert any(problem.startswith(f"{key}: ") for problem in problems)
    assert all("\n" not in problem for problem in problems)
    build_recipe({}, [*PATHS, *overrides, f"{key}={fix}"])


@pytest.mark.parametrize(
    "override",
    [
        "vstar.adaptive.stderr=0",
        "vstar.adaptive.beta1=-1",
        "vstar.adaptive.step=0",
        "vstar.adaptive.most=0",
        "vstar.adaptive.all_wrong=-1",
        "vstar.adaptive.reward_range=[0]",
        "vstar.adaptive.reward_range=[0, .inf]",
        "vstar.adaptive.stdder=0.1",
        "vstar.samples_used=0",
        "vstar.filter=hard",
    ],
)
def test_values_that_cannot_work(override: str) -> None:
    (problem,) = problems_of(override)
    assert problem.startswith(override.partition("=")[0]) and "\n" not in problem


def test_a_recipe_with_adaptive_sampling_is_saved_and_read_back(tmp_path: Path) -> None:
    recipe = build_recipe({}, [*PATHS, "vstar.adaptive.stderr=0.05", "vstar.adaptive.reward_range=[-1, 2]"])
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
