"""The safetensors format, as far as writing needs it: where each tensor lies in a file whose tensors are not made yet.

    [8 bytes: header length][header: JSON, padded][data]        (github.com/huggingface/safetensors, README, "Format")

With that known beforehand, tensors are written one by one, by any process, in any order.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch

DTYPE_CODES = {  # safetensors' names
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class Meta(Protocol):
    """Name, dtype and full shape of one tensor (vLLM's ParamMeta, or ours)."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> Sequence[int]: ...


def num_bytes(meta: Meta) -> int:
    """Size of the tensor's elements, bytes."""
    return prod(meta.shape) * meta.dtype.itemsize


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements in memory order, as bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def checksum(tensor: torch.Tensor) -> str:
    """sha256 of the tensor's bytes."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


@dataclass(frozen=True)
class FileLayout:
    """A file before it is written. `offsets`: where each tensor's bytes begin, from the start of the file."""

    header: bytes
    offsets: dict[str, int]
    num_bytes: int

    @classmethod
    def of(cls, tensors: Sequence[Meta], metadata: dict[str, str] | None = None) -> FileLayout:
        """Tensors lie in the given order. Raises ValueError for a dtype that safetensors does not have."""
        header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
        ends, end = {}, 0
        for meta in tensors:
            if meta.dtype not in DTYPE_CODES:
                raise ValueError(f"{meta.name}: {meta.dtype} cannot be written; use one of {list(DTYPE_CODES)}")
            start, end = end, end + num_bytes(meta)
            ends[meta.name] = start
            code = DTYPE_CODES[meta.dtype]
            header[meta.name] = {"dtype": code, "shape": list(meta.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # readers map the file: keep the data aligned
        data = 8 + len(text)
        head = len(text).to_bytes(8, "little") + text
        return cls(head, {name: data + start for name, start in ends.items()}, data + end)

    def create(self, path: Path) -> None:
        """Write the header, and make room for the tensors."""
        with path.open("xb") as file:
            file.write(self.header)
            file.flush()
            os.posix_fallocate(file.fileno(), 0, self.num_bytes)  # a full disk is found now, not at the last tensor


def write_at(descriptor: int, offset: int, tensor: torch.Tensor) -> None:
    """Write a tensor's bytes at `offset` of an open file."""
    data = tensor_bytes(tensor)
    while data:  # one call writes at most 2 GiB
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
