"""Prompts of a recipe that has its `data` alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_apo.config import build_recipe
from megatron_apo.data.procedural import Part
from megatron_apo.data.prompts import LoadedPrompts, load_part
from megatron_apo.data.rendering import PromptRenderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_data(
    tokenizer: PreTrainedTokenizerBase, data: dict[str, Any], part: Part = "train", **reward: Any
) -> LoadedPrompts:
    """As a command loads them. reward: the recipe's, `math` by default."""
    tree = {"model": {"path": "m"}, "vstar": {"dir": "v"}, "data": data, "reward": reward}
    recipe = build_recipe(tree)
    return load_part(recipe, part, PromptRenderer(tokenizer, recipe.data))
