"""Layouts by name ("tp2-pp2-vpp2"), and their ranks as processes."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import sys
import threading
import warnings
from collections.abc import Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from megatron_apo.config import ParallelConfig
from megatron_apo.runtime.ports import free_port
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
    world_size = parallel_of(layout).world_size
    port = free_port("127.0.0.1")
    environment = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    told = (module, (str(work), layout, *arguments), environment)
    logs = [work / f"rank{rank}.log" for rank in range(world_size)]
    ranks = [forks().Process(target=_be_rank, args=(*told, rank, log)) for rank, log in enumerate(logs)]
    try:
        for process in ranks:
            process.start()
        for process, log in zip(ranks, logs, strict=True):
            process.join(LIMIT_S)
            if process.exitcode != 0:
                why = "took too long" if process.exitcode is None else "failed"
                pytest.fail(f"{log.stem} of {layout} {why}:\n{log.read_text()[-3000:]}")
    finally:
        for process in ranks:
            if process.pid is not None:
                process.kill()
                process.join()


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


def _be_rank(module: str, arguments: Sequence[str], environment: dict[str, str], rank: int, log: Path) -> None:
    with log.open("wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
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
