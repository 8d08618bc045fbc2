"""How many samples a prompt gets: N, or further rounds while its V* is uncertain.

What is decided for a prompt depends on its own rewards alone, so that any worker decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megatron_apo.config import AdaptiveConfig
from megatron_apo.values.estimators import standard_error
from megatron_apo.values.samples import all_wrong


def more_samples(rewards: Sequence[float], first: int, adaptive: AdaptiveConfig | None) -> int:
    """How many further samples a prompt with these rewards (NaN: of a masked sample) needs; 0: it has enough.

    first: of the first round. After it, rounds of `adaptive.step` follow until V*'s standard error (`standard_error`,
    smoothed) is at most `adaptive.stderr`, and an all-wrong prompt has `adaptive.all_wrong` samples, of those that are
    not masked. None has more than `adaptive.most`, masked ones among them. Raises `ValueError` for a reward outside
    `adaptive.reward_range`, whose standard error would be too small.
    """
    if not rewards:
        return first
    if adaptive is None:
        return 0
    known = [reward for reward in rewards if not math.isnan(reward)]
    low, high = adaptive.reward_range
    if outside := [reward for reward in known if not low <= reward <= high]:
        raise ValueError(
            f"vstar.adaptive.reward_range: [{low:g}, {high:g}], and here is a reward of "
            f"{min(outside) if min(outside) < low else max(outside):g}; give the lowest and highest that there can be"
        )
    left = adaptive.most - len(rewards)
    if left <= 0 or (known and _is_certain(known, adaptive)):
        return 0
    return min(adaptive.step, left)


def _is_certain(known: Sequence[float], adaptive: AdaptiveConfig) -> bool:
    rewards_1N = np.array([known], dtype=np.float64)
    error = standard_error(rewards_1N, adaptive.beta1, adaptive.reward_range)[0]
    return bool(error <= adaptive.stderr) and not (all_wrong(rewards_1N)[0] and len(known) < adaptive.all_wrong)
