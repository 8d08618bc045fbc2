"""All engines of a training: on this machine, and on the nodes that join from elsewhere.

    with Engines(recipe, topology) as engines:       # they begin to start, beside what follows
        learner = ...                                # which takes about as long
        with Rollouts(recipe, topology, ..., engines=engines) as rollouts: ...     # waits for them

Called on every rank; the fleet and the registry live on the driver (global rank 0). Engines are where `placement.py`
says: those of another host than the driver's are started there, by the first rank or by a command of its own
(`node.py`), when the driver says so (`registry.py`).
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType

from megatron_apo.config import Recipe
from megatron_apo.rollout.fleet import Fleet
from megatron_apo.rollout.node import NodeEngines, engine_settings, say_idle_gpus, versions
from megatron_apo.rollout.placement import Placement
from megatron_apo.rollout.registry import Registry, version_problem
from megatron_apo.rollout.server import cache_probe_tokens
from megatron_apo.rollout.transport.base import PATIENCE
from megatron_apo.runtime.collective import on_all, on_driver
from megatron_apo.runtime.hosts import own_address
from megatron_apo.runtime.job import given_secret, new_secret, read_job
from megatron_apo.runtime.topology import Topology


class Engines(AbstractContextManager["Engines"]):
    """At its end all are stopped.

    fleet: the driver's, None elsewhere; given where its engines were begun before (`early.py`). shares_memory: whether
    engines take what is the trainer's at other times, so that none may start before room is made for it (`sharing.py`).
    """

    def __init__(self, recipe: Recipe, topology: Topology, fleet: Fleet | None = None):
        self._recipe = recipe
        self._topology = topology
        self._stack = ExitStack()
        self.placement = Placement.of(recipe.rollout, topology.hosts)
        on_ranks_gpus = recipe.rollout.placement == "colocated" and topology.device.type == "cuda"
        self.shares_memory = recipe.rollout.sleep_while_training or on_ranks_gpus
        self._registry, self.fleet = None, None
        if not topology.is_driver:
            return
        servers = []
        if self.placement.elsewhere:
            self._registry = _registry(recipe)
            tokens = cache_probe_tokens(recipe.rollout, recipe.max_sequence_tokens)
            servers = [
                self._registry.server(number, recipe.rollout.start_timeout_s, tokens)
                for number in self.placement.elsewhere
            ]
        assert fleet is None or not (servers or self.shares_memory), "they were begun too early"
        self.fleet = fleet or Fleet.to_be_synced(recipe, here=self.placement.here, elsewhere=servers)

    def __enter__(self) -> Engines:
        try:
            self._start_nodes()
            on_driver(self._topology, self._begin_starts)
        except BaseException:
            self._stack.__exit__(*sys.exc_info())  # nodes hear how it ended
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._stack.__exit__(kind, error, trace)

    def _begin_starts(self) -> None:
        assert self.fleet
        self._stack.callback(self.fleet.stop)
        if not self.shares_memory:
            self.fleet.begin_starts([engine for engine in self.fleet.engines if not engine.answers])

    def _start_nodes(self) -> None:
        """Other hosts' first ranks join with the engines that are theirs, and start them when they are told to."""
        own = self.placement.by_rank.get(self._topology.rank)
        if own is not None:
            say_idle_gpus(self._recipe, len(own))
        if not self.placement.elsewhere:
            return

        def listen() -> tuple[str, str]:
            assert self._registry
            python = self._recipe.rollout.python
            if python and self.placement.here and (problem := version_problem(versions(), versions(python), python)):
                raise ValueError(f"rollout.python: {problem}")
            try:
                registry = self._stack.enter_context(self._registry)
            except OSError as error:
                where = f"{self._registry.address}:{self._registry.port}"
                raise ValueError(f"rollout.driver: cannot listen on {where}: {error.strerror or error}") from error
            return f"{registry.address}:{registry.port}", registry.secret

        address, secret = on_driver(self._topology, listen)

        def join() -> None:
            if self._topology.is_driver or not own:
                return
            node = self._stack.enter_context(
                NodeEngines(
                    self._recipe,
                    address,
                    secret,
                    room=len(own),
                    numbers=own,
                    patience_s=self._recipe.parallel.timeout_s,
                )
            )
            node.join()
            node.follow_beside()

        on_all(self._topology, join)


def _registry(recipe: Recipe) -> Registry:
    """Where engines of other nodes join."""
    job = read_job()
    host, port = own_address(job.master_address if job else "127.0.0.1"), 0
    if recipe.rollout.driver is not None:
        host, _, text = recipe.rollout.driver.rpartition(":")
        host, port = host.strip("[]"), int(text)
    return Registry(
        host,
        port,
        given_secret() or new_secret(),
        versions(),
        engine_settings(recipe),
        patience_s=PATIENCE * recipe.sync.timeout_s,
    )
