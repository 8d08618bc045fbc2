"""V* estimators against their limits, exact arithmetic and the binomial distribution."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import get_args

import mpmath
import numpy as np
import pytest

from megatron_apo.config import EstimatorName
from megatron_apo.values.estimators import ESTIMATORS, binary_value, fit_beta_prior, log_mean_exp, standard_error
from megatron_apo.values.samples import SampledRewards, SamplesPerPrompt
from tests.stores import bias_and_rmse, binomial, closed_form, true_value, zeros_and_ones

RAGGED = [[0.0, 1.0, 1.0], [1.0], [0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 1.0], [0.0], [1.0, 0.0, 1.0], [1.0, 1.0]]
REAL_REWARDS = [[0.3, -2.5], [7.0], [0.1, 0.1, 0.1], [-4.0, 0.0, 0.5, 1.25], [1e-3, 2e-3]]
OF_ONE_PROMPT = sorted(set(ESTIMATORS) - {"beta_smoothed"})  # which do not look at the others


def estimate(name: str, rows: Sequence[Sequence[float]] | np.ndarray, beta1: float) -> np.ndarray:
    return ESTIMATORS[name](SampledRewards.of_rows(rows), beta1)


def exactly(rewards, beta1):
    """b1 log mean exp(r / b1) in 60 digits, straight from the formula."""
    with mpmath.workdps(60):
        beta1 = mpmath.mpf(beta1)
        return float(beta1 * mpmath.log(mpmath.fsum(mpmath.exp(mpmath.mpf(r) / beta1) for r in rewards) / len(rewards)))


# --- log_mean_exp


@pytest.mark.parametrize("beta1", [1e-3, 0.01, 0.1, 0.5, 1.0, 10.0, 1e4, 1e9])
@pytest.mark.parametrize("rewards", [[0, 1, 1, 0, 0, 0, 0, 1], [-3.5, 0.25, 7.0], [0.1] * 5, [-1000.0, -1001.0], [2.0]])
def test_log_mean_exp_is_the_formula(rewards, beta1):
    value = log_mean_exp(np.array([rewards], dtype=float), beta1)[0]
    assert value == pytest.approx(exactly(rewards, beta1), rel=1e-13, abs=1e-13)


def test_the_published_table_of_k_right_out_of_eight():
    expected = [0, 0.294, 0.477, 0.611, 0.717, 0.804, 0.878, 0.943, 1]
    np.testing.assert_allclose(estimate("log_mean_exp", zeros_and_ones(8), 0.5), expected, atol=5e-4)


def test_limits_of_beta1():
    rewards = np.array([[0.0, 1.0, 0.25, -2.0], [3.0, 3.0, 3.0, 3.0]])
    np.testing.assert_allclose(log_mean_exp(rewards, 1e12), [-0.1875, 3.0], rtol=1e-11)
    with np.errstate(all="raise"):
        for beta1 in (1e-3, 1e-300, 5e-324):
            assert log_mean_exp(rewards, beta1).tolist() == pytest.approx([1.0, 3.0], abs=1.4 * beta1 + 1e-15)
    np.testing.assert_array_equal(estimate("mean", rewards, 0.5), [-0.1875, 3.0])
    np.testing.assert_array_equal(estimate("max", rewards, 0.5), [1.0, 3.0])


# (p, N): exact bias and standard deviation of V* over k ~ Binomial(N, p) at b1 = 0.5, as published for the method.
STATISTICS = {
    (0.12, 1): (-0.165, 0.325),
    (0.12, 2): (-0.119, 0.309),
    (0.12, 4): (-0.075, 0.264),
    (0.12, 8): (-0.042, 0.204),
    (0.12, 16): (-0.022, 0.148),
    (0.12, 32): (-0.011, 0.105),
    (0.12, 64): (-0.005, 0.074),
    (0.5, 1): (-0.217, 0.5),
    (0.5, 4): (-0.047, 0.236),
    (0.5, 8): (-0.021, 0.149),
    (0.5, 16): (-0.010, 0.100),
    (0.5, 32): (-0.005, 0.069),
}


@pytest.mark.parametrize(("p", "n"), STATISTICS)
def test_bias_and_deviation_over_the_binomial(p, n):
    bias, rmse = bias_and_rmse(log_mean_exp(zeros_and_ones(n), 0.5), p, 0.5)
    assert (bias, sqrt(rmse**2 - bias**2)) == pytest.approx(STATISTICS[p, n], abs=6e-4)


@pytest.mark.parametrize(("p", "n"), [(0.05, 8), (0.3, 4)])
def test_expectation_of_a_small_beta1_is_pass_at_n(p, n):
    assert binomial(n, p) @ log_mean_exp(zeros_and_ones(n), 1e-9) == pytest.approx(1 - (1 - p) ** n, abs=1e-7)
    assert binomial(n, p) @ estimate("max", zeros_and_ones(n), 0.5) == pytest.approx(1 - (1 - p) ** n)


@pytest.mark.parametrize("beta1", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("p", [0.3, 0.5, 0.8])
def test_bias_and_deviation_approach_the_closed_forms(p, beta1):
    bias, rmse = bias_and_rmse(log_mean_exp(zeros_and_ones(400), beta1), p, beta1)
    assert (bias, sqrt(rmse**2 - bias**2)) == pytest.approx(closed_form(p, 400, beta1), rel=0.02)


# --- debiased


def test_debiased_adds_the_delta_methods_bias():
    """b1 var(W) / (2N Z^2) from the definition, with numpy's unbiased variance."""
    for row in ([0.0, 1.0, 1.0, 0.0, 1.0], [0.3, -2.5, 1.0]):
        for beta1 in (0.2, 0.5, 3.0):
            w = np.exp(np.array(row) / beta1)
            correction = beta1 * w.var(ddof=1) / (2 * len(row) * w.mean() ** 2)
            assert estimate("debiased", [row], beta1)[0] == pytest.approx(exactly(row, beta1) + correction, rel=1e-12)


@pytest.mark.parametrize(("p", "before", "after"), [(0.5, 0.151, 0.139), (0.12, 0.209, 0.222)])
def test_published_rmse_of_debiased(p, before, after):
    """N = 8, b1 = 0.5: most of the bias goes, the RMSE hardly changes."""
    bias, rmse = bias_and_rmse(estimate("log_mean_exp", zeros_and_ones(8), 0.5), p, 0.5)
    assert rmse == pytest.approx(before, abs=6e-4)
    less_bias, rmse = bias_and_rmse(estimate("debiased", zeros_and_ones(8), 0.5), p, 0.5)
    assert rmse == pytest.approx(after, abs=6e-4)
    assert abs(less_bias) < abs(bias) / 2


def test_bias_of_debiased_falls_with_the_square_of_n():
    for p in (0.3, 0.5, 0.8):
        less, least = (bias_and_rmse(estimate("debiased", zeros_and_ones(n), 0.5), p, 0.5)[0] for n in (50, 200))
        assert abs(least) < abs(less) / 12  # 16, and higher orders


# --- beta_smoothed


@pytest.mark.parametrize(("p", "rmse"), [(0.12, 0.161), (0.3, 0.160), (0.5, 0.130), (0.02, 0.148), (0.95, 0.042)])
def test_published_rmse_under_jeffreys_prior(p, rmse):
    assert bias_and_rmse(binary_value((np.arange(9) + 0.5) / 9, 0.5), p, 0.5)[1] == pytest.approx(rmse, abs=6e-4)


def test_binary_value_is_the_definition():
    for beta1 in (1e-3, 0.1, 0.5, 0.99, 1.0, 7.0, 1e6):
        for p in (0.0, 1e-9, 0.02, 0.5, 0.95, 1.0):
            assert binary_value(np.array([p]), beta1)[0] == pytest.approx(true_value(p, beta1), abs=1e-15, rel=1e-13)


@pytest.mark.parametrize("prior", [(0.3, 1.2), (0.4, 0.4), (1.0, 1.0), (5.0, 2.0)])
@pytest.mark.parametrize("counts", [(8,), (4, 6, 16, 40)], ids=["even", "ragged"])
def test_prior_of_a_large_store_is_recovered(prior, counts):
    rng = np.random.default_rng(7)
    counts_P = rng.choice(counts, 200_000)
    right_P = rng.binomial(counts_P, rng.beta(*prior, len(counts_P)))
    assert fit_beta_prior(right_P, counts_P) == pytest.approx(prior, rel=0.03)  # four standard errors or more


def test_prior_is_the_likeliest():
    """No other on a grid is likelier, by the beta-binomial's own formula."""
    counts_P = np.array([4, 4, 8, 8, 8, 2, 16, 5, 8, 4])
    right_P = np.array([0, 3, 1, 8, 5, 1, 16, 0, 0, 4])

    def log_likelihood(a: float, b: float) -> float:
        beta = mpmath.beta
        terms = zip(right_P.tolist(), counts_P.tolist(), strict=True)
        return float(sum(mpmath.log(beta(k + a, n - k + b) / beta(a, b)) for k, n in terms))

    best = log_likelihood(*fit_beta_prior(right_P, counts_P))
    grid = np.exp(np.linspace(-3, 3, 13))
    assert best >= max(log_likelihood(a, b) for a in grid for b in grid) - 1e-6


def test_smoothed_value_is_that_of_the_posterior_mean():
    rewards = SampledRewards.of_rows(RAGGED)
    a, b = fit_beta_prior(rewards.num_right(), rewards.counts_P)
    expected = [true_value((sum(row) + a) / (len(row) + a + b), 0.5) for row in RAGGED]
    np.testing.assert_allclose(estimate("beta_smoothed", RAGGED, 0.5), expected, rtol=1e-12)


def test_one_sample_of_each_prompt_is_smoothed_with_jeffreys_prior():
    expected = [true_value(0.25, 0.5), true_value(0.75, 0.5), true_value(0.25, 0.5)]
    np.testing.assert_allclose(estimate("beta_smoothed", [[0.0], [1.0], [0.0]], 0.5), expected, rtol=1e-12)


@pytest.mark.parametrize("rows", [[[1.0]] * 5, [[0.0] * 8] * 5, [[1.0] * 8] * 5, [[0.0, 1.0] * 4] * 5, [[1.0, 0.0]]])
def test_a_store_of_equal_prompts_has_finite_smoothed_values(rows):
    values = estimate("beta_smoothed", rows, 0.5)
    assert np.isfinite(values).all() and (values > 0).all() and (values < 1).all()


def test_smoothing_leaves_a_smaller_error_than_the_paper_where_success_rates_are_spread():
    """Averaged over p ~ U(0, 1), N = 8: .149 -> .126, published for Jeffreys' prior; the fitted one is no worse."""
    p_P = np.random.default_rng(3).random(200_000)
    rewards = (np.random.default_rng(4).random((len(p_P), 8)) < p_P[:, None]).astype(float)
    truth_P = 0.5 * np.log1p(p_P * np.expm1(2))
    rmse = {name: float(np.sqrt(np.mean((estimate(name, rewards, 0.5) - truth_P) ** 2))) for name in ESTIMATORS}
    assert rmse["log_mean_exp"] == pytest.approx(0.149, abs=1e-3)
    assert rmse["beta_smoothed"] < 0.127


@pytest.mark.parametrize("row", [[0.5, 1.0], [0.0, 2.0], [-1.0, 1.0], [1e-9]])
def test_smoothing_is_refused_for_other_rewards(row):
    with pytest.raises(ValueError) as caught:
        estimate("beta_smoothed", [[0.0, 1.0], row], 0.5)
    message = str(caught.value)
    assert "\n" not in message
    assert (
        message.startswith("vstar.estimator: beta_smoothed needs rewards of 0 and 1") and "use log_mean_exp" in message
    )


# --- all of them


def test_every_estimator_can_be_named_in_a_recipe():
    assert get_args(EstimatorName) == tuple(ESTIMATORS)


@pytest.mark.parametrize("beta1", [1e-6, 0.5, 1e6])
@pytest.mark.parametrize("name", OF_ONE_PROMPT)
def test_one_sample_is_its_reward(name, beta1):
    rewards = np.array([[0.0], [1.0], [-3.25], [1e6]])
    np.testing.assert_array_equal(estimate(name, rewards, beta1), rewards[:, 0])


@pytest.mark.parametrize("beta1", [1e-300, 1e-3, 1e6, 1e12])
@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_extreme_beta1(name, beta1):
    """Finite without a warning, and at the limits: the largest reward and the mean."""
    rows = [[0.0] * 8, [0.0] * 7 + [1.0], [1.0] * 8, [1.0, 0.0]]
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        values = estimate(name, rows, beta1)
    assert np.isfinite(values).all() and (values >= 0).all() and (values <= 1).all()
    if name in ("log_mean_exp", "debiased"):
        limit = [max(row) if beta1 < 1 else np.mean(row) for row in rows]
        np.testing.assert_allclose(values, limit, atol=max(3 * beta1, 1e-6) if beta1 < 1 else 1 / beta1)


@pytest.mark.parametrize("beta1", [1e-3, 0.5, 1e6])
@pytest.mark.parametrize("rows", [RAGGED, REAL_REWARDS, RAGGED[3:4]], ids=["0 and 1", "real", "one prompt"])
@pytest.mark.parametrize("name", OF_ONE_PROMPT)
def test_ragged_rewards_are_estimated_row_by_row(name, rows, beta1):
    expected = [estimate(name, [row], beta1)[0] for row in rows]
    np.testing.assert_array_equal(estimate(name, rows, beta1), expected)


@pytest.mark.parametrize("beta1", [1e-3, 0.5, 1e6])
@pytest.mark.parametrize("name", ["log_mean_exp", "mean", "max"])
def test_values_of_real_rewards_lie_between_the_least_and_the_largest(name, beta1):
    for row, value in zip(REAL_REWARDS, estimate(name, REAL_REWARDS, beta1), strict=True):
        assert min(row) - 1e-12 <= value <= max(row) + 1e-12


@pytest.mark.parametrize("name", OF_ONE_PROMPT)
def test_values_move_and_stretch_with_the_rewards(name):
    """V*(s r + t) at s b1 is s V*(r) + t at b1: no range of rewards is special."""
    moved = [[4.0 * reward - 2.5 for reward in row] for row in REAL_REWARDS]
    expected = 4.0 * estimate(name, REAL_REWARDS, 0.5) - 2.5
    np.testing.assert_allclose(estimate(name, moved, 2.0), expected, rtol=1e-12)


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_an_empty_store_has_no_values(name):
    values = estimate(name, [], 0.5)
    assert values.shape == (0,) and values.dtype == np.float64


# --- the samples themselves


def test_samples_per_prompt():
    assert SampledRewards.of_rows([[0.0] * 4, [1.0] * 4, [1.0] * 10]).samples == SamplesPerPrompt(4, 10, 6.0)
    assert str(SamplesPerPrompt(4, 10, 6.0)) == "4 to 10 (6.0 on average)"
    assert str(SampledRewards.of_rows(np.zeros((3, 8))).samples) == "8"
    assert SampledRewards.of_rows([]).samples == SamplesPerPrompt(0, 0, 0)


@pytest.mark.parametrize("rows", [RAGGED, [[0.0, 1.0, 1.0, 0.0]] * 3, []], ids=["ragged", "even", "empty"])
@pytest.mark.parametrize("num_samples", [1, 2, 4, 99])
def test_first_samples(rows, num_samples):
    first = SampledRewards.of_rows(rows).first(num_samples)
    expected = SampledRewards.of_rows([row[:num_samples] for row in rows])
    assert first.flat.tolist() == expected.flat.tolist()
    assert first.counts_P.tolist() == expected.counts_P.tolist()


@pytest.mark.parametrize(
    "rows", [RAGGED * 9, [[0.0, 1.0, 1.0, 0.0]] * 50, REAL_REWARDS * 9], ids=["ragged", "even", "real"]
)
def test_blocks_hold_every_prompt_once(rows, monkeypatch):
    monkeypatch.setattr("megatron_apo.values.samples.BLOCK_ROWS", 4)
    rewards = SampledRewards.of_rows(rows)
    found = {}
    for places, block_RN in rewards.blocks():
        assert len(block_RN) <= 4
        found |= dict(zip(np.arange(len(rows))[places].tolist(), block_RN.tolist(), strict=True))
    assert found == dict(enumerate(rows))
    np.testing.assert_allclose(rewards.per_prompt(lambda block_RN: block_RN.sum(axis=1)), [sum(row) for row in rows])
    assert rewards.first(2).flat.tolist() == [reward for row in rows for reward in row[:2]]


@pytest.mark.parametrize("part_rows", [1, 3, 7])
@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_parts_in_threads_give_the_same_values(name, part_rows, monkeypatch):
    for rows in (RAGGED, [[0.0, 1.0, 1.0, 0.0], [0.0] * 4, [1.0] * 4, [1.0, 0.0, 0.0, 0.0]]):
        expected = estimate(name, rows, 0.5)
        with monkeypatch.context() as patch:
            patch.setattr("megatron_apo.values.samples._PART_ROWS", part_rows)
            np.testing.assert_array_equal(estimate(name, rows, 0.5), expected)


def test_an_array_and_its_rows_are_the_same_samples():
    rewards_PN = np.random.default_rng(0).random((5, 3)).T  # not contiguous
    by_array, by_rows = SampledRewards.of_rows(rewards_PN), SampledRewards.of_rows(rewards_PN.tolist())
    assert by_array.flat.tolist() == by_rows.flat.tolist() and by_array.counts_P.tolist() == by_rows.counts_P.tolist()


def test_what_is_binary_and_right():
    assert SampledRewards.of_rows(RAGGED).are_binary() and SampledRewards.of_rows([]).are_binary()
    assert not SampledRewards.of_rows(REAL_REWARDS).are_binary()
    assert SampledRewards.of_rows(RAGGED).num_right().tolist() == [2, 1, 0, 2, 0, 2, 2]
    assert SampledRewards.of_rows(REAL_REWARDS).num_right().tolist() == [0, 1, 0, 1, 0]


# --- standard error


@pytest.mark.parametrize("beta1", [0.01, 0.25, 0.5, 1.0, 1e3])
@pytest.mark.parametrize("n", [1, 4, 8, 64])
def test_standard_error_of_zeros_and_ones_is_the_closed_form(n, beta1):
    """b1 c sqrt(p(1-p)/(n+1)) / (1+cp) at p = (k + 1/2) / (n + 1)."""
    errors = standard_error(zeros_and_ones(n), beta1, (0.0, 1.0))
    c = np.expm1(1 / beta1)
    p = (np.arange(n + 1) + 0.5) / (n + 1)
    np.testing.assert_allclose(errors, beta1 * c * np.sqrt(p * (1 - p) / (n + 1)) / (1 + c * p), rtol=1e-9)


@pytest.mark.parametrize("p", [0.3, 0.5, 0.8])
def test_standard_error_is_the_deviation_of_many_samples(p):
    n = 200
    _, rmse = bias_and_rmse(log_mean_exp(zeros_and_ones(n), 0.5), p, 0.5)
    assert standard_error(zeros_and_ones(n), 0.5, (0.0, 1.0))[round(n * p)] == pytest.approx(rmse, rel=0.02)


@pytest.mark.parametrize("beta1", [1e-300, 1e-3, 1e6])
def test_standard_error_at_an_extreme_beta1(beta1):
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        errors = standard_error(zeros_and_ones(8), beta1, (0.0, 1.0))
    assert np.isfinite(errors).all() and (errors >= 0).all()
    if beta1 > 1:  # that of the mean
        p = (np.arange(9) + 0.5) / 9
        np.testing.assert_allclose(errors, np.sqrt(p * (1 - p) / 9), rtol=1e-5)


def test_standard_error_moves_and_stretches_with_the_rewards():
    rewards = np.array([[0.0, 0.2, 1.0, 0.7], [0.0] * 4, [1.0] * 4])
    expected = 4.0 * standard_error(rewards, 0.5, (0.0, 1.0))
    np.testing.assert_allclose(standard_error(4.0 * rewards - 2.5, 2.0, (-2.5, 1.5)), expected, rtol=1e-12)
    assert (expected > 0).all()  # of equal rewards too
