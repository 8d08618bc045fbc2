"""The `shm` transport's payload: one safetensors file written from a stream, and what each worker read of it.

    FOLDER/weights.safetensors  written by the trainer's rank 0, tensor by tensor: never the whole model in memory
    FOLDER/loaded.RANK.json     {name: checksum} of the tensors as worker RANK gave them to its model, before packing

Knows neither vLLM nor Megatron: both sides of the transport import it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

DTYPE_CODES = {  # safetensors' names
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


NAMED = 8  # names in one error


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


class Meta(Protocol):
    """Name, wire dtype and full HF shape of one tensor (vLLM's ParamMeta, or ours)."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> Sequence[int]: ...


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements in memory order, as bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def checksum(tensor: torch.Tensor) -> str:
    """sha256 of the tensor's bytes."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def weights_path(folder: Path) -> Path:
    return folder / "weights.safetensors"


class PayloadWriter:
    """Writes tensors in the order of `metadata` and refuses anything that is not in it.

    Raises ValueError naming a tensor that is doubled, missing, extra, out of order, or of another dtype or shape.
    """

    def __init__(self, folder: Path, metadata: Sequence[Meta]):
        doubled = [name for name, count in Counter(meta.name for meta in metadata).items() if count > 1]
        if doubled:
            raise ValueError(f"the source declares more than once: {', '.join(doubled)}")
        self.metadata = metadata
        self.checksums: dict[str, str] = {}
        self.num_bytes = 0
        header, offset = {}, 0
        for meta in metadata:
            if meta.dtype not in DTYPE_CODES:
                raise ValueError(f"{meta.name}: {meta.dtype} cannot be sent; use one of {list(DTYPE_CODES)}")
            end = offset + torch.Size(meta.shape).numel() * meta.dtype.itemsize
            header[meta.name] = {
                "dtype": DTYPE_CODES[meta.dtype], "shape": list(meta.shape), "data_offsets": [offset, end],
            }  # fmt: skip
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # readers map the file: keep the data aligned
        self.path = weights_path(folder)
        self.file = self.path.with_suffix(".writing").open("xb")
        self.file.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor. `tensor` is the full HF tensor, on any device."""
        position = len(self.checksums)
        meta = self.metadata[position] if position < len(self.metadata) else None
        if meta is None or name != meta.name:
            expected = f"{meta.name} is next" if meta else "nothing is left"
            raise ValueError(f"{name}: the source gave it where by its metadata {expected}")
        if tensor.dtype != meta.dtype or list(tensor.shape) != list(meta.shape):
            declared = f"{meta.dtype} {list(meta.shape)}"
            raise ValueError(f"{name}: the source gave {tensor.dtype} {list(tensor.shape)} and declared {declared}")
        data = tensor_bytes(tensor)
        self.file.write(data)
        self.checksums[name] = hashlib.sha256(data).hexdigest()
        self.num_bytes += len(data)

    def close(self) -> None:
        """Publish the file. Raises ValueError naming the tensors that never came."""
        missing = [meta.name for meta in self.metadata[len(self.checksums) :]]
        if missing:
            raise ValueError(f"the source left out {', '.join(missing)}")
        self.file.close()
        os.replace(self.file.name, self.path)

    def abandon(self) -> None:
        """Let go of the file, finished or not."""
        self.file.close()


def write_loaded(folder: Path, rank: int, checksums: dict[str, str]) -> None:
    """A worker's account of what it loaded."""
    path = folder / f"loaded.{rank}.json"
    path.with_suffix(".writing").write_text(json.dumps(checksums))
    os.replace(path.with_suffix(".writing"), path)


def read_loaded(folder: Path) -> dict[int, dict[str, str]]:
    """{worker rank: {name: checksum}} of every worker that gave its account."""
    return {int(path.name.split(".")[1]): json.loads(path.read_text()) for path in sorted(folder.glob("loaded.*.json"))}
