"""A sync over two trainer ranks: collective gathering, and no rank left waiting when another fails."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_apo.rollout.engine import Address, Engine
from megatron_apo.rollout.proof import prove
from megatron_apo.rollout.server import ServerDied
from megatron_apo.rollout.weight_sync import SyncError, WeightSync
from tests.e2e.conftest import ModelSource, Rollouts, log_probs, tiny_model

SEQUENCE = list(range(2, 30))


class HalvedSource(ModelSource):
    """Each rank holds half of every tensor, as in tensor parallelism; `lost` is left out on rank 0."""

    lost: str | None = None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in self.model.named_parameters():
            half = value.detach().reshape(2, -1)[dist.get_rank()].clone()
            halves = [torch.empty_like(half) for _ in range(2)] if dist.get_rank() == 0 else None
            dist.gather(half, halves)
            if halves is not None and name != self.lost:
                yield name, torch.cat(halves).reshape(value.shape)


def trainer_rank(rank: int, store: str, url: str, token: str, folder: Path) -> list:
    """What a rank is told, in order."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    engines = []
    if rank == 0:
        engines = [Engine(Address(url, token, folder))]
        engines[0].start()
        engines[0].connect()
    model = tiny_model("qwen3", True, seed=61)
    source = HalvedSource(model)
    sync = WeightSync(source, engines, rank=rank)
    report = sync.sync(version=5)
    told = [report.version, len(report.checksums) > 0]
    told.append(prove(sync, [SEQUENCE], [log_probs(model, SEQUENCE)], 1e-4) <= 1e-4)
    source.lost = "model.norm.weight"
    for attempt in (
        lambda: sync.sync(version=6),
        lambda: prove(sync, [SEQUENCE], [log_probs(model, SEQUENCE[::-1])], 1e-4),
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
    assert told[0][:3] == [5, True, True] and told[1][:3] == [5, False, True]
    assert "the source left out model.norm.weight" in told[0][3] and "log-probs differ" in told[0][4]
    assert told[1][3:] == [text.replace("SyncError: ", "SyncError: rank 0: ") for text in told[0][3:]]
