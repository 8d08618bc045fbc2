"""A sync over two trainer ranks: collective gathering, and no rank left waiting when another fails."""

from __future__ import annotations

from collections.abc import Callable, Generator
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_apo.rollout.engine import Address, Engine
from megatron_apo.rollout.proof import prove
from megatron_apo.rollout.server import ServerDied
from megatron_apo.rollout.transport.base import Ranks
from megatron_apo.rollout.weight_sync import SyncError, WeightSync
from megatron_apo.weights.plan import Bucket
from tests.e2e.conftest import ModelSource, Rollouts, log_probs, tiny_model

SEQUENCE = list(range(2, 30))


class HalvedSource(ModelSource):
    """Each rank holds half of every tensor, as in tensor parallelism; rank 0 cannot put `lost` together."""

    lost: str | None = None

    def buckets(
        self, to: str, buffer_of: Callable[[Bucket], torch.Tensor] | None = None, *arguments: object, **options: object
    ) -> Generator[tuple[Bucket, torch.Tensor], None, None]:
        for bucket in self.plan.buckets:
            wholes = {}
            for meta in bucket.tensors:
                half = self.tensors[meta.name].reshape(2, -1)[dist.get_rank()].clone()
                halves = [torch.empty_like(half) for _ in range(2)] if dist.get_rank() == 0 else None
                dist.gather(half, halves)
                if halves is not None:
                    wholes[meta.name] = torch.cat(halves).reshape(meta.shape)
            if dist.get_rank() == 0:
                if self.lost in wholes:
                    raise RuntimeError(f"no memory for {self.lost}")
                buffer = buffer_of(bucket) if buffer_of else torch.empty(bucket.num_bytes, dtype=torch.uint8)
                for meta, view in zip(bucket.tensors, bucket.views(buffer), strict=True):
                    view.copy_(wholes[meta.name])
                yield bucket, buffer


def trainer_rank(rank: int, store: str, url: str, token: str, folder: Path) -> list:
    """What a rank is told, in order."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    engines = []
    if rank == 0:
        engines = [Engine(Address(url, token, folder))]
        engines[0].start()
    model = tiny_model("qwen3", True, seed=61)
    source = HalvedSource(model)
    sync = WeightSync(source, engines, ranks=Ranks(rank))
    for engine in engines:
        engine.connect(sync.init_info)
    report = sync.sync(version=5)
    told = [report.version, len(report.digests) > 0]
    told.append(prove(sync, [SEQUENCE], [log_probs(model, SEQUENCE)]).max <= 1e-4)
    source.lost = "model.norm.weight"
    for attempt in (
        lambda: prove(sync, [SEQUENCE], [log_probs(model, SEQUENCE[::-1])]),
        lambda: sync.sync(version=6),
    ):
        try:
            attempt()
        except (SyncError, ServerDied) as error:
            told.append(f"{type(error).__name__}: {error}")
        if rank == 0:
            engines[0].client.resume()
        dist.barrier()
    dist.destroy_process_group()
    return told


def second_rank(outcome, *arguments) -> None:
    outcome.put(trainer_rank(1, *arguments))


def test_both_ranks_take_part_and_both_hear_of_a_failure(rollouts: Rollouts, tmp_path: Path) -> None:
    context = get_context("spawn")
    outcome = context.Queue()
    server = rollouts.server
    arguments = (str(tmp_path / "store"), server.url, server.token, server.payload_dir)
    other = context.Process(target=second_rank, args=(outcome, *arguments))
    other.start()
    try:
        told = [trainer_rank(0, *arguments), outcome.get(timeout=90)]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            other.kill()
        other.join(20)
        other.kill()
        server.stop()  # an update that was not ended leaves it unusable
    assert told[0][:3] == [5, True, True] and told[1][:3] == [5, False, True]
    assert "log-probs differ" in told[0][3]
    assert told[0][4].endswith("weights could not be gathered: no memory for model.norm.weight")
    assert told[1][3:] == [text.replace("SyncError: ", "SyncError: rank 0: ") for text in told[0][3:]]
