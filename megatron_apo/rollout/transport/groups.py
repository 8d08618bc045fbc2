"""A process group of one sender and its receivers, in different jobs, beside whatever groups they are in.

    with meeting_point(address) as store: ...                       the sender's
    group = Group(store, name, rank, size, ...)                     everyone's; rank 0 is the sender
    group.post(buffer); ...; group.wait()                           broadcasts in order

The one file that knows what a backend does in time: how a group is made, how long it waits and how it is ended.

gloo    Seen to run. A group has no end but that of its object: as long as one is held, its connections are open and the
        others wait for it until their time is up. A time-out counts from when a broadcast is posted.
nccl    Not run yet. `wait` orders the streams and waits for nothing on the host; ends by `abort`.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_apo.rollout.transport.base import TransferError

_PROOF_BYTES = hashlib.sha256().digest_size


class MeetingPoint:
    """A store of this process, where one group's members find each other's addresses. It listens on `address` alone.

    Whoever reaches its port can read it, write it and list it: what is in it is no secret.
    """

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


class Group:
    """One member of a group. `rank` 0 sends. Raises TransferError, from all methods, where the group is broken."""

    def __init__(
        self,
        store: dist.Store,
        *,
        name: str,
        key: bytes,
        rank: int,
        size: int,
        device: torch.device,
        address: str,
        timeout_s: float,
        names: Callable[[int], str] = "member {}".format,
    ):
        """name: of the group, not used before in this store. key: known to its members alone, who prove that they have
        it. address: this host's, on the way to the others. timeout_s: how long the others may take to come, and a
        broadcast to end, seconds."""
        self._device = device
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._names = names
        self._posted: deque[dist.Work] = deque()
        self._group: Any = None
        own_store = dist.PrefixStore(name, store)
        _meet(own_store, rank, size, timeout_s, names)
        try:
            self._group = _MAKE[device.type](dist.PrefixStore("group", own_store), rank, size, address, self._timeout)
            self._prove(name, key, rank, size)
        except RuntimeError as error:
            why = _reason(error)
        else:
            return
        self.close()
        raise TransferError(f"the group of {size} could not be made: {why}")

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
    def num_posted(self) -> int:
        return len(self._posted)

    def close(self) -> None:
        """The others see at once that this member is gone."""
        self._posted.clear()
        if self._group is not None and self._device.type == "cuda":
            self._group.abort()
        self._group = None

    def _break(self, why: str) -> None:
        self.close()
        raise TransferError(f"the transfer broke off: {why}")

    def _prove(self, name: str, key: bytes, rank: int, size: int) -> None:
        """Each member shows that it has the key, before anything of worth is sent."""
        own = torch.frombuffer(bytearray(_proof(key, name, rank)), dtype=torch.uint8).to(self._device)
        found = [torch.empty(_PROOF_BYTES, dtype=torch.uint8, device=self._device) for _ in range(size)]
        self._group.allgather([found], [own]).wait(self._timeout)
        for other, value in enumerate(found):
            if not hmac.compare_digest(bytes(value.cpu().numpy()), _proof(key, name, other)):
                raise RuntimeError(f"{self._names(other)} does not know the key: a stranger is in its place")


def _proof(key: bytes, name: str, rank: int) -> bytes:
    return hmac.new(key, f"{name}/{rank}".encode(), hashlib.sha256).digest()


def _meet(store: dist.Store, rank: int, size: int, timeout_s: float, names: Callable[[int], str]) -> None:
    """Wait until every member is here. Raises TransferError naming those who are not."""
    keys = [f"here/{other}" for other in range(size)]
    end = time.monotonic() + timeout_s
    try:
        store.set(keys[rank], "1")
        while not store.check(keys):
            if time.monotonic() > end:
                missing = [other for other, key in enumerate(keys) if not store.check([key])]
                listed = ", ".join(names(other) for other in missing)
                raise TransferError(f"{listed} did not come within {timeout_s:g} s", silent=missing)
            time.sleep(2e-3)
    except TransferError:
        raise
    except RuntimeError as error:
        raise TransferError(f"the trainer's ranks are gone: {_reason(error)}") from None


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


def _reason(error: BaseException) -> str:
    """A backend's error in a line, without where in its source it was raised."""
    line = (str(error).splitlines() or [type(error).__name__])[0].partition(". This is typically")[0]
    return line.rpartition("] ")[2] if line.startswith("[") else line
