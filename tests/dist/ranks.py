"""Layouts by name ("tp2-pp2-vpp2"), and their ranks as processes."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from megatron_apo.config import ParallelConfig
from megatron_apo.runtime import guard
from megatron_apo.runtime.ports import free_port
from tests.hosts import Host
from tests.models import EXPERTS, VARIANTS

ROOT = Path(__file__).parents[2]
ONE_RANK = "tp1"
LIMIT_S = 300


def parallel_of(layout: str) -> ParallelConfig:
    """The layout of a name: sizes of `ParallelConfig`, joined by dashes; those not named are 1."""
    sizes = {name: int(size) for name, size in re.findall(r"([a-z]+)(\d+)", layout)}
    return ParallelConfig(**sizes, timeout_s=120)


def variants_of(layout: str) -> list[str]:
    """The variants that this layout can hold: experts need one tensor rank, and dense models no expert ranks."""
    parallel = parallel_of(layout)
    return [name for name in VARIANTS if (parallel.tp == 1 if name in EXPERTS else parallel.ep == 1)]


def start_ranks(module: str, work: Path, layout: str, *arguments: str) -> None:
    """Run MODULE's main with `WORK LAYOUT [ARGUMENTS]` as the layout's ranks; fails with the log of one that fails."""
    with running_ranks(module, work, layout, *arguments) as ranks:
        for rank in ranks:
            rank.process.join(LIMIT_S)
            if (code := rank.process.exitcode) != 0:
                why = "took too long" if code is None else "failed"
                pytest.fail(f"{rank.log.stem} of {layout} {why}:\n{rank.log.read_text()[-3000:]}")


@dataclass(frozen=True)
class Rank:
    process: multiprocessing.process.BaseProcess
    log: Path


@contextmanager
def running_ranks(
    module: str, work: Path, layout: str, *arguments: str, hosts: Sequence[Host] = (), **environment: str
) -> Iterator[list[Rank]]:
    """The ranks of `start_ranks`, which run; killed at the end. hosts: each rank's; none: this one."""
    world_size = parallel_of(layout).world_size
    port = free_port("127.0.0.1")
    own = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    told = (module, (str(work), layout, *arguments), own | environment)
    ranks = []
    for rank in range(world_size):
        log, host = work / f"rank{rank}.log", hosts[rank] if hosts else None
        ranks.append(Rank(forks().Process(target=_be_rank, args=(*told, rank, log, host)), log))
    try:
        for rank in ranks:
            rank.process.start()
        yield ranks
    finally:
        for rank in ranks:
            if rank.process.pid is not None:
                rank.process.kill()
                rank.process.join()


@cache
def forks() -> BaseContext:
    """Forks ranks from a process that has imported what they need: torch and Megatron-Core take each many seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.dist.placement_worker", "tests.dist.checkpoint_worker", "tests.dist.learner_worker"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # torch reads it as it is imported
        forkserver.ensure_running()
    return context


def _be_rank(
    module: str, arguments: Sequence[str], environment: dict[str, str], rank: int, log: Path, host: Host | None
) -> None:
    guard.LIBC.prctl(guard.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # it may wait for ever, were the tests killed
    with log.open("wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    if host is not None:
        host.enter()
    os.environ.update(environment, RANK=str(rank))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    importlib.import_module(module).main(*arguments)


def _end_with_parent() -> None:
    """When the tests are killed, of whom a forked process is no child."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
