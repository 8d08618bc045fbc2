"""Whose turn it is to have the GPUs' memory: the trainer's, or for a while the engines'.

The engines have it within `for_engines`, where the trainer's is elsewhere: when they sample, evaluate and score probes,
and when one starts. With rollout.sleep_while_training they sleep otherwise. A sync wakes their weights, and the KV
cache follows at their next turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

from megatron_apo.rollout.fleet import Fleet
from megatron_apo.rollout.server import ServerDied
from megatron_apo.runtime.collective import on_all, on_driver
from megatron_apo.runtime.ending import Interrupted
from megatron_apo.runtime.topology import Topology


class MemorySharing:
    """Every method is called on every rank. `fleet` is the driver's, None elsewhere; `offloaded()`: a context within
    which this rank's device has room for vLLM; `phase(name)`: measures "offload", in which memory changes hands.
    `sleeps`: the recipe's rollout.sleep_while_training. is_shared: whether an engine takes, when it starts, memory that
    is the trainer's otherwise, and so only within `for_engines`."""

    def __init__(
        self,
        topology: Topology,
        fleet: Fleet | None,
        offloaded: Callable[[], AbstractContextManager[None]],
        phase: Callable[[str], AbstractContextManager[None]],
        *,
        sleeps: bool,
        is_shared: bool,
    ):
        self._topology = topology
        self._fleet = fleet
        self._offloaded = offloaded
        self._phase = phase
        self._sleeps = sleeps
        self._is_shared = is_shared
        self._allow_starts(not is_shared)

    def start_engines(self) -> None:
        """Start the engines that are down, each of which takes all its memory at once."""
        with self._offloaded():
            self.make_room()
            self._with_fleet(Fleet.start)
            self._sleep()

    @contextmanager
    def for_engines(self) -> Iterator[None]:
        """They are awake within, and the trainer's memory comes back only when they sleep again."""
        with ExitStack() as stack:
            with self._phase("offload"):
                stack.enter_context(self._offloaded())
                self.wake()
                if self._is_shared:
                    self._with_fleet(lambda fleet: self._allow_starts(True))
            try:
                try:
                    yield
                except ServerDied:  # on every rank
                    self._take_back()
                    raise
                with self._phase("offload"):
                    self._take_back()
            except Interrupted:  # on every rank: the run ends, and the trainer needs its memory to save
                if self._is_shared:
                    self._with_fleet(Fleet.stop)
                raise
            with self._phase("offload"):
                stack.close()

    def wake(self, *tags: str) -> None:
        """Take back what `tags` name ("weights", "kv_cache"), or everything."""
        if self._sleeps:
            self.make_room()
            self._with_fleet(lambda fleet: fleet.ask(lambda client: client.wake_up(*tags)))

    def make_room(self) -> None:
        """Let go of the memory that torch has freed but keeps, on every rank before vLLM, on any device, takes it."""
        if self._topology.device.type == "cuda":
            on_all(self._topology, torch.cuda.empty_cache)

    def _take_back(self) -> None:
        if self._is_shared:
            self._with_fleet(lambda fleet: self._allow_starts(False))
            self._with_fleet(Fleet.finish_starts)
        self._sleep()

    def _allow_starts(self, may_start: bool) -> None:
        if self._fleet:
            self._fleet.may_start = may_start
            self._fleet.attend_to_lost()

    def _sleep(self) -> None:
        if self._sleeps:
            self._with_fleet(lambda fleet: fleet.ask(lambda client: client.sleep()))

    def _with_fleet(self, work: Callable[[Fleet], object]) -> None:
        """On the driver."""

        def there() -> None:
            assert self._fleet
            work(self._fleet)

        on_driver(self._topology, there)
