"""What stage 2 learns from: prompts, and their V* from a store that was proven to belong to this run."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_apo.config import Recipe
from megatron_apo.data.order import step_prompts
from megatron_apo.data.prompts import Prompt
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.rollout.inputs import Inputs
from megatron_apo.values.store import PromptValues, VStarStore


@dataclass(frozen=True)
class TrainingData:
    """`prompts`: those that the recipe's filter keeps."""

    inputs: Inputs
    prompts: list[Prompt]
    vstar: PromptValues

    @classmethod
    def of(cls, recipe: Recipe, inputs: Inputs, store: VStarStore) -> TrainingData:
        """Filter the prompts. Raises `ValueError` if none is left, or one has no V*."""
        left_out = store.filtered_ids(recipe.vstar.filter, recipe.vstar.success_rate)
        prompts = [prompt for prompt in inputs.training.prompts if prompt.prompt_id not in left_out]
        vstar = store.values(recipe.vstar.beta1, recipe.vstar.estimator)
        if not prompts:
            raise ValueError(
                f"vstar.filter: {recipe.vstar.filter} leaves none of {len(store)} prompts; choose another filter"
            )
        vstar.lookup([prompt.prompt_id for prompt in prompts])
        return cls(inputs, prompts, vstar)

    def prompts_of(self, recipe: Recipe, step: int, samples_per_prompt: int) -> list[Prompt]:
        """The prompts of step `step` (from 0), each as often as responses of it are wanted."""
        chosen = step_prompts(
            step, num_prompts=len(self.prompts), prompts_per_step=recipe.train.prompts_per_step, seed=recipe.run.seed
        )
        return [self.prompts[index] for index in chosen for _ in range(samples_per_prompt)]

    def values(self, batch: RolloutBatch) -> dict[str, float]:
        """V* of the batch's prompts."""
        return dict(zip(batch.prompt_ids, self.vstar.lookup(list(batch.prompt_ids)).tolist(), strict=True))
