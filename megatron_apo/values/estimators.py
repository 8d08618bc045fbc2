"""V* of a prompt from the rewards of its n samples of the reference policy (A*-PO, arXiv 2505.20686, equation 4).

    V*(x) = b1 log E exp(r/b1),    r of responses of pi_ref

An estimator is a row of `ESTIMATORS`; rewards are stored, so a new one needs no new samples. With
W = exp(r/b1) and Z its mean over the samples, for 0/1 rewards with success rate p and c = exp(1/b1) - 1:

    log_mean_exp     b1 log Z: the paper's. Never too large on average (Jensen); bias -b1 c^2 p(1-p) / (2n (1+pc)^2)
    debiased         + b1 var(W) / (2n Z^2), var unbiased: takes the bias's first order out (the delta method)
    beta_smoothed    b1 log(1 + c (k+a)/(n+a+b)), k right of n; a and b of the Beta prior under which the whole store's
                     counts are likeliest (beta-binomial): lends each prompt what the others say. 0/1 rewards only
    mean             the limit of a large b1            max    the limit of a small b1; Pass@n in expectation

One sample alone is its own reward, but under `beta_smoothed`. Without samples, all being masked, V* is NaN.
Shapes: P prompts; blocks of R prompts with n samples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_apo.values.samples import Array, SampledRewards

Estimator = Callable[[SampledRewards, float], Array]
_PRIOR_BOUNDS = (1e-2, 1e3)  # of a and b: a store of equal counts would send them to 0 or infinity


def log_mean_exp(rewards_RN: Array, beta1: float) -> Array:
    """[R] b1 log mean exp(r/b1), finite for every b1 > 0, between the mean and the largest reward."""
    largest_R, excess_RN = _relative_weights(rewards_RN, beta1)
    with np.errstate(over="ignore", under="ignore"):
        return largest_R + beta1 * np.log1p(excess_RN.mean(axis=1))


def debiased(rewards_RN: Array, beta1: float) -> Array:
    """[R] `log_mean_exp` and the delta method's estimate of its bias, which is 0 for a single sample.

    It may exceed the largest reward: cut there, it would be biased again.
    """
    n = rewards_RN.shape[1]
    if n == 1:
        return rewards_RN[:, 0].copy()
    largest_R, excess_RN = _relative_weights(rewards_RN, beta1)
    with np.errstate(over="ignore", under="ignore"):
        mean_R = excess_RN.mean(axis=1)
        relative_variance_R = excess_RN.var(axis=1, ddof=1) / np.square(1 + mean_R)
        return largest_R + beta1 * (np.log1p(mean_R) + relative_variance_R / (2 * n))


def beta_smoothed(rewards: SampledRewards, beta1: float) -> Array:
    """[P] V* at the posterior mean of each prompt's success rate. Raises `ValueError` unless rewards are 0 or 1."""
    if not rewards.are_binary():
        raise ValueError(
            "vstar.estimator: beta_smoothed needs rewards of 0 and 1, and this store has others; "
            "use log_mean_exp or debiased"
        )
    has_samples_P = rewards.counts_P > 0
    right, counts = rewards.num_right()[has_samples_P], rewards.counts_P[has_samples_P]
    a, b = fit_beta_prior(right, counts)
    values_P = np.full(len(rewards), np.nan)
    values_P[has_samples_P] = binary_value((right + a) / (counts + a + b), beta1)
    return values_P


def binary_value(success_rate: Array, beta1: float) -> Array:
    """b1 log(1 + c p), the exact V* of 0/1 rewards with success rate p; finite for every b1 > 0."""
    if beta1 >= 1:  # where b1 is large, the log of 1 + tiny would lose the tiny
        return beta1 * np.log1p(success_rate * np.expm1(1 / beta1))
    with np.errstate(divide="ignore"):  # where it is small, c overflows
        return 1 + beta1 * np.logaddexp(np.log(success_rate), np.log1p(-success_rate) - 1 / beta1)


def fit_beta_prior(right_P: np.ndarray, counts_P: np.ndarray) -> tuple[float, float]:
    """(a, b) of the Beta distribution of success rates under which `right_P` of `counts_P` is likeliest.

    Jeffreys' (1/2, 1/2) where there is nothing to fit: no prompt has two samples.
    """
    from scipy.optimize import minimize  # half a second, for this estimator alone
    from scipy.special import betaln

    if not len(counts_P) or counts_P.max() < 2:
        return 0.5, 0.5
    base = int(counts_P.max()) + 1
    pairs, weights = np.unique(counts_P * base + right_P, return_counts=True)  # few, whatever the store's size
    n, k = np.divmod(pairs, base)

    def negative_log_likelihood(log_prior: Array) -> float:
        a, b = np.exp(log_prior)
        return -float((weights * (betaln(k + a, n - k + b) - betaln(a, b))).sum() / weights.sum())

    bounds = [tuple(np.log(_PRIOR_BOUNDS))] * 2
    found = minimize(negative_log_likelihood, np.log([0.5, 0.5]), bounds=bounds, method="L-BFGS-B")
    a, b = np.exp(found.x)
    return float(a), float(b)


def standard_error(rewards_RN: Array, beta1: float, reward_range: tuple[float, float]) -> Array:
    """[R] standard error of V* (delta method), with half a sample at each end of `reward_range` beside the n seen.

    Without them n equal rewards would have no error at all. For 0/1 rewards this is
    b1 c sqrt(p(1-p)/(n+1)) / (1+cp) at Jeffreys' p = (k + 1/2) / (n + 1).
    """
    n = rewards_RN.shape[1]
    ends_R2 = np.broadcast_to(np.array(reward_range, dtype=np.float64), (len(rewards_RN), 2))
    _, excess = _relative_weights(np.concatenate([rewards_RN, ends_R2], axis=1), beta1)
    share = np.array([1.0] * n + [0.5, 0.5]) / (n + 1)
    with np.errstate(under="ignore"):
        mean_R = excess @ share
        variance_R = np.square(excess - mean_R[:, None]) @ share
        return beta1 * np.sqrt(variance_R / (n + 1)) / (1 + mean_R)


def _relative_weights(rewards_RN: Array, beta1: float) -> tuple[Array, Array]:
    """[R] the largest reward and [R, n] W over its largest, less 1.

    exp(1/b1) overflows for a small b1, so the largest reward is taken out; less 1, because for a large b1
    b1 log(1 + tiny) would lose the tiny.
    """
    largest_R = rewards_RN.max(axis=1)
    with np.errstate(over="ignore", under="ignore"):
        return largest_R, np.expm1((rewards_RN - largest_R[:, None]) / beta1)


def _by_prompt(estimate: Callable[[Array, float], Array]) -> Estimator:
    return lambda rewards, beta1: rewards.per_prompt(lambda rewards_RN: estimate(rewards_RN, beta1))


ESTIMATORS: dict[str, Estimator] = {
    "log_mean_exp": _by_prompt(log_mean_exp),
    "debiased": _by_prompt(debiased),
    "beta_smoothed": beta_smoothed,
    "mean": _by_prompt(lambda rewards_RN, beta1: rewards_RN.mean(axis=1)),
    "max": _by_prompt(lambda rewards_RN, beta1: rewards_RN.max(axis=1)),
}
