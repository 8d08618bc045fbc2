"""What happens on the driver alone is known to every rank: its value, or the error that it raised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from megatron_apo.parallel.topology import Topology

Answer = TypeVar("Answer")


def kept_on_driver(topology: Topology, work: Callable[[], Answer]) -> Answer | None:
    """As `on_driver`, for a value that is the driver's alone: None on the other ranks."""
    kept: list[Answer] = []
    on_driver(topology, lambda: kept.append(work()))
    return kept[0] if kept else None


def on_driver(topology: Topology, work: Callable[[], Any]) -> Any:
    """Run `work` on global rank 0 and return its value on every rank; an error there is raised on every rank."""
    outcome: tuple[Any, Exception | None] = (None, None)
    if topology.is_driver:
        try:
            outcome = (work(), None)
        except Exception as error:  # raised again below, on all ranks
            outcome = (None, error)
    value, error = topology.broadcast(outcome)
    if error is not None:
        raise error
    return value
