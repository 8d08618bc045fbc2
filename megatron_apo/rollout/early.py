"""Engines that start while the ranks still import torch and Megatron-Core, which takes about as long.

    with begun_early(recipe, job) as fleet:      # on every rank
        ...
        with Engines(recipe, topology, fleet): ...

They hold nobody's weights, so that a first sync that brings none is seen; or, where training begins with stage 1
(vstar.at_start), the reference's. Light: it is imported before those.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_apo.config import Recipe
from megatron_apo.rollout.fleet import Fleet
from megatron_apo.runtime.gpus import visible_gpus
from megatron_apo.runtime.job import Job


@contextmanager
def begun_early(recipe: Recipe, job: Job) -> Iterator[Fleet | None]:
    """The driver's fleet, whose engines are starting; stopped at the end, where `Engines` has not stopped it already.

    None on other ranks, and where it takes more than recipe, job and this host's GPUs to know that engines may start.
    """
    if job.rank or not may_begin(recipe, job):
        yield None
        return
    has_stage_1 = begins_with_stage_1(recipe)
    fleet = Fleet.of(recipe, recipe.model.reference_path) if has_stage_1 else Fleet.to_be_synced(recipe)
    with fleet:
        fleet.begin_starts(fleet.engines)
        yield fleet


def may_begin(recipe: Recipe, job: Job) -> bool:
    """Whether a job's engines begin before its ranks meet. Our launcher has looked at recipe and machine then."""
    return job.launched and job.num_nodes == 1 and not late_because(recipe, has_gpus=bool(visible_gpus()))


def late_because(recipe: Recipe, *, has_gpus: bool) -> list[str]:
    """Why a recipe's engines cannot begin before the ranks of a job on one host, one line each; nothing if they can."""
    rollout, found = recipe.rollout, []
    if recipe.train.replay is not None:
        found.append(f"train.replay: {recipe.train.replay} needs no engine")
    if rollout.placement != "colocated":
        found.append(f"rollout.placement: {rollout.placement} engines join from elsewhere")
    if rollout.sleep_while_training:
        found.append("rollout.sleep_while_training: true, and the trainer's memory is not known before")
    if has_gpus:
        found.append("CUDA_VISIBLE_DEVICES: there are GPUs, whose memory the ranks may need first")
    return found


def begins_with_stage_1(recipe: Recipe) -> bool:
    """Whether training is to fill its store itself."""
    return recipe.needs_store and recipe.vstar.at_start and not recipe.vstar.is_closed
