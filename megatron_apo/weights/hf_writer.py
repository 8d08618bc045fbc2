"""Writes a Hugging Face folder: safetensors files of a chosen size, their index, and everything beside the weights.

with whole_folder(out, topology) as folder:
    writer = HFWriter(metadata, max_shard_bytes)
    writer.create(folder)                   # on one rank: files with headers, no tensors yet
    with writer.opened(folder) as write:    # on any number of ranks
        write(name, tensor)                 # each tensor once, in any order
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_apo.weights.safetensors_file import FileLayout, Meta, num_bytes, write_at
from megatron_apo.weights.whole_folder import whole_folder

MAX_SHARD_BYTES = 5 * 10**9  # transformers' own default
INDEX = "model.safetensors.index.json"
_TEMPLATES = "additional_chat_templates"  # transformers' folder for all but the default one
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
PROVENANCE = "conversion.json"  # of one folder only
_WEIGHT_SUFFIXES = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5", ".msgpack",
    ".ot", ".onnx",
)  # fmt: skip


class HFWriter:
    """The weights files of one model, laid out beforehand: tensors in order, files of at most `max_shard_bytes` (or one
    tensor)."""

    def __init__(self, metadata: Sequence[Meta], max_shard_bytes: int = MAX_SHARD_BYTES):
        shards: list[list[Meta]] = [[]]
        size = 0
        for meta in metadata:
            if shards[-1] and size + num_bytes(meta) > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(meta)
            size += num_bytes(meta)
        self.num_bytes = sum(map(num_bytes, metadata))
        self._metas = {meta.name: meta for meta in metadata}
        self._files = {
            _file_name(index, len(shards)): FileLayout.of(s, {"format": "pt"}) for index, s in enumerate(shards)
        }
        self._file_of = {name: file for file, layout in self._files.items() for name in layout.offsets}

    def create(self, folder: Path) -> None:
        """Make the files, and their index where there are several. On one rank."""
        for name, layout in self._files.items():
            layout.create(folder / name)
        if len(self._files) > 1:
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": self._file_of}
            (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")

    @contextmanager
    def opened(self, folder: Path) -> Iterator[Callable[[str, Tensor], None]]:
        """A function that writes one tensor to its place; at the end of the block this rank's are on disk."""
        descriptors: dict[str, int] = {}

        def write(name: str, tensor: Tensor) -> None:
            meta, file = self._metas[name], self._file_of[name]
            assert tensor.dtype == meta.dtype and tuple(tensor.shape) == tuple(meta.shape), (name, tensor.shape)
            if file not in descriptors:
                descriptors[file] = os.open(folder / file, os.O_WRONLY)
            write_at(descriptors[file], self._files[file].offsets[name], tensor)

        try:
            yield write
            for descriptor in descriptors.values():
                os.fsync(descriptor)
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)


def write_hf_folder(
    stream: Iterable[tuple[str, Tensor]],
    metadata: Sequence[Meta],
    source: Path,
    out: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a stream of tensors, in the order and with the shapes of `metadata`, beside `source`'s configuration and
    tokenizer. On one rank. `out` appears whole or not at all; never more than one tensor is held."""
    with whole_folder(out) as folder:
        writer = HFWriter(metadata, max_shard_bytes)
        writer.create(folder)
        with writer.opened(folder) as write:
            for (name, tensor), meta in zip(stream, metadata, strict=True):
                assert name == meta.name, (name, meta.name)
                write(name, tensor)
        copy_side_files(source, folder, metadata[0].dtype)


def copy_side_files(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Everything of the Hugging Face folder `source` but its weights; the configuration says `dtype`."""
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHT_SUFFIXES) and path.name not in ("config.json", PROVENANCE):
            shutil.copyfile(path, out / path.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, out / _TEMPLATES)
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)
    config.pop("quantization_config", None)  # quantized weights are written out in full
    config["dtype"] = _DTYPE_NAMES[dtype]
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _file_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
