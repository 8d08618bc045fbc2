"""avg@k at the sampling temperature, and greedy, of the weights that the engines hold, or of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_apo.config import Recipe, values_marked
from megatron_apo.data.prompts import Prompt
from megatron_apo.rewards.pool import RewardPool
from megatron_apo.rollout.filling import Filling, SamplingJob
from megatron_apo.rollout.inputs import Inputs, evaluation_fingerprint
from megatron_apo.rollout.sampler import GradedSampling, generate_bodies
from megatron_apo.telemetry.recorder import Evaluation
from megatron_apo.telemetry.samples import EvaluatedPrompt
from megatron_apo.values.store import StoreWriter, VStarStore

SAMPLED, GREEDY = "sampled", "greedy"  # stores in the folder of a model's evaluation


def begin_evaluation(recipe: Recipe, inputs: Inputs, pool: RewardPool) -> GradedSampling:
    """k responses of each of `inputs.evaluation`, then a greedy one; a prompt's repeats are its samples 0, 1, ..."""
    prompts = inputs.evaluation.prompts
    repeated = [prompt for prompt in prompts for _ in range(recipe.eval.samples)]
    bodies = generate_bodies(recipe, "eval", 0, repeated, inputs.sampling(recipe.sampling))
    bodies += generate_bodies(recipe, "eval", 0, prompts, inputs.sampling(recipe.sampling, greedy=True))
    return GradedSampling(inputs, pool, [*repeated, *prompts], bodies, explained=len(prompts))


def finished_evaluation(recipe: Recipe, inputs: Inputs, sampling: GradedSampling) -> Evaluation:
    """What `begin_evaluation` began and the engines have answered."""
    k, num_prompts = recipe.eval.samples, len(inputs.evaluation.prompts)
    rewards = sampling.reward_B
    is_cut = np.array([completion.finish_reason == "length" for completion in sampling.completions[: k * num_prompts]])
    return _evaluation(
        rewards[: k * num_prompts].reshape(num_prompts, k),
        rewards[k * num_prompts :],
        is_cut.reshape(num_prompts, k),
        [prompt.source for prompt in inputs.evaluation.prompts],
    )


def evaluated_prompts(recipe: Recipe, sampling: GradedSampling) -> list[EvaluatedPrompt]:
    """What there is to read of an evaluation that is finished."""
    k = recipe.eval.samples
    num_prompts = len(sampling.prompts) // (k + 1)
    mean_P = sampling.reward_B[: k * num_prompts].reshape(num_prompts, k).mean(axis=1)
    found = []
    for prompt, mean, (request, grade) in zip(
        sampling.prompts[k * num_prompts :], mean_P, sampling.explained(), strict=True
    ):
        seen, untold = grade.explanation, grade.failure or grade.unexplained
        found.append(
            EvaluatedPrompt(
                prompt.prompt_id,
                prompt.source,
                prompt.text,
                prompt.answer,
                float(mean),
                request.response,
                request.finish_reason,
                grade.reward,
                *((seen.reference, seen.answer, seen.why) if seen else ("", None, untold)),
            )
        )
    return found


def evaluation_job(recipe: Recipe, inputs: Inputs) -> SamplingJob:
    """The same requests to evaluate `model.path`, for workers that share the run's folder. Raises `StoreError` where
    that has another evaluation of the model."""
    folder = evaluation_folder(recipe.run.dir, recipe.model.path)
    prompts, size = inputs.evaluation.prompts, recipe.eval.prompts_per_shard
    settings = {key: value for key, value in values_marked(recipe, "shards").items() if key.startswith("rollout.")}
    settings["eval.prompts_per_shard"] = size

    def store(name: str, *, greedy: bool) -> Filling:
        fingerprint = evaluation_fingerprint(recipe, inputs, folder / "model_hash.json", greedy=greedy)
        writer = StoreWriter(folder / name, fingerprint, -(-len(prompts) // size), settings)
        return Filling(writer, prompts, size, inputs.sampling(recipe.sampling, greedy=greedy))

    return SamplingJob(
        recipe,
        inputs,
        recipe.model.path,
        folder,
        (store(SAMPLED, greedy=False), store(GREEDY, greedy=True)),
        prefix_caching=recipe.rollout.prefix_caching,
        title="evaluating",
    )


def evaluation_of(sampled: VStarStore, greedy: VStarStore, prompts: Sequence[Prompt]) -> Evaluation:
    """What the stores of an `evaluation_job` hold of these prompts."""
    ids = [prompt.prompt_id for prompt in prompts]
    rows, greedy_rows = sampled.rows_of(ids), greedy.rows_of(ids)
    reasons = sampled.column("finish_reasons").to_pylist()
    return _evaluation(
        sampled.rewards.flat.reshape(len(sampled), -1)[rows],
        greedy.rewards.flat[greedy_rows],
        np.array([[reason == "length" for reason in reasons[row]] for row in rows]),
        [prompt.source for prompt in prompts],
    )


def _evaluation(
    reward_PK: NDArray[np.float64], greedy_P: NDArray[np.float64], is_cut_PK: NDArray[np.bool_], sources: Sequence[str]
) -> Evaluation:
    """sources: of each prompt, "" where there is one alone."""
    whole = _scores(reward_PK, greedy_P, is_cut_PK)
    for name in sorted(set(sources) - {""}):
        own = np.array([source == name for source in sources])
        whole.sources[name] = _scores(reward_PK[own], greedy_P[own], is_cut_PK[own])
    return whole


def _scores(reward_PK: NDArray[np.float64], greedy_P: NDArray[np.float64], is_cut_PK: NDArray[np.bool_]) -> Evaluation:
    reward_P = reward_PK.mean(axis=1)
    return Evaluation(
        mean=float(reward_P.mean()),
        stderr=_stderr(reward_P),
        greedy=float(greedy_P.mean()),
        greedy_stderr=_stderr(greedy_P),
        samples_per_prompt=reward_PK.shape[1],
        num_prompts=len(reward_PK),
        truncated=float(is_cut_PK.mean()),
    )


def _stderr(values: NDArray[np.float64]) -> float | None:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def evaluation_folder(run_dir: Path, model: Path) -> Path:
    """Where a model's evaluation is, which a file beside it sums up (`evaluation_result`)."""
    return run_dir / f"evaluation-{_label(run_dir, model)}"


def evaluation_result(run_dir: Path, model: Path) -> Path:
    """Where the numbers of a model's evaluation are written."""
    folder = evaluation_folder(run_dir, model)
    return folder.with_name(f"{folder.name}.json")


def _label(run_dir: Path, model: Path) -> str:
    """The model's folder as part of a file name: inside the run as it is called there, else its whole path."""
    run_dir, model = run_dir.resolve(), model.resolve()
    return "-".join((model.relative_to(run_dir) if model.is_relative_to(run_dir) else model).parts).strip("/-")
