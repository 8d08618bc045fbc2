"""What happens on one rank is known to every rank: the driver's value, or the error that anyone raised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

Answer = TypeVar("Answer")


class Ranks(Protocol):
    """The job's ranks as seen from one of them; `Topology` is that."""

    @property
    def is_driver(self) -> bool: ...
    @property
    def world_size(self) -> int: ...
    def broadcast(self, value: Any) -> Any: ...


class RankError(RuntimeError):
    """An error of another rank."""


def driver_only(topology: Ranks, work: Callable[[], Answer]) -> Answer | None:
    """As `on_driver`, for a value that is the driver's alone: None on the other ranks."""
    kept: list[Answer] = []
    on_driver(topology, lambda: kept.append(work()))
    return kept[0] if kept else None


def on_all(topology: Ranks, work: Callable[[], Answer]) -> Answer:
    """Run `work` on every rank and return its value; an error on any rank is raised on every rank."""
    try:
        value, error = work(), None
    except Exception as failure:  # raised again below
        error = failure
    told: list[str | None] = [None] * topology.world_size
    dist.all_gather_object(told, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, text in enumerate(told):
        if text is not None:
            raise RankError(f"rank {rank}: {text}")
    return value


def on_driver(topology: Ranks, work: Callable[[], Any]) -> Any:
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
