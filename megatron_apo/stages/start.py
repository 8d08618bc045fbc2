"""Starts a stage: preflight first, then the ranks. A rank comes here as well.

Light: what needs Megatron is imported in the ranks alone, and there nothing heavy before engines have begun to start.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from megatron_apo.config import Recipe
from megatron_apo.rollout.early import begins_with_stage_1, begun_early, may_begin
from megatron_apo.runtime import launch
from megatron_apo.runtime.garbage import not_collected
from megatron_apo.runtime.job import Job, read_job
from megatron_apo.telemetry.summary import RunSummary

if TYPE_CHECKING:
    from megatron_apo.rollout.fleet import Fleet
    from megatron_apo.runtime.topology import Topology

_LOOK_EVERY_S = 0.5  # for the end of stage 1


def warmup(recipe: Recipe) -> None:
    """Supervised warm start: `warmup.start` -> `model.path`."""
    if job := read_job():
        with _rank(job, "warmup", recipe), _joined(recipe) as topology:
            with not_collected():
                from megatron_apo.stages import warmup as stage

            stage.train(recipe, topology)
        return
    from megatron_apo import preflight

    preflight.open_warmup(recipe)
    with RunSummary(recipe.run.dir).phase("warmup"):
        launch.spawn_stage("warmup", recipe)


def estimate_vstar(recipe: Recipe, index: int = 0, count: int = 1) -> None:
    """Stage 1 as worker `index` of `count`. vLLM's processes would outlive a killed command: it works under a guard."""
    from megatron_apo import preflight
    from megatron_apo.rollout.filling import Worker
    from megatron_apo.rollout.server import engine_environment
    from megatron_apo.stages import estimate_vstar as stage

    worker = Worker(index, count)
    if launch.is_guarded():
        stage.run(recipe, worker)
    else:
        preflight.check_sampling(recipe)
        arguments = launch.stage_arguments("estimate-vstar", recipe, worker.suffix)
        arguments += ["--worker", str(index), "--workers", str(count)]
        launch.run_guarded(arguments, engine_environment(os.environ, recipe.rollout))


def evaluate(recipe: Recipe, worker: int | None = None, workers: int = 1) -> None:
    """avg@k and greedy of `model.path` as one of several workers; None: as all that this machine has engines for."""
    from megatron_apo import preflight
    from megatron_apo.rollout.evaluation import evaluation_folder
    from megatron_apo.rollout.filling import Worker
    from megatron_apo.rollout.server import engine_environment, engines_here, sharing_cores
    from megatron_apo.stages import evaluate as stage

    if launch.is_guarded():
        assert worker is not None
        stage.run(recipe, Worker(worker, workers))
        return
    preflight.check_evaluation(recipe)
    label = evaluation_folder(recipe.run.dir, recipe.model.path).name.removeprefix("evaluation")
    count = engines_here(recipe.rollout) if worker is None else 1
    if count > 1:
        preflight.open_evaluation(recipe)  # what it refuses is told once, and the model's hash is there for all
        recipe = recipe.model_copy(update={"rollout": sharing_cores(recipe.rollout, count)})
        run_workers(launch.stage_arguments("evaluate", recipe, label), recipe, range(count), count)
        return
    one = Worker(worker or 0, workers)
    arguments = launch.stage_arguments("evaluate", recipe, label + one.suffix)
    arguments += ["--worker", str(one.index), "--workers", str(one.count)]
    launch.run_guarded(arguments, engine_environment(os.environ, recipe.rollout))


def run_workers(arguments: Sequence[str], recipe: Recipe, workers: range, count: int) -> None:
    """Run `megatron-apo ARGUMENTS` as these of `count` workers, each with GPUs of this machine of its own, and wait."""
    launch.run_commands(worker_commands(arguments, recipe, workers, count))


def worker_commands(
    arguments: Sequence[str], recipe: Recipe, workers: range, count: int, gpus: int | None = None
) -> list[tuple[list[str], dict[str, str]]]:
    """Command line and more environment of each. gpus: of a machine that is not this one."""
    from megatron_apo.rollout.server import engine_gpus, own_gpus

    has_own = len(workers) > 1 and (engine_gpus(recipe.rollout) > 0 if gpus is None else gpus > 0)
    commands = []
    for place, worker in enumerate(workers):
        own = [*arguments, "--worker", str(worker), "--workers", str(count)]
        commands.append((own, own_gpus(os.environ, recipe.rollout.tp, place, gpus) if has_own else {}))
    return commands


def train(recipe: Recipe) -> None:
    """Stage 2."""
    if job := read_job():
        with _rank(job, "train", recipe), begun_early(recipe, job) as fleet:
            _stage_1_at_start(recipe, job, fleet)
            with _joined(recipe) as topology:
                with not_collected():
                    from megatron_apo.stages import train as stage

                stage.train(recipe, topology, fleet)
        return
    from megatron_apo import preflight

    preflight.check_training(recipe)
    with RunSummary(recipe.run.dir).phase("train"):
        launch.spawn_stage("train", recipe)


def _stage_1_at_start(recipe: Recipe, job: Job, fleet: Fleet | None) -> None:
    """Have a fleet that holds the reference fill the store. Ranks meet only then: how long it takes nobody knows. Where
    engines have not begun, ranks are refused together (`open_training`)."""
    if job.rank:
        if begins_with_stage_1(recipe) and may_begin(recipe, job):  # which asks for GPUs: once, and not at every look
            while begins_with_stage_1(recipe):
                time.sleep(_LOOK_EVERY_S)
        return
    if fleet is None or not fleet.has_weights:
        return
    from megatron_apo.rollout.filling import Worker
    from megatron_apo.rollout.served import serving_reference
    from megatron_apo.stages import estimate_vstar as stage

    with serving_reference(fleet) as engine:
        stage.run(recipe, Worker(), engine)


def _rank(job: Job, command: str, recipe: Recipe) -> AbstractContextManager[object]:
    """As a rank of the recipe's job; rank 0 does what our launcher would, if that did not start it."""
    launch.be_rank(job, recipe.run.dir / "logs")
    return nullcontext() if job.launched or job.rank else RunSummary(recipe.run.dir).phase(command)


@contextmanager
def _joined(recipe: Recipe) -> Iterator[Topology]:
    """With the job's other ranks."""
    with not_collected():
        from megatron_apo.parallel.groups import distributed

    with distributed(recipe.parallel) as topology:
        yield topology
