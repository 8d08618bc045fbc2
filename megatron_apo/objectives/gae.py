"""Generalized advantage estimation over the tokens of one response (arXiv 1506.02438, equation 16).

    delta_t = r_t + gamma V_{t+1} - V_t          V after the last token is 0: the response is over
    A_t     = sum_{k >= 0} (gamma lambda)^k delta_{t+k}
    return  = A_t + V_t                           what the critic learns

lambda = 1: A_t = (discounted rewards from t on) - V_t. lambda = 0: A_t = delta_t.

Shapes: T tokens of the response.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(reward_T: Tensor, value_T: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """([T] advantages, [T] returns), fp32. value_T: the critic's value before each token."""
    value_T = value_T.double()
    next_T = torch.cat([value_T[1:], value_T.new_zeros(1)])
    advantage_T = _discounted_sums(reward_T.double() + gamma * next_T - value_T, gamma * lam)
    return advantage_T.float(), (advantage_T + value_T).float()


def _discounted_sums(delta_T: Tensor, decay: float) -> Tensor:
    """[T] sum_{k >= 0} decay^k delta_{t+k}, by sums over windows of 1, 2, 4 .. tokens rather than token by token."""
    sums_T, window = delta_T, 1
    while window < len(delta_T):
        after_T = torch.cat([sums_T[window:], sums_T.new_zeros(window)])
        sums_T, window = sums_T + decay**window * after_T, 2 * window
    return sums_T
