"""The recipe: everything a run is, in one YAML file plus dotted overrides.

    recipe = load_recipe("recipe.yaml", ["train.steps=50", "parallel.tp=2"])

Each field's `description` is its documentation (`megatron-apo doctor --fields` prints them).
Every problem of a recipe is found before any work and reported at once, one line each: the key, its
value, what is allowed and the fix. Unknown keys are errors. This package imports nothing heavy.

A section has its module, or shares one with its like, which checks what the section can judge alone or with sections
below it. `recipe.py` puts them together and checks the rest, `load.py` reads one, and `fields.py` says what its fields
are to a resumed run and to a V* store.
"""

from megatron_apo.config.base import RecipeError
from megatron_apo.config.data import TASK, DataConfig, RowsConfig
from megatron_apo.config.fields import changed_for_resume, describe_fields, fields_marked, values_marked
from megatron_apo.config.load import build_recipe, load_recipe
from megatron_apo.config.model import FP8Config, ModelConfig
from megatron_apo.config.objective import APOConfig, BaselineConfig, ObjectiveConfig
from megatron_apo.config.optimizer import OptimizerConfig
from megatron_apo.config.parallel import ParallelConfig
from megatron_apo.config.recipe import Recipe, aligned
from megatron_apo.config.reward import GraderConfig, RewardConfig
from megatron_apo.config.rollout import RolloutConfig
from megatron_apo.config.sampling import SamplingConfig
from megatron_apo.config.shipped import RECIPES, model_config_file, recipe_path, shape_name, shapes
from megatron_apo.config.sources import Source
from megatron_apo.config.sync import Difference, MismatchConfig, SyncConfig
from megatron_apo.config.train import RecomputeModule, TrainConfig
from megatron_apo.config.vstar import AdaptiveConfig, EstimatorName, VStarConfig

__all__ = [
    "RECIPES",
    "TASK",
    "AdaptiveConfig",
    "DataConfig",
    "Difference",
    "EstimatorName",
    "FP8Config",
    "GraderConfig",
    "MismatchConfig",
    "ModelConfig",
    "APOConfig",
    "BaselineConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Recipe",
    "RecipeError",
    "RecomputeModule",
    "RewardConfig",
    "RolloutConfig",
    "RowsConfig",
    "SamplingConfig",
    "Source",
    "SyncConfig",
    "TrainConfig",
    "VStarConfig",
    "aligned",
    "build_recipe",
    "changed_for_resume",
    "describe_fields",
    "fields_marked",
    "load_recipe",
    "model_config_file",
    "recipe_path",
    "shape_name",
    "shapes",
    "values_marked",
]
