"""The machine that a recipe is held against, as a value."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_apo.runtime.gpus import Capability, gpu_memory_bytes, visible_gpus
from megatron_apo.runtime.job import is_rank, num_local_ranks, num_nodes, world_size


@dataclass(frozen=True)
class Machine:
    """What this process may compute on.

    gpus: none for the CPU. gpu_memory_bytes: of each of them. available_bytes: host memory. shared_bytes: room in
    /dev/shm. ranks_here: how many ranks of a job that someone else started are on this machine; None where this process
    would start them. num_nodes: machines of that job.
    """

    gpus: tuple[Capability, ...] = ()
    gpu_memory_bytes: tuple[int, ...] = ()
    available_bytes: int = 2**63
    shared_bytes: int = 2**63
    ranks_here: int | None = None
    num_nodes: int = 1

    @classmethod
    def here(cls) -> Machine:
        gpus = tuple(visible_gpus())
        # torchrun says how many ranks and nodes there are; without a word, there is a rank for each GPU.
        ranks_here = (num_local_ranks() or len(gpus) or 1) if is_rank() else None
        nodes = num_nodes() or (-(-world_size() // len(gpus)) if gpus else 1)
        return cls(
            gpus,
            tuple(gpu_memory_bytes()) if gpus else (),
            psutil.virtual_memory().available,
            free_bytes(Path("/dev/shm")),
            ranks_here,
            nodes if is_rank() else 1,
        )

    def room(self, folder: Path | None) -> int:
        """Bytes that are free in /dev/shm, or in the file system that `folder` is or will be in."""
        return self.shared_bytes if folder is None else free_bytes(folder)

    @property
    def capability(self) -> Capability | None:
        """What all of the GPUs can do."""
        return min(self.gpus, default=None)


def free_bytes(folder: Path) -> int:
    """Of the file system of a folder that is there, or of the first one above it that is."""
    folder = folder.absolute()
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free
