"""A process group of one sender and its receivers, in different jobs, beside whatever groups they are in.

    point = MeetingPoint(address)                       the sender's: a store that listens there
    meeting = Meeting(point.store, name, key)           everyone's, the others' over `find(address, port)`
    meeting.say("here", rank)
    group = Group(meeting, rank=rank, size=size, ...)   rank 0 is the sender
    group.post(buffer); ...; group.wait()               broadcasts in order

Whoever reaches a store's port can read, list and write it. So no secret is in it, and what members say there is sealed
with a key that they alone have: an address that a stranger writes is not used. Whoever reads the sender's address there
can connect to it in a member's place. So the sender's first message is random, and it sends no other before all members
have said, sealed, that they have it. Strangers can break a transfer off. What goes over the group is not encrypted.

The one file that knows what a backend does in time: how a group is made, how long it waits and how it is ended.

gloo    Seen to run. A group has no end but that of its object: as long as one is held, its connections are open and the
        others wait for it until their time is up. A time-out counts from when a broadcast is posted. A connection to a
        member that is gone before it is made is waited for five times as long (gloo's tcp/pair.h, `waitUntil`).
nccl    Not run yet. `wait` orders the streams and waits for nothing on the host; ends by `abort`.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_apo.rollout.transport.base import TransferError

_SEAL_BYTES = hashlib.sha256().digest_size
_LOOK_EVERY_S = 2e-3
_NONCE_BYTES = 32


class MeetingPoint:
    """A store of this process. It listens on `address` alone."""

    def __init__(self, address: str):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, 0))
            listener.listen()
            self.address, self.port = address, listener.getsockname()[1]
            descriptor = listener.detach()
        self.store = dist.TCPStore(address, self.port, None, True, wait_for_workers=False, master_listen_fd=descriptor)


def find(address: str, port: int, timeout_s: float) -> dist.Store:
    """The store of a `MeetingPoint` elsewhere. Raises TransferError where none answers."""
    try:
        socket.create_connection((address, port), timeout=timeout_s).close()  # quieter than torch
        return dist.TCPStore(address, port, None, False, datetime.timedelta(seconds=timeout_s), wait_for_workers=False)
    except (OSError, RuntimeError) as error:
        raise TransferError(f"{address}:{port}, where the trainer's ranks are met, does not answer: {error}") from None


class Meeting:
    """What the members of a group tell each other through the sender's store. `name` was not used there before."""

    def __init__(self, store: dist.Store, name: str, key: bytes):
        self._key = key
        self._store = dist.PrefixStore(name, store)

    def sealed(self) -> dist.Store:
        return _SealedStore(dist.PrefixStore("group", self._store), self._key)

    def say(self, what: str, member: int) -> None:
        try:
            self._store.set(f"{what}/{member}", "1")
        except RuntimeError as error:
            raise TransferError(f"the trainer's ranks are gone: {_reason(error)}") from None

    def break_off(self) -> None:
        """Nobody need wait any more, as far as that can be said."""
        with suppress(RuntimeError):
            self._store.set("broken", "1")

    def wait_for(self, what: str, members: Sequence[int], within_s: float, names: Callable[[int], str]) -> None:
        """Until these have said it. Raises TransferError naming those who have not in time, and at once where somebody
        has broken off."""
        keys = [f"{what}/{member}" for member in members]
        end = time.monotonic() + within_s
        try:
            while not self._store.check(keys):
                if self._store.check(["broken"]):
                    raise TransferError("another part of the transfer broke off")
                if time.monotonic() > end:
                    missing = [one for one, key in zip(members, keys, strict=True) if not self._store.check([key])]
                    listed = ", ".join(names(one) for one in missing)
                    raise TransferError(f"{listed} did not come within {within_s:g} s", silent=missing)
                time.sleep(_LOOK_EVERY_S)
        except TransferError:
            raise
        except RuntimeError as error:
            raise TransferError(f"the trainer's ranks are gone: {_reason(error)}") from None


class _SealedStore(dist.Store):
    """A store whose values carry a seal of the key, their own name and themselves. Reading one without it raises."""

    def __init__(self, store: dist.Store, key: bytes):
        super().__init__()
        self._store, self._key = store, key

    def set(self, name: str, value: str | bytes) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._store.set(name, self._seal(name, data) + data)

    def get(self, name: str) -> bytes:
        value = self._store.get(name)
        seal, data = value[:_SEAL_BYTES], value[_SEAL_BYTES:]
        if not hmac.compare_digest(seal, self._seal(name, data)):
            raise RuntimeError(f"{name} was written by somebody who does not know the key, where the ranks are met")
        return data

    def wait(self, names: list[str], timeout: datetime.timedelta | None = None) -> None:
        self._store.wait(names, timeout) if timeout else self._store.wait(names)

    def check(self, names: list[str]) -> bool:
        return self._store.check(names)

    def add(self, name: str, amount: int) -> int:
        return self._store.add(name, amount)

    def has_extended_api(self) -> bool:
        return False

    def _seal(self, name: str, data: bytes) -> bytes:
        return hmac.new(self._key, f"{name}\0".encode() + data, hashlib.sha256).digest()


class Group:
    """One member of a group. `rank` 0 sends. Raises TransferError, from all methods, where the group is broken."""

    def __init__(
        self,
        meeting: Meeting,
        *,
        rank: int,
        size: int,
        device: torch.device,
        address: str,
        timeout_s: float,
        names: Callable[[int], str] = "member {}".format,
    ):
        """Waits until all have said "here" at the meeting. address: this host's, on the way to the others. timeout_s:
        how long the others may take to come, and a broadcast to end, seconds."""
        self.meeting = meeting
        self._device = device
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._posted: deque[dist.Work] = deque()
        self._group: Any = None
        meeting.wait_for("here", range(size), timeout_s, names)
        try:
            self._group = _MAKE[device.type](meeting.sealed(), rank, size, address, self._timeout)
        except RuntimeError as error:
            why = _reason(error)
        else:
            self._prove(rank, range(1, size), names)
            return
        raise TransferError(f"the group of {size} could not be made: {why}")

    def _prove(self, rank: int, others: Sequence[int], names: Callable[[int], str]) -> None:
        """That who is in the group, and who sends to it, have the key: by what the sender says in both ways."""
        sealed, limit_s = self.meeting.sealed(), self._timeout.total_seconds()
        nonce = torch.zeros(_NONCE_BYTES, dtype=torch.uint8) if rank else _nonce()
        message = nonce.to(self._device)
        try:
            if rank == 0:
                sealed.set("nonce", _hashed(nonce))
            self.post(message)
            self.wait()
            if rank:
                sealed.wait(["nonce"], self._timeout)
                if sealed.get("nonce") != _hashed(message.cpu()):
                    raise TransferError("who sends is not the trainer's rank that is met")
                sealed.set(f"nonce/{rank}", _hashed(message.cpu()))
                return
            self.meeting.wait_for("group/nonce", others, limit_s, names)
            strangers = [one for one in others if sealed.get(f"nonce/{one}") != _hashed(nonce)]
            if strangers:
                raise TransferError(f"{', '.join(map(names, strangers))} has not heard what was sent", strangers)
        except (TransferError, RuntimeError) as error:
            why, silent = _reason(error), getattr(error, "silent", ())
        else:
            return
        self.close()
        raise TransferError(why, silent)

    def post(self, buffer: Tensor) -> None:
        """Begin to send, or to receive, a buffer; it is not to be touched until its `wait`."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            self._posted.append(self._group.broadcast([buffer], options))
        except RuntimeError as error:
            why = _reason(error)
        else:
            return
        self._break(why)

    def wait(self) -> None:
        """For the first of what is posted."""
        work = self._posted.popleft()
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            why = _reason(error)
        else:
            return
        del work
        self._break(why)

    @property
    def first_has_ended(self) -> bool:
        """Whether `wait` would not wait."""
        return bool(self._posted) and self._posted[0].is_completed()

    @property
    def num_posted(self) -> int:
        return len(self._posted)

    def close(self) -> None:
        """The others see at once that this member is gone."""
        self._posted.clear()
        if self._group is not None and self._device.type == "cuda":
            self._group.abort()
        self._group = None

    def _break(self, why: str) -> None:
        self.close()  # and what was caught is let go by now: its traceback holds the group
        raise TransferError(f"the transfer broke off: {why}")


def _gloo(store: dist.Store, rank: int, size: int, address: str, timeout: datetime.timedelta) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: dist.Store, rank: int, size: int, address: str, timeout: datetime.timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)


_MAKE = {"cpu": _gloo, "cuda": _nccl}


def _nonce() -> Tensor:
    return torch.frombuffer(bytearray(secrets.token_bytes(_NONCE_BYTES)), dtype=torch.uint8)


def _hashed(nonce: Tensor) -> bytes:
    return hashlib.sha256(bytes(nonce.tolist())).digest()


def _reason(error: BaseException) -> str:
    """A backend's error in a line, without where in its source it was raised."""
    line = (str(error).splitlines() or [type(error).__name__])[0].partition(". This is typically")[0]
    return line.rpartition("] ")[2] if line.startswith("[") else line
