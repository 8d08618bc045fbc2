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
from megatron_apo.runtime.gpus import visible_gpus
from megatron_apo.runtime.job import Job


@contextmanager
def begun_early(recipe: Recipe, job: Job) -> Iterator[Fleet | None]:
    """The driver's fleet, whose engines are starting; stopped at the end, where `Engines` has not stopped it already.

    None on other ranks, and where it takes more than recipe, job and this host's GPUs to know that engines may start.
    """
    may_begin = (
        job.launched  # our launcher has looked at recipe and machine
        and job.num_nodes == 1
        and recipe.rollout.placement == "colocated"  # none joins from elsewhere
        and recipe.train.replay is None
        and not (visible_gpus() or recipe.rollout.sleep_while_training)  # whose memory may be wanted first
    )
    if job.rank or not may_begin:
        yield None
        return
    with Fleet.to_be_synced(recipe) as fleet:
        fleet.begin_starts(fleet.engines)
        yield fleet
