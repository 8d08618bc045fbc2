"""A driver that works alone for longer than a collective may wait. Each rank leaves what it was told.

    main(WORK, LAYOUT)

WORK has a model of its own, which is exported to WORK/exported.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_apo.model.build import build_model
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.parallel.groups import distributed
from megatron_apo.rollout.engine import Address, Engine, State
from megatron_apo.rollout.server import ServerError
from megatron_apo.rollout.transport.base import Ranks
from megatron_apo.rollout.weight_sync import SyncError, WeightSync
from megatron_apo.runtime.collective import on_driver
from megatron_apo.runtime.topology import Topology
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.parameters import load_weights
from megatron_apo.weights.plan import Bucket, Plan
from megatron_apo.weights.stream import WeightStream, export_hf
from tests.dist.ranks import parallel_of

MODEL = "qwen3-tied"
TIMEOUT_S = 6.0
BUCKET_BYTES = 40_000  # of a layer about two


def work() -> str:
    time.sleep(1.5 * TIMEOUT_S)
    return "done"


class Nothing:
    """Weights of which there are none, gathered as others are: the ranks wait for each other in the default group."""

    plan = Plan.of_tensors([], BUCKET_BYTES)

    def buckets(self, *arguments: object, **options: object) -> Generator[tuple[Bucket, Tensor], None, None]:
        dist.barrier()
        yield from ()


class Slow(WeightStream):
    """Weights of which the driver takes its time over the first tensor, and after the last."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for index, tensor in enumerate(super().__iter__()):
            yield tensor
            if index == 0:
                work()
        if self._topology.is_driver:
            work()


class Broken(WeightStream):
    """Weights of which the driver finds no memory for the second bucket."""

    def buckets(self, *arguments: object, **options: object) -> Generator[tuple[Bucket, Tensor], None, None]:
        return super().buckets("driver", memory_for_one)


class ToTheDriver(WeightStream):
    """Weights that the driver puts together before it asks for the engines' memory, as those of GPUs."""

    def buckets(self, *arguments: object, **options: object) -> Generator[tuple[Bucket, Tensor], None, None]:
        return super().buckets("driver")


def memory_for_one(bucket: Bucket) -> Tensor:
    if bucket.index == 1:
        raise RuntimeError("no memory")
    return torch.empty(bucket.num_bytes, dtype=torch.uint8)


def refuse(info: dict[str, Any]) -> None:
    raise ServerError("refused")


def read_on(info: dict[str, Any]) -> None:
    while not (Path(info["where"]["folder"]) / "given-up").exists():
        time.sleep(0.01)


def sync(
    folder: Path,
    topology: Topology,
    weights: Nothing | WeightStream,
    load: Callable[[dict[str, Any]], None],
    pause: Callable[[], object] = lambda: None,
) -> str:
    """What comes of a sync with a server that does this with an update."""
    client = SimpleNamespace(pause=pause, start_weight_update=lambda: None, update_weights=load, abandon=print)
    engine = Engine(Address("", "", folder))
    engine._client, engine.state = client, State.STARTED  # type: ignore[assignment]
    given = WeightSync(weights, [engine] if topology.is_driver else [], ranks=Ranks.of(topology))
    try:
        given.sync(1)
    except SyncError as error:
        return str(error)
    return "nothing"


def all_there(folder: Path, rank: int, world_size: int) -> None:
    """Wait until every rank has imported what it needs, which takes longer than the timeout."""
    (folder / f"there{rank}").touch()
    while len(list(folder.glob("there*"))) < world_size:
        time.sleep(0.01)


def main(folder: str, layout: str) -> None:
    parallel, path = parallel_of(layout).model_copy(update={"timeout_s": TIMEOUT_S}), Path(folder)
    spec = read_hf_config(path / MODEL)
    all_there(path, int(os.environ["RANK"]), parallel.world_size)
    with distributed(parallel) as topology:
        (path / f"told{topology.rank}").write_text(on_driver(topology, work))
        (path / f"synced{topology.rank}").write_text(sync(path, topology, Nothing(), refuse, pause=work))
        chunks = build_model(spec, parallel, topology)
        load_weights(chunks, spec, topology, HFReader(path / MODEL))
        broken = Broken(chunks, spec, topology, bucket_bytes=BUCKET_BYTES)
        (path / f"gathered{topology.rank}").write_text(sync(path, topology, broken, read_on))
        gathered = ToTheDriver(chunks, spec, topology, bucket_bytes=BUCKET_BYTES)
        (path / f"refused{topology.rank}").write_text(sync(path, topology, gathered, refuse))
        slow = Slow(chunks, spec, topology, bucket_bytes=BUCKET_BYTES)
        export_hf(slow, topology, source=path / MODEL, out=path / "exported")
