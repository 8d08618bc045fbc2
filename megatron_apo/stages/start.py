"""Starts a stage: every mistake in the recipe's files is found first, then the ranks start. A rank comes here as well.

Light: what needs Megatron is imported in the ranks alone.
"""

from __future__ import annotations

import os

from megatron_apo.config import Recipe, RecipeError
from megatron_apo.fit import engine_misfits, misfits, refusals
from megatron_apo.model.gpus import visible_gpus
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.parallel import launch
from megatron_apo.telemetry.summary import RunSummary


def warmup(recipe: Recipe) -> None:
    """Supervised warm start: `warmup.start` -> `model.path`."""
    if launch.is_rank():
        from megatron_apo.parallel.topology import distributed
        from megatron_apo.stages import warmup as stage

        with distributed(recipe.parallel) as topology:
            stage.train(recipe, topology)
        return
    _check_warmup(recipe)
    with RunSummary(recipe.run.dir).phase("warmup"):
        launch.spawn_stage("warmup", recipe)


def estimate_vstar(recipe: Recipe, index: int = 0, count: int = 1) -> None:
    """Stage 1 as worker `index` of `count`. vLLM's processes would outlive a killed command: it works under a guard."""
    from megatron_apo.rollout.server import engine_environment
    from megatron_apo.stages import estimate_vstar as stage

    worker = stage.Worker(index, count)
    if launch.is_guarded():
        stage.run(recipe, worker)
    else:
        _check_stage_1(recipe)
        arguments = launch.stage_arguments("estimate-vstar", recipe, worker.suffix)
        arguments += ["--worker", str(index), "--workers", str(count)]
        launch.run_guarded(arguments, engine_environment(os.environ, recipe.rollout))


def train(recipe: Recipe) -> None:
    """Stage 2."""
    if launch.is_rank():
        from megatron_apo.parallel.topology import distributed
        from megatron_apo.stages import train as stage

        with distributed(recipe.parallel) as topology:
            stage.train(recipe, topology)
        return
    from megatron_apo.stages.curriculum import open_curriculum

    open_curriculum(recipe)
    with RunSummary(recipe.run.dir).phase("train"):
        launch.spawn_stage("train", recipe)


def _check_stage_1(recipe: Recipe) -> None:
    problems = [
        f"rollout.{name}: {value!r} is for a server, and stage 1 has vLLM in its own process; leave it out"
        for name in ("python", "extra_args")
        if (value := getattr(recipe.rollout, name))
    ]
    problems += engine_misfits(recipe, {"model.reference": recipe.model.reference_path}, visible_gpus())
    if problems:
        raise RecipeError(problems)


def _check_warmup(recipe: Recipe) -> None:
    from megatron_apo.data.sft import read_examples
    from megatron_apo.weights.hf_io import HFReader
    from megatron_apo.weights.whole_folder import check_empty

    if recipe.warmup.data is None or recipe.warmup.start is None:
        raise ValueError("warmup.data and warmup.start: both are needed for a warm start; set them in the recipe")
    start = recipe.warmup.start
    problems = misfits(recipe, {"warmup.start": start}, visible_gpus())
    checks = (
        lambda: HFReader(start).check(read_hf_config(start)),
        lambda: check_empty(recipe.model.path, "model.path (the warm start writes it)"),
        lambda: read_examples(recipe),
    )
    problems += refusals(checks, known=problems)
    if problems:
        raise RecipeError(problems)
