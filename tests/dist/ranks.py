"""Layouts by name ("tp2-pp2-vpp2"), and their ranks as processes."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_apo.config import ParallelConfig
from tests.models import EXPERTS, VARIANTS

ROOT = Path(__file__).parents[2]
ONE_RANK = "tp1"


def parallel_of(layout: str) -> ParallelConfig:
    """The layout of a name: sizes of `ParallelConfig`, joined by dashes; those not named are 1."""
    sizes = {name: int(size) for name, size in re.findall(r"([a-z]+)(\d+)", layout)}
    return ParallelConfig(**sizes, timeout_s=120)


def variants_of(layout: str) -> list[str]:
    """The variants that this layout can hold: experts need one tensor rank, and dense models no expert ranks."""
    parallel = parallel_of(layout)
    return [name for name in VARIANTS if (parallel.tp == 1 if name in EXPERTS else parallel.ep == 1)]


def start_ranks(module: str, work: Path, layout: str, *arguments: str) -> None:
    """Run `python -m MODULE WORK LAYOUT [ARGUMENTS]` as the layout's ranks; fails with the log of a rank that fails."""
    world_size = parallel_of(layout).world_size
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-m", module, str(work), layout, *arguments]
    logs = [open(work / f"rank{rank}.log", "w+") for rank in range(world_size)]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env=environment | {"RANK": str(rank)}, stdout=logs[rank], stderr=logs[rank])
        for rank in range(world_size)
    ]
    try:
        for rank, process in enumerate(ranks):
            if process.wait(timeout=300):
                logs[rank].seek(0)
                pytest.fail(f"rank {rank} of {layout} failed:\n{logs[rank].read()[-3000:]}")
    finally:
        for process, log in zip(ranks, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
