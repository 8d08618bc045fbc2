"""V* of a prompt from the rewards of N responses of the reference policy (A*-PO, arXiv 2505.20686, equation 4).

    V*(x) = b1 * log( (1/N) * sum_i exp(r_i / b1) )

b1 -> infinity gives the mean reward, b1 -> 0 the largest one, and N = 1 the reward itself. An estimator is a row
of `ESTIMATORS`; rewards are stored, so a new one needs no new samples. Shapes: P prompts, N samples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Estimator = Callable[[Array, float], Array]


def log_mean_exp(rewards_PN: Array, beta1: float) -> Array:
    """[P] b1 * log mean_N exp(r / b1), finite for every beta1 > 0 and bounded by the mean and the largest reward."""
    largest_P = rewards_PN.max(axis=1)
    # exp(1/b1) overflows for small b1: the largest reward is taken out. expm1 and log1p keep b1 * log(1 + tiny) exact
    # for large b1.
    with np.errstate(over="ignore", under="ignore"):
        excess_PN = np.expm1((rewards_PN - largest_P[:, None]) / beta1)
        return largest_P + beta1 * np.log1p(excess_PN.mean(axis=1))


def mean(rewards_PN: Array, beta1: float) -> Array:
    """[P] mean reward: the limit of a large b1, which it ignores."""
    return rewards_PN.mean(axis=1)


def best(rewards_PN: Array, beta1: float) -> Array:
    """[P] largest reward: the limit of a small b1, which it ignores. For 0/1 rewards its expectation is Pass@N."""
    return rewards_PN.max(axis=1)


ESTIMATORS: dict[str, Estimator] = {"log_mean_exp": log_mean_exp, "mean": mean, "max": best}
