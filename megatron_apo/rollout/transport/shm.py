"""`shm`: buckets in memory that trainer and workers of one host share.

    ENGINE/buckets               slots for buckets on their way: one file, with a name in every engine's folder
    ENGINE/update-X/published    grows by a byte with every bucket that is whole
    ENGINE/update-X/read.RANK    grows by a byte with every bucket that worker RANK has loaded
    ENGINE/update-X/given-up     the trainer sends no more
    ENGINE/update-X/failed       a worker reads no more; the engine's others do not wait for it

The slots are made once and stay, so that an update touches no new page; they go with the last engine's folder. A bucket
goes into the slot of the one that was read before it. A growing file is a counter that one side alone writes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_apo.rollout.transport.base import Ranks, Receiver, Source, TransferError, Update, bucket_digests
from megatron_apo.rollout.transport.memory import mapped, slot_size
from megatron_apo.weights.plan import Bucket, Plan

NUM_SLOTS = 3  # one that is read, one that is whole, one that is written


class ShmSender:
    """The trainer's side, on every rank of the driver's host. See `Sender`."""

    def __init__(self, plan: Plan, ranks: Ranks | None = None, timeout_s: float = 120.0):
        """timeout_s: how long an engine may take to load a bucket."""
        self._ranks = ranks or Ranks()
        self._timeout_s = timeout_s
        self._slot_bytes = slot_size(plan)
        self._slots: Tensor | None = None
        self._inode = 0
        self._names: set[Path] = set()  # of the slots
        self._folders: dict[Receiver, Path] = {}  # of the present update
        self._reading: set[Receiver] = set()
        self._is_shared = False

    @property
    def num_bytes(self) -> int:
        """Of shared memory that it takes."""
        return NUM_SLOTS * self._slot_bytes

    def open(self, receivers: Sequence[Receiver]) -> None:
        names = [receiver.payload_dir / "buckets" for receiver in receivers]
        self._names = {name for name in self._names if _inode(name) == self._inode}
        there = [name for name in (*names, *self._names) if _inode(name) == self._inode]
        if not there:
            there = [self._make(names[0])]
        for receiver, name in zip(receivers, names, strict=True):
            if _inode(name) != self._inode:
                name.unlink(missing_ok=True)
                os.link(there[0], name)
            self._names.add(name)
            folder = Path(tempfile.mkdtemp(prefix="update-", dir=receiver.payload_dir))
            (folder / "published").touch()
            self._folders[receiver] = folder
            self._reading.add(receiver)

    def meet(self) -> None:
        """Find out whether all ranks can write where the workers read: on one host, and with weights on no GPU."""
        is_driver = self._ranks.rank == 0
        place = self._ranks.broadcast(self._place() if is_driver else None)
        able = self._ranks.device.type == "cpu" and (is_driver or self._join(*place))
        answers = self._ranks.gather(able)
        self._is_shared = dist.is_initialized() and all(answers)

    def _place(self) -> tuple[str, int]:
        """Where the slots are, and what tells them from others there."""
        folder = next(iter(self._folders.values()))
        return str(folder.parent / "buckets"), self._inode

    def _join(self, path: str, inode: int) -> bool:
        """On a rank that is not the driver: share the slots. Whether they can be."""
        if self._inode != inode or self._slots is None:
            try:
                if _inode(Path(path)) != inode:
                    return False
                self._slots, self._inode = mapped(Path(path)), inode
            except OSError:
                return False
        return True

    def update_info(self, receiver: Receiver) -> dict[str, Any]:
        return {
            "folder": str(self._folders[receiver]),
            "slot_bytes": self._slot_bytes,
            "timeout_s": 2 * self._timeout_s,
        }

    def send(self, source: Source, update: Update | None) -> dict[str, str]:
        if update is None:
            with closing(source.buckets("driver", self.buffer_of, shared=self._is_shared)) as theirs:
                for _ in theirs:
                    pass
            return {}
        slot = partial(self._free_slot, update)
        if self._is_shared:
            buckets = source.buckets("driver", slot, self.has_room, shared=True)
        else:  # what is on a GPU is put together and digested there
            buckets = source.buckets("driver", slot if self._ranks.device.type == "cpu" else None)
        digests: dict[str, str] = {}
        with closing(buckets), update.watch.phase("gather"):
            for bucket, buffer in buckets:
                with update.watch.phase("digest"):
                    digests |= bucket_digests(bucket, buffer, self._ranks.digest_kind)
                if self.buffer_of(bucket).data_ptr() != buffer.data_ptr():
                    slot(bucket).copy_(buffer)
                self.publish(bucket)
        return digests

    def _free_slot(self, update: Update, bucket: Bucket) -> Tensor:
        """Where a bucket is put together, once all have read what was there."""
        with update.watch.phase("wait"):
            end = time.monotonic() + self._timeout_s
            while not self.has_room(bucket):
                time.sleep(2e-4)
                if time.monotonic() > end:
                    silent = [receiver for receiver in list(self._reading) if not self._has_read(receiver, bucket)]
                    for receiver in silent:
                        self.drop(receiver)
                    update.silent(silent, f"it has read no bucket of weights for {self._timeout_s:g} s")
        update.require_readers(bucket)
        return self.buffer_of(bucket)

    def buffer_of(self, bucket: Bucket) -> Tensor:
        """The bucket's slot."""
        assert self._slots is not None
        return slot_of(bucket, self._slots, self._slot_bytes)

    def has_room(self, bucket: Bucket) -> bool:
        """Whether all have read what was in the bucket's slot before."""
        for receiver in list(self._reading):
            if (self._folders[receiver] / "failed").exists():
                self.drop(receiver)
        return all(self._has_read(receiver, bucket) for receiver in list(self._reading))

    def _has_read(self, receiver: Receiver, bucket: Bucket) -> bool:
        """What was in the bucket's slot before."""
        folder = self._folders[receiver]
        return all(count(folder / f"read.{rank}") > bucket.index - NUM_SLOTS for rank in range(receiver.num_workers))

    def publish(self, bucket: Bucket) -> None:
        """The bucket is whole: the workers may read it."""
        for receiver in list(self._reading):
            try:
                grow(self._folders[receiver] / "published")
            except OSError:  # the folder goes with the engine
                self.drop(receiver)

    def drop(self, receiver: Receiver) -> None:
        self._reading.discard(receiver)

    def fail(self, receiver: Receiver) -> None:
        """It is left behind alone (`drop`)."""

    def give_up(self) -> None:
        for folder in self._folders.values():
            with suppress(OSError):  # it goes with the engine
                (folder / "given-up").touch()

    def start_anew(self) -> None:
        pass

    def close(self) -> None:
        self.give_up()
        for folder in self._folders.values():
            shutil.rmtree(folder, ignore_errors=True)
        self._folders.clear()
        self._reading.clear()

    def _make(self, name: Path) -> Path:
        """Make the slots, whose memory is taken here and now."""
        self._slots = None  # what had these names before goes when nobody has it
        name.unlink(missing_ok=True)
        descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            if self.num_bytes:
                os.posix_fallocate(descriptor, 0, self.num_bytes)
        except OSError as error:
            name.unlink()
            raise ValueError(no_room(name.parent, self.num_bytes, shutil.disk_usage(name.parent).free)) from error
        finally:
            os.close(descriptor)
        self._slots, self._inode = mapped(name), _inode(name)
        return name


class ShmReader:
    """A worker's side. See `Reader`. `rank`: the worker's within its engine."""

    def __init__(self, buckets: Sequence[Bucket], rank: int, device: torch.device):
        self._buckets = buckets
        self._rank = rank
        self._slots: Tensor | None = None
        self._inode = 0

    def own(self, where: dict[str, Any]) -> dict[str, Any]:
        """What of it is for this worker."""
        return where

    def memory(self, where: dict[str, Any]) -> Tensor:
        """The slots."""
        path = Path(where["folder"]).parent / "buckets"
        if self._slots is None or _inode(path) != self._inode:
            self._slots, self._inode = mapped(path), _inode(path)
        return self._slots

    def has_read(self) -> None:
        """Until what was read of a bucket is no longer in its slot alone."""

    def buckets(self, where: dict[str, Any]) -> Generator[tuple[Bucket, Tensor], None, None]:
        where = self.own(where)
        folder, slot_bytes, slots = Path(where["folder"]), where["slot_bytes"], self.memory(where)
        try:
            for bucket in self._buckets:
                self._wait_for(bucket, folder, where["timeout_s"])
                yield bucket, slot_of(bucket, slots, slot_bytes)
                self.has_read()
                grow(folder / f"read.{self._rank}")
        except FileNotFoundError:
            raise TransferError("the trainer gave up") from None

    def give_up(self, where: dict[str, Any]) -> None:
        with suppress(OSError):
            (Path(self.own(where)["folder"]) / "failed").touch()

    def _wait_for(self, bucket: Bucket, folder: Path, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s

        def is_over() -> bool:
            return (
                count(folder / "published") > bucket.index
                or (folder / "given-up").exists()
                or (folder / "failed").exists()
                or not folder.is_dir()
                or time.monotonic() > end
            )

        _wait(is_over)
        if count(folder / "published") <= bucket.index:
            why = "the trainer fell silent" if time.monotonic() > end else "the trainer gave up"
            why = "another worker failed" if (folder / "failed").exists() else why
            raise TransferError(f"{why} before {bucket.tensors[0].name} was sent")


def slot_of(bucket: Bucket, slots: Tensor, slot_bytes: int) -> Tensor:
    """The bucket's bytes in the slots, of which `slots` are all."""
    start = bucket.index % NUM_SLOTS * slot_bytes
    return slots[start : start + bucket.num_bytes]


def no_room(folder: Path, num_bytes: int, free_bytes: int) -> str:
    """Why an update cannot be, as a user reads it."""
    return (
        f"sync.dir: {NUM_SLOTS} buckets of weights take {num_bytes / 2**20:.0f} MiB, and {folder} has "
        f"{free_bytes / 2**20:.0f} MiB left; give a folder with more room, or use a smaller sync.bucket_mib (the "
        "largest tensor is a bucket in any case)"
    )


def _wait(is_over: Callable[[], bool]) -> None:
    pause_s = 50e-6
    while not is_over():
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 1e-3)


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return -1


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b".")


def count(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
