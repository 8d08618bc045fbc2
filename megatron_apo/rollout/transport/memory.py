"""Memory that processes of one host share.

    memory, offer = offered(num_bytes)      one process; the offer is told to the others
    memory = accepted(offer)                others; None where they cannot share it, on another host say
    offer.close()                           once all have tried

It has no name, so that nothing is left of it whatever end its processes come to.
"""

from __future__ import annotations

import mmap
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_apo.weights.plan import Plan

_TOKEN_BYTES = 16


@dataclass(frozen=True)
class Offer:
    """Where the memory is found, and what it begins with: by that it is told from another host's."""

    pid: int
    descriptor: int
    token: bytes

    def close(self) -> None:
        os.close(self.descriptor)


def offered(num_bytes: int) -> tuple[Tensor, Offer]:
    """Memory of a size (uint8), which is taken here and now, and how others find it. Raises OSError where there is not
    as much."""
    descriptor = os.memfd_create("megatron_apo")
    try:
        os.posix_fallocate(descriptor, 0, max(num_bytes, _TOKEN_BYTES))
        offer = Offer(os.getpid(), descriptor, secrets.token_bytes(_TOKEN_BYTES))
        memory = mapped(_path(offer))
    except OSError:
        os.close(descriptor)
        raise
    memory[:_TOKEN_BYTES] = _token(offer)
    return memory[:num_bytes], offer


def accepted(offer: Offer) -> Tensor | None:
    """The memory of an offer, as long as nobody has written there; None where it is out of reach."""
    try:
        memory = mapped(_path(offer))
    except OSError:
        return None
    return memory if torch.equal(memory[:_TOKEN_BYTES], _token(offer)) else None


def mapped(path: Path) -> Tensor:
    """A file's bytes, shared with everyone who maps it."""
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)


def slot_size(plan: Plan) -> int:
    """Bytes of memory for any bucket: whole pages."""
    return -(-plan.largest_bucket_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _path(offer: Offer) -> Path:
    return Path(f"/proc/{offer.pid}/fd/{offer.descriptor}")


def _token(offer: Offer) -> Tensor:
    return torch.frombuffer(bytearray(offer.token), dtype=torch.uint8)
