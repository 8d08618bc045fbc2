"""Which rank is what, as every part sees it. `parallel/groups.py` makes one, through Megatron-Core.

Rank order is Megatron's (tp fastest, then cp, dp and pp). Expert-parallel groups lie within cp x dp: `ep` of these
ranks in a row share one set of experts. Global rank 0 is the driver: it talks to the rollout engines, writes metrics
and sees the user.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Topology:
    """This process's place. Groups are torch process groups."""

    rank: int
    world_size: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    tp: int
    pp: int
    dp: int
    tp_group: Any
    pp_group: Any
    dp_group: Any  # the same sequences' next replicas: context-parallel ranks of one replica are no members
    device: torch.device
    ep: int = 1
    cp: int = 1
    cp_rank: int = 0
    cp_group: Any = None
    vpp: int = 1
    host_group: Any = None  # all ranks, over gloo whatever the device; none: the default group
    replica_group: Any = None  # the ranks of this data-parallel replica, over gloo; none: the default group
    hosts: tuple[str, ...] = ()  # each rank's, by a name that tells it from others; none: all are on one

    @property
    def ep_rank(self) -> int:
        return (self.dp_rank * self.cp + self.cp_rank) % self.ep

    @property
    def is_driver(self) -> bool:
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def last_stage_rank(self) -> int:
        """A global rank of the last pipeline stage, the same on every rank, as the source of a broadcast must be."""
        return self.world_size - 1

    def owner_ranks(self, pp_rank: int, ep_rank: int = 0) -> list[int]:
        """Global ranks of stage `pp_rank`, by tensor rank, first of those that hold the experts of `ep_rank`.

        What is no expert is the same on all context- and data-parallel ranks.
        """
        first = (ep_rank + pp_rank * self.dp * self.cp) * self.tp
        return [first + tp_rank for tp_rank in range(self.tp)]

    def replica_ranks(self, replica: int) -> list[int]:
        """Global ranks of a data-parallel replica, ascending. Those of replica 0 begin with the driver."""
        inner = self.tp * self.cp
        return [rank + inner * (replica + self.dp * pp_rank) for pp_rank in range(self.pp) for rank in range(inner)]

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """The object of global rank `src`, on every rank, which waits for it on the host and as long as it takes.

        Rank 0 works alone for hours, by limits of its own (rollout.request_timeout_s and others); a group's timeout
        would end that, and waiting by NCCL would keep busy the GPUs on which vLLM generates.
        """
        box = [value]
        dist.broadcast_object_list(box, src=src, group=self.host_group)
        return box[0]
