"""Processes of this machine as the ranks of a job, for benchmarks that measure over several."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

from megatron_apo.runtime.ports import free_port


def run_ranks(world_size: int, work: Callable[..., None], *arguments: Any) -> None:
    """`work(*arguments)` in so many new processes, with the variables by which they find each other; none outlives
    this call."""
    context, port = get_context("spawn"), free_port("127.0.0.1")
    ranks = [
        context.Process(target=_be_rank, args=(rank, world_size, port, work, arguments)) for rank in range(world_size)
    ]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    finally:
        for rank in ranks:
            rank.kill()


def _be_rank(rank: int, world_size: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    work(*arguments)
