"""The machine that a recipe is held against, as a value: this one, or one that somebody describes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_apo.runtime.gpus import Capability, gpu_memory_bytes, visible_gpus
from megatron_apo.runtime.job import is_rank, num_local_ranks, num_nodes, world_size

UNLIMITED = 2**63  # bytes, where nobody has said how many there are
_MIB = 2**20
# What a machine can be described with: capability, and the memory that NVML tells of (`nvidia-smi`).
KNOWN_GPUS: dict[str, tuple[Capability, int]] = {
    "A100-40GB": ((8, 0), 40960 * _MIB),
    "A100": ((8, 0), 81920 * _MIB),
    "H100": ((9, 0), 81559 * _MIB),
    "H200": ((9, 0), 143771 * _MIB),
    "B200": ((10, 0), 183359 * _MIB),
}


@dataclass(frozen=True)
class Machine:
    """What this process may compute on.

    gpus: none for the CPU. gpu_memory_bytes: of each of them. available_bytes: host memory. shared_bytes: room in
    /dev/shm. ranks_here: how many ranks of a job that someone else started are on this machine; None where this process
    would start them. num_nodes: machines of that job. described_nodes: how many such nodes there are in all, where they
    are only described; 0 for a machine that is here. Of described ones nothing else is known: their software counts as
    installed, their network as working.
    """

    gpus: tuple[Capability, ...] = ()
    gpu_memory_bytes: tuple[int, ...] = ()
    available_bytes: int = UNLIMITED
    shared_bytes: int = UNLIMITED
    ranks_here: int | None = None
    num_nodes: int = 1
    described_nodes: int = 0

    @classmethod
    def described(
        cls, gpu: str, gpus: int, nodes: int = 1, *, num_ranks: int, available_bytes: int = UNLIMITED
    ) -> Machine:
        """The first of `nodes` with `gpus` GPUs each, which a job of `num_ranks` fills one after the other. Raises
        ValueError for a GPU not known."""
        if gpu not in KNOWN_GPUS:
            raise ValueError(f"{gpu!r} is not a GPU known here; use one of {', '.join(KNOWN_GPUS)}")
        capability, memory_bytes = KNOWN_GPUS[gpu]
        return cls(
            (capability,) * gpus,
            (memory_bytes,) * gpus,
            available_bytes,
            ranks_here=min(num_ranks, gpus),
            num_nodes=-(-num_ranks // gpus),
            described_nodes=nodes,
        )

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
        return self.shared_bytes if folder is None or self.is_described else free_bytes(folder)

    @property
    def is_described(self) -> bool:
        """Whether it is somewhere else, if anywhere."""
        return self.described_nodes > 0

    @property
    def capability(self) -> Capability | None:
        """What all of the GPUs can do."""
        return min(self.gpus, default=None)


def free_bytes(folder: Path) -> int:
    """Of the file system of a folder that is there, or of the first one above it that is."""
    folder = folder.absolute()
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free
