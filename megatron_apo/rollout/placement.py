"""Which engines are where: on the hosts of the trainer's ranks, or on nodes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_apo.config import Recipe, RolloutConfig


@dataclass(frozen=True)
class Placement:
    """by_rank: numbers of engines that are started by this rank's process, the first on its host; rank 0's are the
    driver's own. Engines that are in none join from nodes of their own."""

    by_rank: dict[int, list[int]]
    num_engines: int

    @classmethod
    def of(cls, rollout: RolloutConfig, hosts: Sequence[str]) -> Placement:
        """hosts: each rank's, by a name that tells it from others. Colocated engines are spread over the hosts as
        evenly as they can be, in the order of the hosts' first ranks."""
        if rollout.placement == "dedicated":
            return cls({}, rollout.replicas)
        firsts = [hosts.index(host) for host in dict.fromkeys(hosts)] or [0]
        share, more = divmod(rollout.replicas, len(firsts))
        by_rank, number = {}, 0
        for place, rank in enumerate(firsts):
            count = share + (place < more)
            by_rank[rank] = list(range(number, number + count))
            number += count
        return cls(by_rank, rollout.replicas)

    @property
    def here(self) -> list[int]:
        """Of the driver's host."""
        return self.by_rank.get(0, [])

    @property
    def elsewhere(self) -> list[int]:
        """On other hosts."""
        return [number for number in range(self.num_engines) if number not in self.here]


def transport_of(recipe: Recipe, placement: Placement, on_gpu: bool) -> str:
    """How weights travel: `sync.transport`, or for "auto" what suits best. Raises ValueError where it cannot be."""
    wanted, colocated = recipe.sync.transport, recipe.rollout.placement == "colocated"
    if wanted == "shm" and placement.elsewhere:
        raise ValueError(
            "sync.transport: shm, but engines are on other machines than rank 0's; use collective, or auto"
        )
    if wanted == "collective" and on_gpu and colocated:
        raise ValueError(
            "sync.transport: collective, but colocated engines share GPUs with the trainer's ranks, and NCCL takes one "
            "process a GPU; use shm or ipc, or rollout.placement=dedicated"
        )
    if wanted != "auto":
        return wanted
    if not placement.elsewhere:
        return "shm"
    return "ipc" if on_gpu and colocated else "collective"
