"""Engines that start while the ranks still import torch and Megatron-Core, which takes about as long.

    with begun_early(recipe, job) as fleet:      # on every rank
        ...
        with Engines(recipe, topology, fleet): ...

Light: it is imported before those.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_apo.config import Recipe
from megatron_apo.rollout.fleet import Fleet
from megatron_apo.runtime.gpus import drivers_gpus
from megatron_apo.runtime.job import Job


@contextmanager
def begun_early(recipe: Recipe, job: Job) -> Iterator[Fleet | None]:
    """The driver's fleet, whose engines are starting; stopped at the end. None on other ranks, and where it takes more
    than the recipe to know that they may start: where our launcher has not checked that, where ranks are of several
    nodes, where engines join from elsewhere, and where they may share a GPU's memory with the ranks."""
    is_known = job.launched and job.num_nodes == 1 and recipe.rollout.placement == "colocated"
    if job.rank or not is_known or recipe.train.replay or drivers_gpus():
        yield None
        return
    fleet = Fleet.to_be_synced(recipe)
    with fleet:
        fleet.begin_starts(fleet.engines)
        yield fleet
