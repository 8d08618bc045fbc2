"""avg@k at the sampling temperature, and greedy, of the weights that a server holds."""

from __future__ import annotations

import numpy as np

from megatron_apo.config import Recipe
from megatron_apo.data.order import sample_seeds
from megatron_apo.data.prompts import Prompt
from megatron_apo.rewards.pool import RewardPool
from megatron_apo.rollout.client import GenerateRequest, RolloutClient
from megatron_apo.rollout.inputs import Inputs
from megatron_apo.telemetry.recorder import Evaluation


def evaluate_policy(recipe: Recipe, inputs: Inputs, client: RolloutClient, pool: RewardPool) -> Evaluation:
    """Evaluate the weights that the server holds, on `inputs.evaluation`."""
    k = recipe.eval.samples
    prompts = inputs.evaluation
    sampled, truncated = _rewards(
        recipe, inputs, client, pool, [prompt for prompt in prompts for _ in range(k)], greedy=False
    )
    greedy, _ = _rewards(recipe, inputs, client, pool, prompts, greedy=True)
    per_prompt = sampled.reshape(len(prompts), k).mean(axis=1)
    return Evaluation(
        mean=float(per_prompt.mean()),
        stderr=_stderr(per_prompt),
        greedy=float(greedy.mean()),
        greedy_stderr=_stderr(greedy),
        samples_per_prompt=k,
        num_prompts=len(prompts),
        truncated=truncated,
    )


def _rewards(
    recipe: Recipe, inputs: Inputs, client: RolloutClient, pool: RewardPool, prompts: list[Prompt], *, greedy: bool
) -> tuple[np.ndarray, float]:
    """([len(prompts)] rewards, share truncated) of one response each; a prompt's repeats are its samples 0, 1, ..."""
    seeds = sample_seeds(recipe.run.seed, "eval", 0, [prompt.prompt_id for prompt in prompts])
    requests = [GenerateRequest(prompt.token_ids, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    completions = client.generate(requests, inputs.sampling(recipe.sampling, greedy=greedy))
    grades = pool.grade(
        [inputs.grade_request(p, c.token_ids, c.finish_reason) for p, c in zip(prompts, completions, strict=True)]
    )
    truncated = float(np.mean([completion.finish_reason == "length" for completion in completions]))
    return np.array([grade.reward for grade in grades]), truncated


def _stderr(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
