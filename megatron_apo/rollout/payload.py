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

import torch

from megatron_apo.weights.safetensors_file import FileLayout, Meta, tensor_bytes


def weights_path(folder: Path) -> Path:
    return folder / "weights.safetensors"


class PayloadWriter:
    """Writes tensors in the order of `metadata` and refuses anything that is not in it.

    The bytes are written once, whoever reads them: `link` gives another folder of the same file system the file too,
    which lasts as long as one of its names. Raises ValueError naming a tensor that is doubled, missing, extra, out of
    order, or of another dtype or shape.
    """

    def __init__(self, folder: Path, metadata: Sequence[Meta]):
        doubled = [name for name, count in Counter(meta.name for meta in metadata).items() if count > 1]
        if doubled:
            raise ValueError(f"the source declares more than once: {', '.join(doubled)}")
        self.metadata = metadata
        self.checksums: dict[str, str] = {}
        self.num_bytes = 0
        header = FileLayout.of(metadata).header
        self.path = _unfinished(folder)
        self.file = self.path.open("xb")
        self.file.write(header)

    def link(self, folder: Path) -> None:
        """What is written becomes readable in `folder` as well."""
        os.link(self.path, _unfinished(folder))

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
        """All is written. Raises ValueError naming the tensors that never came."""
        missing = [meta.name for meta in self.metadata[len(self.checksums) :]]
        if missing:
            raise ValueError(f"the source left out {', '.join(missing)}")
        self.file.close()

    def abandon(self) -> None:
        """Let go of the file, finished or not."""
        self.file.close()


def publish(folder: Path) -> None:
    """Give the finished file its name in a folder."""
    os.replace(_unfinished(folder), weights_path(folder))


def _unfinished(folder: Path) -> Path:
    return weights_path(folder).with_suffix(".writing")


def write_loaded(folder: Path, rank: int, checksums: dict[str, str]) -> None:
    """A worker's account of what it loaded."""
    path = folder / f"loaded.{rank}.json"
    path.with_suffix(".writing").write_text(json.dumps(checksums))
    os.replace(path.with_suffix(".writing"), path)


def read_loaded(folder: Path) -> dict[int, dict[str, str]]:
    """{worker rank: {name: checksum}} of every worker that gave its account."""
    return {int(path.name.split(".")[1]): json.loads(path.read_text()) for path in sorted(folder.glob("loaded.*.json"))}
