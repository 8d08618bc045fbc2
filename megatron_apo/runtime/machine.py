"""The machine that a recipe is held against, as a value."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from megatron_apo.runtime.gpus import Capability, gpu_memory_bytes, visible_gpus
from megatron_apo.runtime.job import is_rank, num_local_ranks


@dataclass(frozen=True)
class Machine:
    """What this process may compute on.

    gpus: none for the CPU. gpu_memory_bytes: of each of them. available_bytes: host memory. ranks_here: how many ranks
    of a job that someone else started are on this machine; None where this process would start them.
    """

    gpus: tuple[Capability, ...] = ()
    gpu_memory_bytes: tuple[int, ...] = ()
    available_bytes: int = 2**63
    ranks_here: int | None = None

    @classmethod
    def here(cls) -> Machine:
        gpus = tuple(visible_gpus())
        return cls(
            gpus,
            tuple(gpu_memory_bytes()) if gpus else (),
            psutil.virtual_memory().available,
            # torchrun says how many there are; without a word, as many as there are GPUs.
            (num_local_ranks() or len(gpus) or 1) if is_rank() else None,
        )

    @property
    def capability(self) -> Capability | None:
        """What all of the GPUs can do."""
        return min(self.gpus, default=None)
