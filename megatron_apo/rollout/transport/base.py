"""What a transport of weights is: its two sides, and what the driver tells a worker beforehand.

A transport brings buckets of the plan (`weights/plan.py`) from the driver into every worker of every engine. While a
worker loads one bucket the next ones are on their way.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_apo.weights.plan import Bucket, Plan, TensorMeta


class Receiver(Protocol):
    """What a sender knows of an engine."""

    @property
    def payload_dir(self) -> Path: ...
    @property
    def num_workers(self) -> int: ...


class Sender(Protocol):
    """The trainer's side. All but `join` and `buffer_of` is called on the driver alone."""

    @property
    def num_bytes(self) -> int:
        """Of memory that it takes on the driver's host."""

    def open(self, receivers: Sequence[Receiver]) -> None:
        """An update of these engines begins. Raises OSError, or ValueError naming the key to change, where there is no
        room for it."""

    def update_info(self, receiver: Receiver) -> dict[str, Any]:
        """What the engine's workers must know of this update."""

    def place(self) -> Any:
        """What other ranks need for `join`."""

    def join(self, place: Any) -> bool:
        """On another rank than the driver: whether it can write into the same memory."""

    def buffer_of(self, bucket: Bucket) -> Tensor:
        """Where a bucket is put together, bytes, once there is room for it."""

    def has_room(self, bucket: Bucket) -> bool:
        """Whether all have read what was there before."""

    def publish(self, bucket: Bucket) -> None:
        """The bucket is whole: the workers may read it."""

    def drop(self, receiver: Receiver) -> None:
        """Wait for this engine no more."""

    def give_up(self) -> None:
        """Workers that still wait for a bucket give up."""

    def close(self) -> None:
        """The update is over, and nothing of it is left."""


class Reader(Protocol):
    """A worker's side."""

    def buckets(self, where: dict[str, Any]) -> Generator[tuple[Bucket, Tensor], None, None]:
        """One update, bucket by bucket, as `Sender.update_info` says; a buffer holds until the next is asked for.
        Raises ValueError where the trainer gave up or falls silent, or another worker failed."""

    def give_up(self, where: dict[str, Any]) -> None:
        """This worker reads no more of an update: nobody need wait for it."""


def told(plan: Plan) -> list[dict[str, Any]]:
    """The plan as JSON."""
    return [
        {
            "num_bytes": bucket.num_bytes,
            "offsets": list(bucket.offsets),
            "tensors": [
                [meta.name, str(meta.dtype).removeprefix("torch."), list(meta.shape)] for meta in bucket.tensors
            ],
        }
        for bucket in plan.buckets
    ]


def heard(buckets: list[dict[str, Any]]) -> list[Bucket]:
    """The inverse of `told`, as far as a worker needs it."""
    return [
        Bucket(
            index=index,
            pp_rank=0,
            entries=(),
            tensors=tuple(
                TensorMeta(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in bucket["tensors"]
            ),
            offsets=tuple(bucket["offsets"]),
            num_bytes=bucket["num_bytes"],
        )
        for index, bucket in enumerate(buckets)
    ]
