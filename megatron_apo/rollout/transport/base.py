"""What a transport of weights is: its two sides, and what the driver tells a worker beforehand.

A transport brings buckets of the plan (`weights/plan.py`) from the trainer's ranks into every worker of every engine.
While a worker loads one bucket the next ones are on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_apo.runtime.topology import Topology
from megatron_apo.telemetry.timers import Stopwatch
from megatron_apo.weights.digest import DigestKind, digest, digest_kind
from megatron_apo.weights.plan import Bucket, Plan, TensorMeta

PATIENCE = 2 / 3  # of sync.timeout_s, for one step of a transfer; the rest is for telling who is silent


class TransferError(RuntimeError):
    """A transfer broke off on its way: what its receivers have of it is of no use. They can be sent to anew.

    silent: receivers that are to blame, as far as it is known: their places in what was given to `Sender.open`.
    """

    def __init__(self, message: str, silent: Sequence[int] = ()):
        super().__init__(message, tuple(silent))
        self.silent = tuple(silent)

    def __str__(self) -> str:
        return self.args[0]


class Receiver(Protocol):
    """What a sender knows of an engine. `num_starts`: how often it was started, each time with new workers; `places`:
    of these (`ipc.Place`), where that is asked."""

    @property
    def payload_dir(self) -> Path: ...
    @property
    def host(self) -> str: ...
    @property
    def num_workers(self) -> int: ...
    @property
    def num_starts(self) -> int: ...
    @property
    def places(self) -> Sequence[dict[str, Any]]: ...


class Source(Protocol):
    """The trainer's weights in HF names and full shapes (`weights/gather.py`). `plan` is the same on every rank."""

    @property
    def plan(self) -> Plan: ...

    def buckets(
        self,
        to: str,
        buffer_of: Callable[[Bucket], Tensor] | None = None,
        has_room: Callable[[Bucket], bool] | None = None,
        shared: bool = False,
    ) -> Generator[tuple[Bucket, Tensor], None, None]:
        """Collective over the trainer's ranks. Where they are received (`to`), each bucket and its bytes. Who leaves it
        before its end closes it, so that the other ranks hear of it."""


@dataclass(frozen=True)
class Ranks:
    """The trainer's ranks, as one of them sees them. group: in which they wait for each other (`Topology.broadcast`),
    the default group for None; without torch.distributed there is rank 0 alone. device: where the weights are. stage:
    its pipeline stage. is_owner: whether it is the stage's first rank. gives: whether it gives weights at all."""

    rank: int = 0
    group: dist.ProcessGroup | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stage: int = 0
    is_owner: bool = True
    gives: bool = True

    @classmethod
    def of(cls, topology: Topology) -> Ranks:
        rank, stage = topology.rank, topology.pp_rank
        givers = [one for ep_rank in range(topology.ep) for one in topology.owner_ranks(stage, ep_rank)]
        return cls(rank, topology.host_group, topology.device, stage, rank == givers[0], rank in givers)

    @property
    def digest_kind(self) -> DigestKind:
        return digest_kind(self.device)

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, on all ranks."""
        if not dist.is_initialized():
            return [value]
        values = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        box = [value]
        if dist.is_initialized():
            dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]


class Update(Protocol):
    """The driver's side of an update, as a sender sees it."""

    watch: Stopwatch

    def require_readers(self, bucket: Bucket) -> None:
        """Raise ServerError where no engine is left that reads this bucket."""

    def silent(self, receivers: Sequence[Receiver], why: str) -> None:
        """These have not read what they were given; they are waited for no longer. Raises where none is left."""


def phases_of(update: Update | None) -> Callable[[str], AbstractContextManager[None]]:
    """What measures the phases of an update: on the driver its stopwatch, elsewhere nothing."""
    return update.watch.phase if update else lambda name: nullcontext()


class Sender(Protocol):
    """The trainer's side, one on every rank. `meet` and `send` are collective; the others are called on the driver."""

    def open(self, receivers: Sequence[Receiver]) -> None:
        """An update of these engines begins. Raises OSError, or ValueError naming the key to change, where there is no
        room for it."""

    def meet(self) -> None:
        """All ranks know where buckets go."""

    def update_info(self, receiver: Receiver) -> dict[str, Any]:
        """What the engine's workers must know of this update."""

    def send(self, source: Source, update: Update | None) -> dict[str, str]:
        """Bring every bucket to every worker; `update` is None except on the driver. On the driver, a digest of each
        tensor. Raises TransferError, on every rank, where it has to be sent anew."""

    def drop(self, receiver: Receiver) -> None:
        """Wait for this engine no more."""

    def fail(self, receiver: Receiver) -> None:
        """This engine failed in the update, wherever the transfer is. From any thread."""

    def give_up(self) -> None:
        """Workers that still wait for a bucket give up."""

    def start_anew(self) -> None:
        """A transfer broke off for a receiver, after it was sent maybe: the next one uses nothing of it."""

    def close(self) -> None:
        """The update is over, and nothing of it is left that another does not use again."""


@dataclass(frozen=True)
class Outcome:
    """What came of a rank's part of a transfer. broken: why it did not send all of it; blamed: engines, by their
    places; failure: why it could not give its weights."""

    digests: dict[str, str] = field(default_factory=dict)
    broken: str | None = None
    blamed: tuple[int, ...] = ()
    failure: str | None = None

    @property
    def is_sent(self) -> bool:
        return self.broken is None and self.failure is None


def outcome_of(ranks: Ranks, send: Callable[[], dict[str, str]], engine_of: Callable[[int], int | None]) -> Outcome:
    """A rank's part of a transfer, which returns the digests of what it has sent. engine_of: of whom it blames."""
    try:
        return Outcome(send())
    except TransferError as error:
        engines = {engine_of(one) for one in error.silent} - {None}
        return Outcome(broken=str(error), blamed=tuple(one for one in engines if one is not None))
    except (ValueError, RuntimeError, OSError) as error:
        return Outcome(failure=f"rank {ranks.rank}: {error}")


def settled(ranks: Ranks, outcome: Outcome, plan: Plan) -> dict[str, str]:
    """Collective: what came of a transfer as a whole, the same on every rank. On rank 0, the digest of each tensor.

    Raises RuntimeError where a rank could not give its weights, TransferError where the transfer broke off."""
    outcomes: list[Outcome] = ranks.gather(outcome)
    for one in outcomes:
        if one.failure:
            raise RuntimeError(one.failure)
    if broken := [one for one in outcomes if one.broken]:
        first = next((one for one in broken if one.blamed), broken[0])
        raise TransferError(str(first.broken), sorted({engine for one in broken for engine in one.blamed}))
    found = {name: value for one in outcomes for name, value in one.digests.items()}
    return {} if ranks.rank else {meta.name: found[meta.name] for meta in plan.tensors}


class Reader(Protocol):
    """A worker's side."""

    def buckets(self, where: dict[str, Any]) -> Generator[tuple[Bucket, Tensor], None, None]:
        """One update, bucket by bucket, as `Sender.update_info` says; a buffer holds until the next is asked for.
        Raises TransferError where the trainer gave up or falls silent, or another worker failed."""

    def give_up(self, where: dict[str, Any]) -> None:
        """This worker reads no more of an update: nobody need wait for it."""


def bucket_digests(bucket: Bucket, buffer: Tensor, kind: DigestKind) -> dict[str, str]:
    """Of each tensor in a bucket, by name."""
    views = bucket.views(buffer)
    return {meta.name: digest(view, kind) for meta, view in zip(bucket.tensors, views, strict=True)}


def told(plan: Plan) -> list[dict[str, Any]]:
    """The plan as JSON."""
    return [
        {
            "stage": bucket.pp_rank,
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
            pp_rank=bucket["stage"],
            entries=(),
            tensors=tuple(
                TensorMeta(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in bucket["tensors"]
            ),
            offsets=tuple(bucket["offsets"]),
            num_bytes=bucket["num_bytes"],
        )
        for index, bucket in enumerate(buckets)
    ]
