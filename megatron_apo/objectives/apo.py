"""A*-PO: regression of the log-ratio onto the optimal advantage (arXiv 2505.20686, equation 4).

    loss(x, y) = ( b2 * log(pi(y|x) / pi_ref(y|x)) + V*(x) - r(x, y) )^2

log(pi/pi_ref) is summed over the whole response, stop id included, before squaring. Divided by 2*b2 (`unit`) its
on-policy gradient is REINFORCE's with baseline V* and a KL penalty b2; the paper's scale is 2*b2 times that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from megatron_apo.objectives.base import (
    OBJECTIVES,
    ImportanceLevel,
    LossTerm,
    MicroTargets,
    Prepared,
    RatioDenominator,
    Samples,
    Stats,
    sequence_sum,
)


@dataclass(frozen=True)
class APO:
    """b2 = `beta2`; b1 is in how V* was estimated."""

    beta2: float = 1e-3
    loss_scale: Literal["paper", "unit"] = "paper"

    samples_per_prompt: ClassVar[int] = 1
    ratio_denominator: ClassVar[RatioDenominator] = "reference"
    needs_critic: ClassVar[bool] = False
    unit: ClassVar[Literal["sequence", "token"]] = "sequence"
    importance_levels: ClassVar[tuple[ImportanceLevel, ...]] = ("token", "sequence")

    @property
    def reinforce_scale(self) -> float:
        return 2 * self.beta2 if self.loss_scale == "paper" else 1.0

    def prepare(self, samples: Samples, values: Mapping[str, float]) -> Prepared:
        """advantage = r - V*, the optimal advantage's estimate, per sequence. A prompt without V* is a KeyError."""
        reward_B = samples.reward_B.float()
        value_B = reward_B.new_tensor([values[prompt_id] for prompt_id in samples.prompt_ids])
        return Prepared(per_sequence={"advantage": reward_B - value_B}, per_token={})

    def loss(self, log_prob_R: Tensor, denominator_R: Tensor, sequence_R: Tensor, targets: MicroTargets) -> LossTerm:
        advantage_B = targets.per_sequence["advantage"]
        log_ratio_B = sequence_sum(log_prob_R - denominator_R, sequence_R, len(advantage_B))
        square_B = (self.beta2 * log_ratio_B - advantage_B).square()
        total = square_B.sum() / (1.0 if self.loss_scale == "paper" else 2 * self.beta2)
        return LossTerm(total, len(advantage_B), Stats({"loss": total.detach()}))


OBJECTIVES["apo"] = APO
