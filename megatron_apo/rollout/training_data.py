"""What stage 2 learns from: prompts and, where it asks for them, their V* from a store that was proven to be this
run's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from megatron_apo.config import BaselineConfig, Recipe
from megatron_apo.data.prompts import Prompt
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.rollout.inputs import Inputs
from megatron_apo.rollout.stored_prompts import check_rendered
from megatron_apo.values.baselines import Baseline, BatchMean, GroupMean, LeaveOneOut, Offline
from megatron_apo.values.kernel import KernelSmoothed
from megatron_apo.values.store import NO_VALUE, PromptValues, VStarStore


@dataclass(frozen=True)
class TrainingData:
    """`prompts`: those that the recipe's filter keeps. vstar: none where training asks for no store."""

    inputs: Inputs
    prompts: list[Prompt]
    vstar: PromptValues | None

    @classmethod
    def of(cls, recipe: Recipe, inputs: Inputs, store: VStarStore | None) -> TrainingData:
        """Filter the prompts. Raises `ValueError` if none is left, or one has no V* or was sampled as other text."""
        if store is None:
            return cls(inputs, inputs.training.prompts, None)
        if num := int(store.without_value().sum()):
            told = f"vstar.dir: {num} of {len(store)} prompts have no V*: {NO_VALUE}"
            if num == len(store):
                raise ValueError(f"{told}; raise sampling.max_response_tokens, with another vstar.dir")
            print(f"{told}; they are left out", flush=True)
        left_out = store.filtered_ids(recipe.vstar.filter, recipe.vstar.success_rate)
        prompts = [prompt for prompt in inputs.training.prompts if prompt.prompt_id not in left_out]
        vstar = store.values(recipe.vstar.beta1, recipe.vstar.estimator)
        if not prompts:
            raise ValueError(
                f"vstar.filter: {recipe.vstar.filter} leaves none of {len(store)} prompts; choose another filter"
            )
        if gone := {one.name for one in recipe.sources("train")} - {prompt.source for prompt in prompts}:
            without = store.filtered_ids("none")
            if all(prompt.prompt_id in without for prompt in inputs.training.prompts if prompt.source == min(gone)):
                raise ValueError(
                    f"vstar.dir: no prompt of source {min(gone)} has a V*: {NO_VALUE}; raise "
                    "sampling.max_response_tokens, with another vstar.dir, or leave the source out of "
                    "data.train_sources"
                )
            raise ValueError(
                f"vstar.filter: {recipe.vstar.filter} leaves no prompt of source {min(gone)}; choose another filter, "
                "or leave the source out of data.train_sources"
            )
        check_rendered(store, prompts)
        return cls(inputs, prompts, vstar)

    def source_names(self, batch: RolloutBatch) -> list[str]:
        """Of each of the batch's prompts; "" where there is one source alone."""
        return [self._source_of[prompt_id] for prompt_id in batch.prompt_ids]

    @cached_property
    def _source_of(self) -> dict[str, str]:
        """Of all prompts: a replay may hold some that the filter leaves out."""
        return {prompt.prompt_id: prompt.source for prompt in self.inputs.training.prompts}

    def baseline(self, config: BaselineConfig) -> Baseline:
        """What a recipe wants to be taken off the rewards."""
        match config.source:
            case "vstar":
                assert self.vstar is not None
                return Offline(self.vstar.lookup)
            case "batch_mean":
                return BatchMean()
            case "group_mean":
                return GroupMean()
            case "leave_one_out":
                return LeaveOneOut()
            case "kernel":
                return KernelSmoothed(config.kernel, math.inf if config.bandwidth is None else config.bandwidth)
