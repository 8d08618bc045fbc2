"""avg@k and greedy of a Hugging Face folder on held-out prompts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from megatron_apo.config import Recipe
from megatron_apo.preflight import open_evaluation
from megatron_apo.rewards.pool import RewardPool
from megatron_apo.rollout.evaluation import begin_evaluation, finished_evaluation
from megatron_apo.rollout.fleet import Fleet
from megatron_apo.telemetry.units import with_error


def run(recipe: Recipe, model: Path | None = None) -> None:
    """Evaluate an HF folder (default: model.path) with rollout.replicas engines and its own tokenizer; print, and write
    RUN/evaluation-<folder>.json."""
    model = model or recipe.model.path
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": model})})
    inputs = open_evaluation(recipe)
    fleet = Fleet.of(recipe, model, log_name="vllm-evaluate")
    with RewardPool(recipe.reward) as pool, fleet:
        fleet.start()
        fleet.serve_own_weights()
        sampling = begin_evaluation(recipe, inputs, pool)
        sampling.advance(fleet)
        found = finished_evaluation(recipe, inputs, sampling)
    path = result_path(recipe.run.dir, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(found) | {"model": str(model)}, indent=1) + "\n")
    print(
        f"{model}: avg@{found.samples_per_prompt} {with_error(found.mean, found.stderr)}, "
        f"greedy {with_error(found.greedy, found.greedy_stderr)} ({found.num_prompts} prompts); {path}"
    )


def result_path(run_dir: Path, model: Path) -> Path:
    """Where the evaluation of a model is written."""
    return run_dir / f"evaluation-{_label(run_dir, model)}.json"


def _label(run_dir: Path, model: Path) -> str:
    """The model's folder as part of a file name: inside the run as it is called there, else its whole path."""
    run_dir, model = run_dir.resolve(), model.resolve()
    return "-".join((model.relative_to(run_dir) if model.is_relative_to(run_dir) else model).parts).strip("/-")
