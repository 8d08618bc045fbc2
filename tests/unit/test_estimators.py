"""V* estimators against their limits, exact arithmetic and the binomial distribution."""

from __future__ import annotations

from math import comb, sqrt

import mpmath
import numpy as np
import pytest

from megatron_apo.values.estimators import ESTIMATORS, log_mean_exp


def exactly(rewards, beta1):
    """b1 log mean exp(r / b1) in 60 digits, straight from the formula."""
    with mpmath.workdps(60):
        beta1 = mpmath.mpf(beta1)
        return float(beta1 * mpmath.log(mpmath.fsum(mpmath.exp(mpmath.mpf(r) / beta1) for r in rewards) / len(rewards)))


@pytest.mark.parametrize("beta1", [1e-3, 0.01, 0.1, 0.5, 1.0, 10.0, 1e4, 1e9])
@pytest.mark.parametrize("rewards", [[0, 1, 1, 0, 0, 0, 0, 1], [-3.5, 0.25, 7.0], [0.1] * 5, [-1000.0, -1001.0], [2.0]])
def test_log_mean_exp_is_the_formula(rewards, beta1):
    value = log_mean_exp(np.array([rewards], dtype=float), beta1)[0]
    assert value == pytest.approx(exactly(rewards, beta1), rel=1e-13, abs=1e-13)


def test_the_published_table_of_k_right_out_of_eight():
    rewards = np.array([[1.0] * k + [0.0] * (8 - k) for k in range(9)])
    expected = [0, 0.294, 0.477, 0.611, 0.717, 0.804, 0.878, 0.943, 1]
    np.testing.assert_allclose(ESTIMATORS["log_mean_exp"](rewards, 0.5), expected, atol=5e-4)


def test_limits_of_beta1():
    rewards = np.array([[0.0, 1.0, 0.25, -2.0], [3.0, 3.0, 3.0, 3.0]])
    np.testing.assert_allclose(log_mean_exp(rewards, 1e12), [-0.1875, 3.0], rtol=1e-11)
    with np.errstate(all="raise"):
        for beta1 in (1e-3, 1e-300, 5e-324):
            assert log_mean_exp(rewards, beta1).tolist() == pytest.approx([1.0, 3.0], abs=1.4 * beta1 + 1e-15)
    np.testing.assert_array_equal(ESTIMATORS["mean"](rewards, 0.5), [-0.1875, 3.0])
    np.testing.assert_array_equal(ESTIMATORS["max"](rewards, 0.5), [1.0, 3.0])


@pytest.mark.parametrize("beta1", [1e-6, 0.5, 1e6])
@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_one_sample_is_its_reward(name, beta1):
    rewards = np.array([[0.0], [1.0], [-3.25], [1e6]])
    np.testing.assert_array_equal(ESTIMATORS[name](rewards, beta1), rewards[:, 0])


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
    values = log_mean_exp(np.array([[1.0] * k + [0.0] * (n - k) for k in range(n + 1)]), 0.5)
    weights = np.array([comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])
    truth = 0.5 * float(mpmath.log(1 - p + p * mpmath.exp(2)))
    mean = float(weights @ values)
    deviation = sqrt(float(weights @ (values - mean) ** 2))
    assert (mean - truth, deviation) == pytest.approx(STATISTICS[p, n], abs=6e-4)


@pytest.mark.parametrize(("p", "n"), [(0.05, 8), (0.3, 4)])
def test_expectation_of_a_small_beta1_is_pass_at_n(p, n):
    values = log_mean_exp(np.array([[1.0] * k + [0.0] * (n - k) for k in range(n + 1)]), 1e-9)
    weights = np.array([comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])
    assert weights @ values == pytest.approx(1 - (1 - p) ** n, abs=1e-7)
