"""What tests and benchmarks of V* stores share: a fingerprint, and what is exactly true of 0/1 rewards."""

from __future__ import annotations

from math import comb, sqrt

import mpmath
import numpy as np

from megatron_apo.values.fingerprint import Fingerprint

FINGERPRINT = Fingerprint(
    model_hash="ab" * 32,
    tokenizer_hash="cd" * 32,
    template_hash="ef" * 32,
    template="chat",
    thinking="on",
    temperature=1.0,
    top_p=1.0,
    top_k=-1,
    max_response_tokens=32,
    stop_token_ids=[1, 2],
    reward_name="arithmetic",
    reward_version="1",
    reward_options={},
    failure_reward=0.0,
    truncated="grade",
    dataset_hash="01" * 32,
    max_prompt_tokens=16,
    samples_per_prompt=2,
    seed=3,
)


def zeros_and_ones(n: int) -> np.ndarray:
    """[n + 1, n] with k ones in row k."""
    return np.tri(n + 1, n, -1)


def binomial(n: int, p: float) -> np.ndarray:
    return np.array([comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])


def true_value(p: float, beta1: float) -> float:
    """b1 log E exp(r / b1) for success rate p, straight from the definition."""
    with mpmath.workdps(40):
        p_exact, beta1_exact = mpmath.mpf(p), mpmath.mpf(beta1)
        return float(beta1_exact * mpmath.log(1 - p_exact + p_exact * mpmath.exp(1 / beta1_exact)))


def bias_and_rmse(values: np.ndarray, p: float, beta1: float) -> tuple[float, float]:
    """Of an estimator that says values[k] of k right out of n."""
    errors = values - true_value(p, beta1)
    weights = binomial(len(values) - 1, p)
    return float(weights @ errors), sqrt(float(weights @ errors**2))


def closed_form(p: float, n: int, beta1: float) -> tuple[float, float]:
    """Bias and standard deviation of log_mean_exp to the first order in 1/n, with c = exp(1/b1) - 1:
    -b1 c^2 p(1-p) / (2n (1+pc)^2) and b1 c sqrt(p(1-p)/n) / (1+pc)."""
    c = np.expm1(1 / beta1)
    deviation = c * sqrt(p * (1 - p) / n) / (1 + p * c)
    return -beta1 * deviation**2 / 2, beta1 * deviation
