"""A machine's engines for a training that runs elsewhere: they join its driver, and live until the job is over."""

from __future__ import annotations

from megatron_apo import preflight
from megatron_apo.config import Recipe
from megatron_apo.rollout.node import DriverLost, NodeEngines, room_here, say_idle_gpus
from megatron_apo.runtime.ending import EndedEarly
from megatron_apo.runtime.job import given_secret
from megatron_apo.runtime.signals import ENDED_EARLY


def run(recipe: Recipe, engines: int | None = None) -> None:
    """engines: how many to have here; none: as many as there is room for."""
    preflight.check_serving(recipe, engines)
    room = engines or room_here(recipe)
    say_idle_gpus(recipe, room)
    secret = given_secret()
    assert secret and recipe.rollout.driver
    with NodeEngines(recipe, recipe.rollout.driver, secret, room=room, patience_s=recipe.parallel.timeout_s) as node:
        node.join()
        code = node.follow()
    if code == ENDED_EARLY:
        raise EndedEarly("the training was asked to end, and has saved")
    if code:
        raise DriverLost("the training has ended with an error")
