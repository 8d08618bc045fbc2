"""`ipc`: engines that share GPUs with the trainer's ranks read buckets where a rank has put them together.

    every rank       receives every bucket (`Gather.buckets("all")`) into slots on its own device
    each worker      opens the slots of the rank that is on its device, and loads from there

NCCL takes one process a GPU, so nothing can be sent between two that share one; but a process may open memory of
another on the same host. Whole tensors reach a GPU once, over the trainer's own groups, whatever its workers make of
them.

    TMPDIR of the engine/update-X/published, read.RANK, given-up, failed      as those of `shm`, for each worker its own

Where the device is a CPU the slots are shared memory: that is what runs in the tests. On GPUs it never ran.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_apo.rollout.transport.base import (
    PATIENCE,
    Ranks,
    Receiver,
    Source,
    TransferError,
    Update,
    bucket_digests,
    outcome_of,
    phases_of,
    settled,
)
from megatron_apo.rollout.transport.memory import mapped, slot_size
from megatron_apo.rollout.transport.shm import NUM_SLOTS, ShmReader, count, grow, slot_of
from megatron_apo.runtime.hosts import this_host
from megatron_apo.weights.plan import Bucket, Plan

Worker = tuple[int, int]  # an engine's place among those of an update, and the worker's rank in it


@dataclass(frozen=True)
class Place:
    """Where a process has its weights. namespaces: those in which it can open another's memory."""

    host: str
    device: str
    namespaces: str
    folder: str  # for temporary files


def place_of(device: torch.device) -> Place:
    """This process's."""
    name = "cpu" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)
    namespaces = " ".join(os.readlink(f"/proc/self/ns/{kind}") for kind in ("ipc", "pid"))
    return Place(this_host(), name, namespaces, tempfile.gettempdir())


class IpcSender:
    """The trainer's side. See `Sender`."""

    def __init__(self, plan: Plan, ranks: Ranks | None = None, timeout_s: float = 120.0):
        self._ranks = ranks or Ranks()
        self._timeout_s = timeout_s
        self._plan = plan
        self._slot_bytes = slot_size(plan)
        self._slots: _Slots | None = None
        self._folders: dict[Worker, Path] = {}  # of the present update, of this rank's workers
        self._told: dict[Worker, dict[str, Any]] = {}  # of all ranks' workers
        self._receivers: list[Receiver] = []  # the driver's

    def open(self, receivers: Sequence[Receiver]) -> None:
        self._receivers = list(receivers)

    def meet(self) -> None:
        places = self._ranks.broadcast([list(one.places) for one in self._receivers])
        ranks: list[Place] = self._ranks.gather(place_of(self._ranks.device))
        told: dict[Worker, dict[str, Any]] = {}
        problem = ""
        for engine, workers in enumerate(places):
            for number, place in enumerate(Place(**worker) for worker in workers):
                rank = _rank_at(place, ranks, f"worker {number} of engine {engine}")
                if rank == self._ranks.rank:
                    try:
                        told[engine, number] = self._open_for((engine, number), place)
                    except OSError as error:
                        problem = f"{place.host}: the folder of engine {engine} cannot be used: {error}"
        answers = self._ranks.gather((told, problem))
        if problems := [text for _, text in answers if text]:
            raise TransferError(problems[0])
        self._told = {worker: info for one, _ in answers for worker, info in one.items()}

    def _open_for(self, worker: Worker, place: Place) -> dict[str, Any]:
        """What a worker of this rank's device must know."""
        if self._slots is None:
            self._slots = _Slots.made(NUM_SLOTS * self._slot_bytes, self._ranks.device)
        folder = Path(tempfile.mkdtemp(prefix="update-", dir=place.folder))
        (folder / "published").touch()
        self._folders[worker] = folder
        limits = {"slot_bytes": self._slot_bytes, "timeout_s": 2 * self._timeout_s}
        return {"folder": str(folder), "memory": self._slots.told, **limits}

    def update_info(self, receiver: Receiver) -> dict[str, Any]:
        engine = self._receivers.index(receiver)
        return {"workers": [self._told[engine, number] for number in range(receiver.num_workers)]}

    def send(self, source: Source, update: Update | None) -> dict[str, str]:
        outcome = outcome_of(self._ranks, lambda: self._send(source, update), lambda engine: engine)
        if not outcome.is_sent:
            self.give_up()
        try:
            return settled(self._ranks, outcome, self._plan)
        finally:
            if update is None:  # the driver's update closes its own
                self.close()

    def drop(self, receiver: Receiver) -> None:
        """Its folders say so themselves."""

    def fail(self, receiver: Receiver) -> None:
        """Its workers have said so in their folders (`Reader.give_up`), or are gone with these."""

    def start_anew(self) -> None:
        pass

    def give_up(self) -> None:
        for folder in self._folders.values():
            with suppress(OSError):
                (folder / "given-up").touch()

    def close(self) -> None:
        """Readers that have all of it need the folder no more; those that have not, in time, find it gone."""
        end = time.monotonic() + self._timeout_s
        for worker, folder in self._folders.items():
            while count(folder / f"read.{worker[1]}") < len(self._plan.buckets) and not _is_over(folder):
                if time.monotonic() > end:
                    break
                time.sleep(1e-3)
            shutil.rmtree(folder, ignore_errors=True)
        self._folders.clear()

    def _send(self, source: Source, update: Update | None) -> dict[str, str]:
        digests: dict[str, str] = {}
        phase = phases_of(update)
        with closing(source.buckets("all", self._slot)) as buckets, phase("gather"):
            for bucket, buffer in buckets:
                if self._ranks.rank == 0:
                    with phase("digest"):
                        digests |= bucket_digests(bucket, buffer, self._ranks.digest_kind)
                if self._ranks.device.type == "cuda":
                    torch.cuda.current_stream().synchronize()  # another process reads it
                for folder in self._folders.values():
                    with suppress(OSError):  # it goes with the engine
                        grow(folder / "published")
        return digests

    def _slot(self, bucket: Bucket) -> Tensor:
        """Where a bucket is put together, once this rank's workers have read what was there. On a rank without workers
        some memory."""
        if self._slots is None:
            return torch.empty(bucket.num_bytes, dtype=torch.uint8, device=self._ranks.device)
        patience_s = PATIENCE * self._timeout_s
        end = time.monotonic() + patience_s
        while waiting := [worker for worker in self._folders if not self._has_read(worker, bucket)]:
            if time.monotonic() > end:
                engines = sorted({engine for engine, _ in waiting})
                raise TransferError(f"it has read no bucket of weights for {patience_s:g} s", engines)
            time.sleep(2e-4)
        return slot_of(bucket, self._slots.memory, self._slot_bytes)

    def _has_read(self, worker: Worker, bucket: Bucket) -> bool:
        """What was in the bucket's slot before. Raises TransferError where it reads no more."""
        folder = self._folders[worker]
        if (folder / "failed").exists() or not folder.is_dir():
            raise TransferError(f"worker {worker[1]} of engine {worker[0]} reads no more")
        return count(folder / f"read.{worker[1]}") > bucket.index - NUM_SLOTS


def _is_over(folder: Path) -> bool:
    return not folder.is_dir() or (folder / "given-up").exists() or (folder / "failed").exists()


def _rank_at(place: Place, ranks: Sequence[Place], who: str) -> int:
    """The first rank that has its weights where a worker has. Raises ValueError where none has, or its memory is closed
    to the worker."""
    for rank, other in enumerate(ranks):
        if (other.host, other.device) == (place.host, place.device):
            if other.namespaces != place.namespaces:
                raise ValueError(
                    f"sync.transport: ipc, but {who} is in another IPC or PID namespace than rank {rank}, as in a "
                    "container of its own; start both in one, or use another transport"
                )
            return rank
    raise ValueError(
        f"sync.transport: ipc, but {who} is on a device that no rank of the trainer has ({place.device}); use as many "
        "ranks as there are GPUs for engines, or another transport"
    )


class IpcReader(ShmReader):
    """A worker's side. See `Reader`."""

    def __init__(self, buckets: Sequence[Bucket], rank: int, device: torch.device):
        super().__init__(buckets, rank, device)
        self._device = device
        self._opened: tuple[Any, _Slots] | None = None

    def own(self, where: dict[str, Any]) -> dict[str, Any]:
        return where["workers"][self._rank]

    def memory(self, where: dict[str, Any]) -> Tensor:
        told = where["memory"]
        if self._opened is None or self._opened[0] != told:
            self._opened = told, _Slots.opened(told, self._device)
        return self._opened[1].memory

    def has_read(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the rank writes there next


@dataclass(frozen=True)
class _Slots:
    """Memory that one process has made and others open. told: how, as JSON."""

    memory: Tensor
    told: dict[str, Any]

    @classmethod
    def made(cls, num_bytes: int, device: torch.device) -> _Slots:
        if device.type == "cuda":
            memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            _, *rest = memory.untyped_storage()._share_cuda_()
            return cls(memory, {"cuda": [one.hex() if isinstance(one, bytes) else one for one in rest]})
        descriptor, name = tempfile.mkstemp(prefix="megatron-apo-", dir="/dev/shm")
        try:
            os.posix_fallocate(descriptor, 0, max(1, num_bytes))
            memory = mapped(Path(name))
        finally:
            os.unlink(name)  # others open it by its descriptor, and nothing is left when this process ends
        return cls(memory, {"file": f"/proc/{os.getpid()}/fd/{descriptor}"})

    @classmethod
    def opened(cls, told: dict[str, Any], device: torch.device) -> _Slots:
        if "cuda" in told:
            rest = [bytes.fromhex(one) if isinstance(one, str) else one for one in told["cuda"]]
            storage = torch.UntypedStorage._new_shared_cuda(device.index or 0, *rest)
            return cls(torch.empty(0, dtype=torch.uint8, device=device).set_(storage), told)
        return cls(mapped(Path(told["file"])), told)
