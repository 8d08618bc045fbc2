"""Supervised fine-tuning: minus the mean log-prob of the target tokens. The warm start of the demonstration."""

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
)


@dataclass(frozen=True)
class SFT:
    """Cross-entropy, averaged over the global batch's target tokens."""

    reinforce_scale: float = 1.0
    samples_per_prompt: ClassVar[int] = 1
    ratio_denominator: ClassVar[RatioDenominator] = "none"
    needs_critic: ClassVar[bool] = False
    unit: ClassVar[Literal["sequence", "token"]] = "token"
    importance_levels: ClassVar[tuple[ImportanceLevel, ...]] = ()

    def prepare(self, samples: Samples, values: Mapping[str, float]) -> Prepared:
        return Prepared(per_sequence={}, per_token={})

    def loss(self, log_prob_R: Tensor, denominator_R: Tensor, sequence_R: Tensor, targets: MicroTargets) -> LossTerm:
        total = -log_prob_R.sum()
        return LossTerm(total, len(log_prob_R), Stats({"loss": total.detach()}))


OBJECTIVES["sft"] = SFT
