"""Training methods: pure tensor maths, one file each. `build_objective(config)` makes the recipe's."""

from megatron_apo.config import ObjectiveConfig
from megatron_apo.objectives.apo import APO
from megatron_apo.objectives.base import OBJECTIVES, LossTerm, Micro, Objective, Prepared, Samples, Stats
from megatron_apo.objectives.sft import SFT

__all__ = [
    "APO",
    "OBJECTIVES",
    "SFT",
    "LossTerm",
    "Micro",
    "Objective",
    "Prepared",
    "Samples",
    "Stats",
    "build_objective",
]


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective a recipe names, with its settings."""
    return OBJECTIVES[config.name](**config.model_dump(exclude={"name"}))
