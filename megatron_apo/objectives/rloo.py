"""RLOO: REINFORCE whose baseline is the mean reward of the prompt's other responses (arXiv 2402.14740, section 2.2).

    A_i = R_i - 1/(n-1) sum_{j != i} R_j         R = r - kl_coefficient * log( pi_old(y) / pi_ref(y) )

The whole response is one action. It is n / (n-1) times R_i - mean R, and independent of y_i, so that the gradient is
unbiased. A response that is alone in its group has the advantage 0. In all else it is reinforce.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_apo.objectives.base import OBJECTIVES, Samples
from megatron_apo.objectives.group import leave_one_out_mean
from megatron_apo.objectives.reinforce import REINFORCE


@dataclass(frozen=True)
class RLOO(REINFORCE):
    samples_per_prompt: int = 4

    takes_baseline = False
    targets_by = "group"

    def baseline(self, samples: Samples, reward_K: Tensor) -> Tensor:
        return leave_one_out_mean(reward_K, samples.group_K)


OBJECTIVES["rloo"] = RLOO
