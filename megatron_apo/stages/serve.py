"""A machine's engines for a training that runs elsewhere: they join its driver, and live until the job is over."""

from __future__ import annotations

from megatron_apo import preflight
from megatron_apo.config import Recipe
from megatron_apo.rollout.node import NodeEngines, room_here, say_idle_gpus
from megatron_apo.runtime.job import given_secret


def run(recipe: Recipe, engines: int | None = None) -> None:
    """engines: how many to have here; none: as many as there is room for."""
    preflight.check_serving(recipe, engines)
    room = engines or room_here(recipe)
    say_idle_gpus(recipe, room)
    secret = given_secret()
    assert secret and recipe.rollout.driver
    with NodeEngines(recipe, recipe.rollout.driver, secret, room=room, patience_s=recipe.parallel.timeout_s) as node:
        node.join()
        node.follow()
