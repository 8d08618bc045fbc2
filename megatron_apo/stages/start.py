"""Starts a stage: preflight first, then the ranks. A rank comes here as well.

Light: what needs Megatron is imported in the ranks alone.
"""

from __future__ import annotations

import os

from megatron_apo import preflight
from megatron_apo.config import Recipe
from megatron_apo.runtime import launch
from megatron_apo.telemetry.summary import RunSummary


def warmup(recipe: Recipe) -> None:
    """Supervised warm start: `warmup.start` -> `model.path`."""
    if launch.is_rank():
        from megatron_apo.parallel.groups import distributed
        from megatron_apo.stages import warmup as stage

        with distributed(recipe.parallel) as topology:
            stage.train(recipe, topology)
        return
    preflight.open_warmup(recipe)
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
        preflight.check_sampling(recipe)
        arguments = launch.stage_arguments("estimate-vstar", recipe, worker.suffix)
        arguments += ["--worker", str(index), "--workers", str(count)]
        launch.run_guarded(arguments, engine_environment(os.environ, recipe.rollout))


def train(recipe: Recipe) -> None:
    """Stage 2."""
    if launch.is_rank():
        from megatron_apo.parallel.groups import distributed
        from megatron_apo.stages import train as stage

        with distributed(recipe.parallel) as topology:
            stage.train(recipe, topology)
        return
    preflight.open_training(recipe)
    with RunSummary(recipe.run.dir).phase("train"):
        launch.spawn_stage("train", recipe)
