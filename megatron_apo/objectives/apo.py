"""A*-PO: regression of the log-ratio onto the optimal advantage (arXiv 2505.20686, equation 4).

    loss(x, y) = ( b2 * log(pi(y|x) / pi_ref(y|x)) + V*(x) - r(x, y) )^2

log(pi/pi_ref) is summed over the whole response, stop id included, before squaring. Divided by 2*b2 (`unit`) its
on-policy gradient is REINFORCE's with baseline V* and a KL penalty b2; the paper's scale is 2*b2 times that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_apo.objectives.base import (
    ADVANTAGE,
    OBJECTIVES,
    LossTerm,
    Micro,
    Objective,
    Prepared,
    Samples,
    Stats,
    advantage_metrics,
)


@dataclass(frozen=True)
class APO(Objective):
    """b2 = `beta2`; b1 is in how V* was estimated. With several samples a prompt each has the prompt's V*."""

    beta2: float = 1e-3
    loss_scale: Literal["paper", "unit"] = "paper"
    samples_per_prompt: int = 1

    loss_log_probs = frozenset({"reference"})
    takes_baseline = True
    importance_levels = ("token", "sequence")
    targets_by = "sequence"
    sequence_targets = ("advantage",)
    told = ADVANTAGE | {"value/mean"}

    @property
    def reinforce_scale(self) -> float:
        return 2 * self.beta2 if self.loss_scale == "paper" else 1.0

    def prepare(self, samples: Samples) -> Prepared:
        """advantage = r - V*, the optimal advantage's estimate, per sequence."""
        assert samples.value_K is not None
        advantage_K = samples.reward_K - samples.value_K
        return Prepared({"advantage": advantage_K}, metrics=advantage_metrics(advantage_K, samples.value_K))

    def loss(self, micro: Micro, prepared: Prepared) -> LossTerm:
        advantage_B = micro.of_sequences(prepared.per_sequence["advantage"])
        log_ratio_B = micro.sums(micro.value_R - micro.fixed["reference"])
        square_B = (self.beta2 * log_ratio_B - advantage_B).square()
        total = square_B.sum() / (1.0 if self.loss_scale == "paper" else 2 * self.beta2)
        return LossTerm(total, len(micro.places), Stats({"loss": total.detach()}))


OBJECTIVES["apo"] = APO
