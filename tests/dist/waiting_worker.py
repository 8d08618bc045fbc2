"""A driver that works alone for longer than a collective may wait. Each rank leaves what it was told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

from megatron_apo.parallel.topology import Topology, distributed
from megatron_apo.rollout.failures import on_driver
from megatron_apo.rollout.server import ServerError
from megatron_apo.rollout.weight_sync import SyncError, WeightSync
from tests.dist.ranks import parallel_of

TIMEOUT_S = 10.0


def work() -> str:
    time.sleep(1.5 * TIMEOUT_S)
    return "done"


class Nothing:
    """Weights of which there are none, gathered as others are: the ranks wait for each other in the default group."""

    def metadata(self) -> list:
        return []

    def __iter__(self) -> Iterator:
        dist.barrier()
        return iter(())


def sync(folder: Path, topology: Topology) -> str:
    """What comes of a sync with a server that is slow to pause, and then refuses the update."""

    def refuse() -> None:
        raise ServerError("refused")

    there = topology.is_driver
    client = SimpleNamespace(pause=work, start_weight_update=refuse) if there else None
    given = WeightSync(
        Nothing(), client=client, folder=folder if there else None, rank=topology.rank, group=topology.host_group
    )
    given.num_workers = 1
    try:
        given.sync(1)
    except SyncError as error:
        return str(error)
    return "nothing"


def main(folder: str, layout: str) -> None:
    with distributed(parallel_of(layout).model_copy(update={"timeout_s": TIMEOUT_S})) as topology:
        (Path(folder) / f"told{topology.rank}").write_text(on_driver(topology, work))
        (Path(folder) / f"synced{topology.rank}").write_text(sync(Path(folder), topology))
