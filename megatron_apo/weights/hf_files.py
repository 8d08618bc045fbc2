"""The weights files of a Hugging Face folder, each of which may be anything: found, opened and mapped.

names, index = weight_files(folder)     by the folder's index, where it has one
file = open_file(folder / name)         safetensors, or PyTorch's by its weights-only loader; nothing is unpickled
"""

from __future__ import annotations

from pathlib import Path
from types import EllipsisType
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_apo.model.hf_config import ModelConfigError
from megatron_apo.model.json_file import cut, read_object, shown
from megatron_apo.telemetry.units import one_line, some
from megatron_apo.weights.safetensors_file import DTYPE_CODES

_SAFETENSORS, _PICKLED = "model.safetensors", "pytorch_model.bin"
_TORCH_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
# Of a tensor: all, or an expert and some of its rows.
Index = EllipsisType | tuple[int, slice]


class WeightsFile(Protocol):
    """One open file of tensors."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype | str: ...
    def get(self, name: str, index: Index = ...) -> Tensor: ...


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

    def get(self, name: str, index: Index = ...) -> Tensor:
        return self._file.get_tensor(name) if index is ... else self._file.get_slice(name)[index]


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
        self._tensors = {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype | str:
        return self._tensors[name].dtype

    def get(self, name: str, index: Index = ...) -> Tensor:
        return self._tensors[name].detach()[index]


def open_file(path: Path) -> WeightsFile:
    """Raises `ModelConfigError`, in one line, for a file that is missing or damaged."""
    try:
        return _SafetensorsFile(path) if path.suffix == ".safetensors" else _PickledFile(path)
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        reason = cut(one_line(error), 200)
        raise ModelConfigError(f"{path}: missing or damaged weights file ({reason})") from None


def weight_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """(file names, {tensor: file name} of the index if there is one), chosen as transformers does: whatever else is in
    the folder (consolidated.safetensors) does not count. Raises `ModelConfigError`."""
    for single in (_SAFETENSORS, _PICKLED):
        if (folder / single).is_file():
            return [single], {}
        index = folder / f"{single}.index.json"
        if index.is_file():
            weight_map = _weight_map(index)
            return sorted(set(weight_map.values())), weight_map
    raise ModelConfigError(
        f"model path {folder}: no {_SAFETENSORS} or {_PICKLED} there, and no index of several such files"
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = read_object(index).get("weight_map")
    except ValueError as error:
        raise ModelConfigError(str(error)) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelConfigError(
            f"{index}: not an index of weights files (weight_map is {shown(weight_map)}, not tensors' names with their "
            "files); write it again"
        )
    # A link may lead anywhere, as those of the hub's cache do; a name may not.
    if odd := [file for file in weight_map.values() if not isinstance(file, str) or not _is_name(file)]:
        raise ModelConfigError(
            f"{index}: weight_map leads to {some(sorted(set(map(shown, odd))))}; only names of files in its folder are "
            "read, move the weights there"
        )
    return weight_map


def _is_name(file: str) -> bool:
    return file not in ("", "..") and file == Path(file).name and file.isprintable() and len(file) < 256
