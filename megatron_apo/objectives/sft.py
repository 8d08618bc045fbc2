"""Supervised fine-tuning: minus the mean log-prob of the target tokens. The warm start of the demonstration."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_apo.objectives.base import OBJECTIVES, LossTerm, Micro, Objective, Prepared, Samples, Stats


@dataclass(frozen=True)
class SFT(Objective):
    """Cross-entropy, averaged over the global batch's target tokens."""

    unit = "token"
    importance_levels = ()

    def prepare(self, samples: Samples) -> Prepared:
        return Prepared()

    def loss(self, micro: Micro, prepared: Prepared) -> LossTerm:
        total = -micro.value_R.sum()
        return LossTerm(total, len(micro.value_R), Stats({"loss": total.detach()}))


OBJECTIVES["sft"] = SFT
