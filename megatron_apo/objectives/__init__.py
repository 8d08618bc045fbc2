"""Training methods: pure tensor maths, one file each. `objective_of` makes a recipe's."""

from dataclasses import fields

from megatron_apo.config import ObjectiveConfig, Recipe
from megatron_apo.objectives.apo import APO
from megatron_apo.objectives.base import OBJECTIVES, Cost, LossTerm, Micro, Objective, Prepared, Samples, Stats
from megatron_apo.objectives.grpo import DAPO, GRPO, DrGRPO
from megatron_apo.objectives.ppo import PPO
from megatron_apo.objectives.rebel import REBEL
from megatron_apo.objectives.reinforce import REINFORCE
from megatron_apo.objectives.rloo import RLOO
from megatron_apo.objectives.sft import SFT
from megatron_apo.objectives.tbrm import TBRM

__all__ = [
    "APO",
    "DAPO",
    "GRPO",
    "OBJECTIVES",
    "PPO",
    "REBEL",
    "REINFORCE",
    "RLOO",
    "SFT",
    "TBRM",
    "Cost",
    "DrGRPO",
    "LossTerm",
    "Micro",
    "Objective",
    "Prepared",
    "Samples",
    "Stats",
    "build_objective",
    "objective_of",
]


def objective_of(recipe: Recipe) -> Objective:
    """A recipe's."""
    return build_objective(recipe.objective, max_response_tokens=recipe.sampling.max_response_tokens)


def build_objective(config: ObjectiveConfig, *, max_response_tokens: int) -> Objective:
    """The objective that a recipe's section names, with its settings.

    max_response_tokens: the length cap of sampling, for methods that have a field of that name. Where a baseline comes
    from, and the critic's own settings, are not the objective's.
    """
    method = OBJECTIVES[config.name]
    settings = config.model_dump(exclude={"name", "baseline", "critic"})
    if "max_response_tokens" in {field.name for field in fields(method)}:  # type: ignore[arg-type]
        settings["max_response_tokens"] = max_response_tokens
    return method(**settings)
