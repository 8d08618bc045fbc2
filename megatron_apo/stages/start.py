"""Starts a stage: preflight first, then the ranks. A rank comes here as well.

Light: what needs Megatron is imported in the ranks alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from megatron_apo import preflight
from megatron_apo.config import Recipe
from megatron_apo.runtime import launch
from megatron_apo.runtime.garbage import not_collected
from megatron_apo.runtime.job import Job, read_job
from megatron_apo.telemetry.summary import RunSummary

if TYPE_CHECKING:
    from megatron_apo.runtime.topology import Topology


def warmup(recipe: Recipe) -> None:
    """Supervised warm start: `warmup.start` -> `model.path`."""
    if job := read_job():
        with _rank(job, "warmup", recipe) as topology:
            with not_collected():
                from megatron_apo.stages import warmup as stage

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
    if job := read_job():
        with _rank(job, "train", recipe) as topology:
            with not_collected():
                from megatron_apo.stages import train as stage

            stage.train(recipe, topology)
        return
    preflight.open_training(recipe)
    with RunSummary(recipe.run.dir).phase("train"):
        launch.spawn_stage("train", recipe)


@contextmanager
def _rank(job: Job, command: str, recipe: Recipe) -> Iterator[Topology]:
    """As a rank of the recipe's job; rank 0 does what our launcher would, if that did not start it."""
    launch.be_rank(job, recipe.run.dir / "logs")
    timed = nullcontext() if job.launched or job.rank else RunSummary(recipe.run.dir).phase(command)
    with timed:
        with not_collected():
            from megatron_apo.parallel.groups import distributed

        with distributed(recipe.parallel) as topology:
            yield topology
