"""The clipped surrogate of PPO (arXiv 1707.06347, equation 7), with a bound on either side of its own.

    w_t = pi(y_t) / pi_old(y_t)
    surrogate_t = min( w_t A_t, clip(w_t, 1 - low, 1 + high) A_t )

Where the minimum is the clipped one there is no gradient: above 1 + high with A > 0, below 1 - low with A < 0. A higher
`high` than `low` is DAPO's clip-higher (2503.14476). Nothing bounds w_t above where A < 0, unless `dual` > 1 does:
max(surrogate, dual A) (dual-clip PPO, 1912.09729, equation 5).

Shapes: R response tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_apo.objectives.base import averaged

CLIPPED = frozenset({"clip/low", "clip/high", "clip/dual"})


def clipped_surrogate(
    log_ratio_R: Tensor, advantage_R: Tensor, low: float | None, high: float | None, dual: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """([R] surrogate to maximise, sums that tell which share of the tokens each bound took out of the gradient).

    log_ratio_R: log w_t. None: no bound.
    """
    low, high, dual = (math.inf if bound is None else bound for bound in (low, high, dual))
    ratio_R = log_ratio_R.exp()
    plain_R = ratio_R * advantage_R
    surrogate_R = torch.minimum(plain_R, ratio_R.clamp(1 - low, 1 + high) * advantage_R)
    is_dual_R = (advantage_R < 0) & (ratio_R > dual)
    if math.isfinite(dual):
        surrogate_R = torch.where(is_dual_R, dual * advantage_R, surrogate_R)
    stats = {
        **averaged("clip/low", (advantage_R < 0) & (ratio_R < 1 - low)),
        **averaged("clip/high", (advantage_R > 0) & (ratio_R > 1 + high)),
        **averaged("clip/dual", is_dual_R),
    }
    return surrogate_R, stats
