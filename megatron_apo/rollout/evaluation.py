"""avg@k at the sampling temperature, and greedy, of the weights that the engines hold."""

from __future__ import annotations

import numpy as np

from megatron_apo.config import Recipe
from megatron_apo.rewards.pool import RewardPool
from megatron_apo.rollout.inputs import Inputs
from megatron_apo.rollout.sampler import GradedSampling, generate_bodies
from megatron_apo.telemetry.recorder import Evaluation


def begin_evaluation(recipe: Recipe, inputs: Inputs, pool: RewardPool) -> GradedSampling:
    """k responses of each of `inputs.evaluation`, then a greedy one; a prompt's repeats are its samples 0, 1, ..."""
    prompts = inputs.evaluation
    repeated = [prompt for prompt in prompts for _ in range(recipe.eval.samples)]
    bodies = generate_bodies(recipe, "eval", 0, repeated, inputs.sampling(recipe.sampling))
    bodies += generate_bodies(recipe, "eval", 0, prompts, inputs.sampling(recipe.sampling, greedy=True))
    return GradedSampling(inputs, pool, [*repeated, *prompts], bodies)


def finished_evaluation(recipe: Recipe, inputs: Inputs, sampling: GradedSampling) -> Evaluation:
    """What `begin_evaluation` began and the engines have answered."""
    k, num_prompts = recipe.eval.samples, len(inputs.evaluation)
    rewards = sampling.reward_B
    per_prompt, greedy = rewards[: k * num_prompts].reshape(num_prompts, k).mean(axis=1), rewards[k * num_prompts :]
    sampled = sampling.completions[: k * num_prompts]
    return Evaluation(
        mean=float(per_prompt.mean()),
        stderr=_stderr(per_prompt),
        greedy=float(greedy.mean()),
        greedy_stderr=_stderr(greedy),
        samples_per_prompt=k,
        num_prompts=num_prompts,
        truncated=float(np.mean([completion.finish_reason == "length" for completion in sampled])),
    )


def _stderr(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
