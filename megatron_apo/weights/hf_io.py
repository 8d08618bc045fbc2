"""Reads Hugging Face model folders: safetensors, or PyTorch's .bin by its weights-only loader. Nothing is unpickled.

reader = HFReader(folder)       every file opened and mapped, every problem of them said at once
reader.check(spec)              the tensors are exactly those of the model
reader.get(name)                one tensor; FP8 blocks come dequantized
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_apo.model.hf_config import ModelConfigError, ModelSpec, read_hf_config
from megatron_apo.runtime.files import write_whole
from megatron_apo.weights.families import EMBEDDING, HEAD, hf_tensors
from megatron_apo.weights.safetensors_file import DTYPE_CODES, checksum

_SAFETENSORS, _PICKLED = "model.safetensors", "pytorch_model.bin"
_TORCH_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FP8_BLOCK = 128
_SCALE = "_scale_inv"  # of DeepSeek's block-scaled FP8: weight = weight_fp8 * weight_scale_inv, by blocks


class _WeightsFile(Protocol):
    """One open file of tensors."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype | str: ...
    def get(self, name: str) -> Tensor: ...


class _SafetensorsFile:
    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt")

    def names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | str:
        code = self._file.get_slice(name).get_dtype()
        return _TORCH_DTYPES.get(code, code)

    def get(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


class _PickledFile:
    def __init__(self, path: Path):
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            tensors = torch.load(path, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6
        if not isinstance(tensors, dict):
            raise RuntimeError(f"holds a {type(tensors).__name__}, not tensors by name")
        self._tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype | str:
        return self._tensors[name].dtype

    def get(self, name: str) -> Tensor:
        return self._tensors[name].detach()


class HFReader:
    """The tensors of a Hugging Face folder. Raises `ModelConfigError` on construction, with one line for each file that
    is missing, damaged or contradicted by the index."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ModelConfigError(f"model path {folder}: not a folder; give a Hugging Face model folder")
        self._file_of: dict[str, _WeightsFile] = {}
        places: dict[str, str] = {}
        problems = []
        files, index = self._weight_files()
        for name in files:
            try:
                file = _open(self.folder / name)
            except (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                problems.append(f"{self.folder / name}: missing or damaged weights file ({reason[:200]})")
                continue
            for tensor in file.names():
                other = places.setdefault(tensor, name)
                if other != name:
                    problems.append(f"model path {folder}: {tensor} is in {other} and in {name}; remove one")
                self._file_of[tensor] = file
        if not problems:
            problems = [
                f"{self.folder / name}: {tensor} is not there, though the index says so"
                for tensor, name in sorted(index.items())
                if places.get(tensor) != name
            ]
        if problems:
            raise ModelConfigError("\n".join(problems))

    def names(self) -> list[str]:
        """The model's tensors; scales of FP8 blocks belong to theirs."""
        return sorted(name for name in self._file_of if not self._is_scale(name))

    def dtypes(self, spec: ModelSpec) -> set[torch.dtype | str]:
        """The dtypes that `get` gives of the model's tensors; a name where torch has none."""
        return {self.dtype(name) for name in hf_tensors(spec).keys() & self._file_of.keys()}

    def dtype(self, name: str) -> torch.dtype | str:
        return torch.bfloat16 if name + _SCALE in self._file_of else self._file_of[name].dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file_of[name].shape(name)

    def get(self, name: str) -> Tensor:
        """One tensor, mapped from its file, or bf16 out of FP8 blocks."""
        tensor = self._file_of[name].get(name)
        scale = self._file_of.get(name + _SCALE)
        return tensor if scale is None else dequantize(tensor, scale.get(name + _SCALE))

    def check(self, spec: ModelSpec) -> None:
        """Raise `ModelConfigError` listing every missing, extra or wrongly shaped tensor."""
        expected = hf_tensors(spec)
        present = set(self.names())
        problems = [f"missing tensor {name}" for name in sorted(set(expected) - present)]
        for name in sorted(present - set(expected)):
            if spec.tied and name in HEAD.hf:
                if EMBEDDING.hf[0] in present and not torch.equal(self.get(name), self.get(EMBEDDING.hf[0])):
                    problems.append(f"{name} differs from the embedding although the config ties them")
            elif not name.endswith("rotary_emb.inv_freq"):  # old checkpoints saved it; derived from the config
                problems.append(f"unknown tensor {name}")
        for name in sorted(present & set(expected)):
            if self.shape(name) != expected[name]:
                problems.append(f"{name} has shape {self.shape(name)}, expected {expected[name]}")
            problems += self._scale_problems(name)
        if problems:
            raise ModelConfigError("\n".join(f"{self.folder}: {problem}" for problem in problems))

    def _weight_files(self) -> tuple[list[str], dict[str, str]]:
        """(file names, {tensor: file name} of the index if there is one), chosen as transformers does: whatever else is
        in the folder (consolidated.safetensors) does not count."""
        for single in (_SAFETENSORS, _PICKLED):
            if (self.folder / single).is_file():
                return [single], {}
            index = self.folder / f"{single}.index.json"
            if index.is_file():
                try:
                    weight_map = {
                        str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()
                    }
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ModelConfigError(f"{index}: not an index of weights files ({error!r})") from None
                return sorted(set(weight_map.values())), weight_map
        raise ModelConfigError(
            f"model path {self.folder}: no {_SAFETENSORS} or {_PICKLED} there, and no index of several such files"
        )

    def _is_scale(self, name: str) -> bool:
        return name.endswith(_SCALE) and name.removesuffix(_SCALE) in self._file_of

    def _scale_problems(self, name: str) -> list[str]:
        has_scale, is_fp8 = name + _SCALE in self._file_of, self._file_of[name].dtype(name) in _FP8
        if not has_scale:
            return [f"{name} is FP8 without {name + _SCALE}"] if is_fp8 else []
        if not is_fp8:
            return [f"{name} has {name + _SCALE}, but is {self._file_of[name].dtype(name)}, not FP8"]
        blocks = tuple(-(-size // _FP8_BLOCK) for size in self.shape(name))
        found = self._file_of[name + _SCALE].shape(name + _SCALE)
        return [] if found == blocks else [f"{name + _SCALE} has shape {found}, expected {blocks}"]


def dequantize(weight_RC: Tensor, scale_BD: Tensor) -> Tensor:
    """bf16 out of FP8 with one scale for each block of 128 x 128: weight * scale, multiplied in fp32.

    (DeepSeek-V3, inference/kernel.py, `weight_dequant`.)
    """
    rows, columns = weight_RC.shape
    scale_RC = scale_BD.float().repeat_interleave(_FP8_BLOCK, 0)[:rows].repeat_interleave(_FP8_BLOCK, 1)[:, :columns]
    return (weight_RC.float() * scale_RC).bfloat16()


def model_hash(folder: Path) -> str:
    """The identity of a model's weights: of each tensor's HF name, dtype, shape and bytes, however they are stored.

    Tensors that the model does not use (a tied head's copy, rotary frequencies) do not count.
    """
    reader = HFReader(folder)
    used = hf_tensors(read_hf_config(folder))
    with ThreadPoolExecutor() as threads:  # hashing lets go of the interpreter's lock
        names = [name for name in reader.names() if name in used]
        identities = dict(zip(names, threads.map(lambda name: identity(reader.get(name)), names), strict=True))
    return combined_hash(identities)


def known_model_hash(folder: Path, memo: Path) -> str:
    """`model_hash`, computed once: it is kept in the file `memo`, and counts while the folder's files are the same.

    That is told by their inodes, sizes and times of change (ctime, which no copying tool can set).
    """
    files = sorted((path.name, *_state(path)) for path in folder.iterdir() if path.is_file())
    state = {"folder": str(folder.resolve()), "files": [list(file) for file in files]}
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(memo.read_text())
        if kept == state | {"model_hash": kept["model_hash"]}:
            return kept["model_hash"]
    found = model_hash(folder)
    with suppress(OSError):  # to read a run, nobody need be able to write to it
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_whole(memo, json.dumps(state | {"model_hash": found}, indent=1) + "\n")
    return found


def _state(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_ctime_ns


def identity(tensor: Tensor) -> str:
    """A tensor's dtype, shape and sha256, in a line."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {checksum(tensor)}"


def combined_hash(identities: Mapping[str, str]) -> str:
    """The `model_hash` of tensors by name -> `identity`."""
    lines = "".join(f"{name} {line}\n" for name, line in sorted(identities.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _open(path: Path) -> _WeightsFile:
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _PickledFile(path)
