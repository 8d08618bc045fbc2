"""Reads and writes Hugging Face model folders: safetensors only, nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_apo.model.hf_config import ModelConfigError, ModelSpec, read_hf_config
from megatron_apo.weights.families import EMBEDDING, HEAD, model_entries

INDEX = "model.safetensors.index.json"
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


class HFReader:
    """Tensors of a Hugging Face folder by name, memory-mapped. Every problem of the folder is found on construction."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ModelConfigError(f"model path {folder}: not a folder; give a Hugging Face model folder")
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for name in self._weight_files():
            try:
                handle = safe_open(self.folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelConfigError(f"{self.folder / name}: missing or damaged weights file ({error})") from None
            self._files[name] = handle
            for tensor in handle.keys():
                other = self._file_of.setdefault(tensor, name)
                if other != name:
                    raise ModelConfigError(f"model path {folder}: {tensor} is in {other} and in {name}; remove one")

    def _weight_files(self) -> list[str]:
        index = self.folder / INDEX
        if index.is_file():
            return sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not files:
            raise ModelConfigError(f"model path {self.folder}: no .safetensors file there")
        return files

    def names(self) -> list[str]:
        return sorted(self._file_of)

    def dtypes(self) -> set[str]:
        """The dtypes of the tensors, as safetensors spells them: "F32", "BF16", ..."""
        return {self._files[file].get_slice(name).get_dtype() for name, file in self._file_of.items()}

    def get(self, name: str) -> Tensor:
        return self._files[self._file_of[name]].get_tensor(name)

    def check(self, spec: ModelSpec) -> None:
        """Raise `ModelConfigError` listing every missing, extra or wrongly shaped tensor."""
        expected = {}
        for entry in model_entries(spec, pp=1):
            expected.update(zip(entry.hf, entry.rule.hf_shapes(spec), strict=True))
        present = set(self.names())
        problems = [f"missing tensor {name}" for name in sorted(set(expected) - present)]
        for name in sorted(present - set(expected)):
            if spec.tied and name in HEAD.hf:
                if EMBEDDING.hf[0] in present and not torch.equal(self.get(name), self.get(EMBEDDING.hf[0])):
                    problems.append(f"{name} differs from the embedding although the config ties them")
            elif not name.endswith(
                "rotary_emb.inv_freq"
            ):  # a buffer that old checkpoints saved; derived from the config
                problems.append(f"unknown tensor {name}")
        for name in sorted(present & set(expected)):
            shape = tuple(self._files[self._file_of[name]].get_slice(name).get_shape())
            if shape != expected[name]:
                problems.append(f"{name} has shape {shape}, expected {expected[name]}")
        if problems:
            raise ModelConfigError("\n".join(f"{self.folder}: {problem}" for problem in problems))


def model_hash(folder: Path) -> str:
    """sha256 over each tensor's HF name, dtype, shape and bytes, in name order: the identity of a model's weights.

    Tensors that the model does not use (a tied head's copy, rotary frequencies) do not count.
    """
    reader = HFReader(folder)
    used = {name for entry in model_entries(read_hf_config(folder), pp=1) for name in entry.hf}
    digest = hashlib.sha256()
    for name in reader.names():
        if name not in used:
            continue
        tensor = reader.get(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_hf_folder(
    stream: Iterable[tuple[str, Tensor]],
    source: Path,
    out: Path,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write tensors as safetensors beside `source`'s configuration and tokenizer files. On one rank.

    Everything goes to a temporary folder that is renamed at the end: `out` appears whole or not at all.
    """
    out = Path(out)
    check_empty(out)
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        weight_map = _write_shards(stream, temporary, dtype, max_shard_bytes)
        if len(set(weight_map.values())) > 1:
            (temporary / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))
        copy_side_files(Path(source), temporary, dtype)
        if out.exists():
            out.rmdir()
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_shards(stream: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype, limit: int) -> dict[str, str]:
    shards: list[list[str]] = []
    batch: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        save_file(batch, folder / f"{len(shards)}.partial", metadata={"format": "pt"})
        shards.append(list(batch))
        batch.clear()

    for name, tensor in stream:
        tensor = tensor.to("cpu", dtype)
        if batch and size + tensor.nbytes > limit:
            flush()
            size = 0
        batch[name] = tensor
        size += tensor.nbytes
    flush()
    weight_map = {}
    for index, names in enumerate(shards):
        single = len(shards) == 1
        final = "model.safetensors" if single else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / f"{index}.partial", folder / final)
        weight_map.update(dict.fromkeys(names, final))
    return weight_map


def check_empty(out: Path, key: str = "output folder") -> None:
    """Raise a ValueError if `out`, a folder to be written, is there and not empty, or is a file. `key` names it."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{key}: {out} is not empty; give a new folder")


def copy_side_files(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Everything of the Hugging Face folder `source` but its weights; the configuration says `dtype`."""
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHT_SUFFIXES) and path.name != "config.json":
            shutil.copyfile(path, out / path.name)
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = _DTYPE_NAMES[dtype]
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
