"""Weights as a sync takes them, without a Megatron model behind them."""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch

from megatron_apo.weights.plan import Bucket, Plan, TensorMeta


class TensorSource:
    """The weight source of plain tensors in this process, in buckets of a few of them (`weight_sync.Source`)."""

    def __init__(self, tensors: dict[str, torch.Tensor], bucket_bytes: int = 200_000):
        self.tensors = tensors
        metas = [TensorMeta(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
        self.plan = Plan.of_tensors(metas, bucket_bytes)

    def buckets(
        self, to: str, buffer_of: Callable[[Bucket], torch.Tensor] | None = None, has_room: object = None
    ) -> Generator[tuple[Bucket, torch.Tensor], None, None]:
        for bucket in self.plan.buckets:
            buffer = buffer_of(bucket) if buffer_of else torch.empty(bucket.num_bytes, dtype=torch.uint8)
            for meta, view in zip(bucket.tensors, bucket.views(buffer), strict=True):
                view.copy_(self.tensors[meta.name])
            yield bucket, buffer
