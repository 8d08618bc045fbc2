"""Weights as a sync takes them, without a Megatron model behind them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_apo.rollout.transport.ipc import place_of
from megatron_apo.weights.plan import Bucket, Plan, TensorMeta


@dataclass(eq=False)
class Receiver:
    """An engine as a sender of weights knows it, whose workers are where the test has them."""

    payload_dir: Path = Path("unused")
    num_workers: int = 1
    num_starts: int = 1
    host: str = "127.0.0.1"

    @property
    def places(self) -> list[dict[str, Any]]:
        """This process's, on the CPU."""
        return [asdict(place_of(torch.device("cpu")))] * self.num_workers


class TensorSource:
    """The weight source of plain tensors in this process, in buckets of a few of them (`weight_sync.Source`).

    num_begun: buckets that memory was given for, of those that are given out now."""

    def __init__(self, tensors: dict[str, torch.Tensor], bucket_bytes: int = 200_000):
        self.tensors = tensors
        self.num_begun = 0
        metas = [TensorMeta(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
        self.plan = Plan.of_tensors(metas, bucket_bytes)

    def buckets(
        self, to: str, buffer_of: Callable[[Bucket], torch.Tensor] | None = None, *arguments: object, **options: object
    ) -> Generator[tuple[Bucket, torch.Tensor], None, None]:
        for bucket in self.plan.buckets:
            buffer = buffer_of(bucket) if buffer_of else torch.empty(bucket.num_bytes, dtype=torch.uint8)
            self.num_begun = bucket.index + 1
            for meta, view in zip(bucket.tensors, bucket.views(buffer), strict=True):
                view.copy_(self.tensors[meta.name])
            yield bucket, buffer
