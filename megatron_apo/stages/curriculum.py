"""What stage 2 learns from: prompts, and their V* from a store that was proven to belong to this run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_apo.config import Recipe, RecipeError
from megatron_apo.data.order import step_prompts
from megatron_apo.data.prompts import Prompt
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.fit import misfits
from megatron_apo.inputs import Inputs, load_inputs, store_fingerprint
from megatron_apo.learner.checkpoint import check_resume, next_step
from megatron_apo.model.gpus import visible_gpus
from megatron_apo.model.hf_config import ModelConfigError, read_hf_config
from megatron_apo.rollout.replay import check_replay
from megatron_apo.values.store import PromptValues, VStarStore
from megatron_apo.weights.hf_io import HFReader


@dataclass(frozen=True)
class Curriculum:
    """`prompts`: those the recipe's filter keeps."""

    inputs: Inputs
    prompts: list[Prompt]
    vstar: PromptValues

    def of_step(self, recipe: Recipe, step: int, samples_per_prompt: int) -> list[Prompt]:
        """The prompts of step `step` (from 0), each as often as responses of it are wanted."""
        chosen = step_prompts(
            step, num_prompts=len(self.prompts), prompts_per_step=recipe.train.prompts_per_step, seed=recipe.run.seed
        )
        return [self.prompts[index] for index in chosen for _ in range(samples_per_prompt)]

    def values(self, batch: RolloutBatch) -> dict[str, float]:
        """V* of the batch's prompts."""
        return dict(zip(batch.prompt_ids, self.vstar.lookup(list(batch.prompt_ids)).tolist(), strict=True))


def open_curriculum(recipe: Recipe) -> Curriculum:
    """Check everything that training reads: models, layout, prompts, and the V* store against this run.

    Raises `RecipeError` for what the recipe asks of machine and models, else a ValueError, of one line per problem.
    """
    _check_models(recipe)
    inputs = load_inputs(recipe)
    store = VStarStore.open(recipe.vstar.dir, recipe.vstar.samples_used)
    store.check(store_fingerprint(recipe, inputs))
    check_resume(recipe)
    left_out = store.filtered_ids(recipe.vstar.filter, recipe.vstar.success_rate)
    prompts = [prompt for prompt in inputs.training.prompts if prompt.prompt_id not in left_out]
    vstar = store.values(recipe.vstar.beta1, recipe.vstar.estimator)
    if not prompts:
        raise ValueError(
            f"vstar.filter: {recipe.vstar.filter} leaves none of {len(store)} prompts; choose another filter"
        )
    vstar.lookup([prompt.prompt_id for prompt in prompts])
    check_replay(recipe, next_step(recipe.run.dir), vstar)
    return Curriculum(inputs, prompts, vstar)


def _check_models(recipe: Recipe) -> None:
    """Policy, reference, the run's folder and what is written there: every problem at once."""
    problems = misfits(recipe, recipe.model.folders, visible_gpus())
    specs: list[dict[str, Any]] = []
    for folder in recipe.model.folders.values():
        try:
            spec = read_hf_config(folder)
            specs.append(asdict(spec))
            HFReader(folder).check(spec)
        except ModelConfigError as error:
            problems += [line for line in str(error).splitlines() if not any(line in other for other in problems)]
    if len(specs) == 2:
        policy, reference = specs
        problems += [
            f"model.reference: {name} is {reference[name]!r}, but {value!r} in model.path; the reference must be the "
            "same model with other weights"
            for name, value in policy.items()
            if reference[name] != value
        ]
    out = recipe.run.dir / "checkpoints" / "hf"
    if out.exists():
        problems.append(f"run.dir: {out} is there already; give another run.dir, or remove it")
    if recipe.data.eval is None and recipe.train.replay is None:
        problems.append("data.eval: missing; training reports on held-out prompts")
    if problems:
        raise RecipeError(problems)
