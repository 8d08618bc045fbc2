"""Reads Hugging Face model folders: safetensors, or PyTorch's .bin by its weights-only loader. Nothing is unpickled.

reader = HFReader(folder)       every file opened and mapped, every problem of them said at once
reader.check(spec)              the tensors are exactly those of the model
reader.get(name)                one tensor; FP8 blocks come dequantized, an expert's out of its layer's fused experts
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from megatron_apo.model.hf_config import ModelConfigError, ModelSpec, read_hf_config
from megatron_apo.runtime.files import write_whole
from megatron_apo.weights.families import EMBEDDING, HEAD, VALUE_HEAD, hf_tensors
from megatron_apo.weights.finite import is_finite, refuse_not_finite
from megatron_apo.weights.fused_experts import ExpertSlice, expert_slice, fused_shapes
from megatron_apo.weights.hf_files import WeightsFile, open_file, weight_files
from megatron_apo.weights.safetensors_file import DTYPE_CODES, checksum
from megatron_apo.weights.tensor_names import in_lines, is_buffer

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FP8_BLOCK = 128
_SCALE = "_scale_inv"  # of DeepSeek's block-scaled FP8: weight = weight_fp8 * weight_scale_inv, by blocks


class HFReader:
    """The tensors of a Hugging Face folder. Raises `ModelConfigError` on construction, with one line for each file that
    is missing, damaged or contradicted by the index.

    Tensors go by the names that `hf_tensors` has, also where the folder has a layer's experts in one.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ModelConfigError(f"model path {folder}: not a folder; give a Hugging Face model folder")
        self._file_of: dict[str, WeightsFile] = {}
        places: dict[str, str] = {}
        problems, twice = [], []
        files, index = weight_files(self.folder)
        for name in files:
            try:
                file = open_file(self.folder / name)
            except ModelConfigError as error:
                problems.append(str(error))
                continue
            for tensor in file.names():
                if is_buffer(tensor):
                    continue
                other = places.setdefault(tensor, name)
                if other != name:
                    twice.append((tensor, f"model path {folder}: {{}} is in {other} and in {name}; remove one"))
                self._file_of[tensor] = file
        problems += in_lines(twice)
        if not problems:
            problems = in_lines(
                (tensor, f"{self.folder / name}: {{}} is not there, though the index says so")
                for tensor, name in sorted(index.items())
                if places.get(tensor) != name and not is_buffer(tensor)
            )
        if problems:
            raise ModelConfigError("\n".join(problems))

    def __contains__(self, name: str) -> bool:
        return name in self._file_of or self._slice(name) is not None

    def names(self) -> list[str]:
        """The folder's tensors as they are stored; scales of FP8 blocks belong to theirs, buffers are none."""
        return sorted(name for name in self._file_of if not self._is_scale(name))

    def dtypes(self, spec: ModelSpec) -> set[torch.dtype | str]:
        """The dtypes that `get` gives of the model's tensors; a name where torch has none."""
        return {self.dtype(name) for name in hf_tensors(spec) if name in self}

    def dtype(self, name: str) -> torch.dtype | str:
        stored = part.fused if (part := self._slice(name)) else name
        return torch.bfloat16 if stored + _SCALE in self._file_of else self._file_of[stored].dtype(stored)

    def shape(self, name: str) -> tuple[int, ...]:
        if part := self._slice(name):
            return part.shape(self._file_of[part.fused].shape(part.fused))
        return self._file_of[name].shape(name)

    def get(self, name: str) -> Tensor:
        """One tensor: mapped from its file, bf16 out of FP8 blocks, or read out of fused experts."""
        if part := self._slice(name):
            file = self._file_of[part.fused]
            return file.get(part.fused, part.rows(file.shape(part.fused)))
        tensor = self._file_of[name].get(name)
        scale = self._file_of.get(name + _SCALE)
        return tensor if scale is None else dequantize(tensor, scale.get(name + _SCALE))

    def check(self, spec: ModelSpec) -> None:
        """Raise `ModelConfigError` for tensors that are missing, extra or wrongly shaped, a line for each pattern.

        A critic's folder may be a language model's: it then has an output layer and no value head.
        """
        expected, fused = hf_tensors(spec), fused_shapes(spec)
        shapes, present = expected | fused, set(self.names())
        missing = [(name, "missing tensor {}") for name in expected if name not in self and name not in VALUE_HEAD.hf]
        unknown = [(name, "unknown tensor {}") for name in sorted(present - shapes.keys()) if name not in HEAD.hf]
        of_known = [
            problem for name in sorted(present & shapes.keys()) for problem in self._problems_of(name, shapes[name])
        ]
        in_two = [
            (name, "{} is there apart and among the fused experts; remove one")
            for name in sorted(present & expected.keys())
            if (part := expert_slice(name)) and part.fused in present
        ]
        problems = [line for found in (missing, unknown, of_known, in_two) for line in in_lines(found)]
        if not problems and spec.tied and not self._head_is_embedding():
            problems = [f"{HEAD.hf[0]} differs from the embedding although the config ties them"]
        if problems:
            raise ModelConfigError("\n".join(f"{self.folder}: {problem}" for problem in problems))

    def _slice(self, name: str) -> ExpertSlice | None:
        """Where an expert's tensor lies, if not in one of its own."""
        if name in self._file_of:
            return None
        part = expert_slice(name)
        return part if part and part.fused in self._file_of else None

    def _is_scale(self, name: str) -> bool:
        return name.endswith(_SCALE) and name.removesuffix(_SCALE) in self._file_of

    def _head_is_embedding(self) -> bool:
        """Whether the head that a tied model may have beside its embedding is the same bits, scales included."""
        (head,), (embedding,) = HEAD.hf, EMBEDDING.hf
        if head not in self._file_of:
            return True
        if (self.dtype(head), self.shape(head)) != (self.dtype(embedding), self.shape(embedding)):
            return False
        return all(
            torch.equal(*(self._file_of[name].get(name).contiguous().view(torch.uint8) for name in pair))
            for pair in ((head, embedding), (head + _SCALE, embedding + _SCALE))
            if pair[1] in self._file_of
        )

    def _problems_of(self, name: str, expected: tuple[int, ...]) -> Iterator[tuple[str, str]]:
        """(tensor, what is wrong with it, with {} for its name), of one of the model's tensors and its scale."""
        shape, stored, scale = self.shape(name), self._file_of[name].dtype(name), name + _SCALE
        if shape != expected:
            yield name, f"{{}} has shape {shape}, expected {expected}"
        elif stored not in DTYPE_CODES:
            yield name, f"{{}} is {str(stored).removeprefix('torch.')}, expected floating-point numbers"
        elif stored in _FP8 and len(shape) != 2:
            yield name, "{} is FP8, which is read of matrices alone, each expert's apart"
        elif stored in _FP8 and scale not in self._file_of:
            yield name, f"{{}} is FP8 without its scale, a tensor of this name and {_SCALE}"
        elif scale in self._file_of and stored not in _FP8:
            yield name, f"{{}} has a scale (its name and {_SCALE}), but is {stored}, not FP8"
        elif scale in self._file_of:
            blocks = tuple(-(-size // _FP8_BLOCK) for size in shape)
            found = self._file_of[scale].shape(scale)
            if found != blocks:
                yield scale, f"{{}} has shape {found}, expected {blocks}"


def dequantize(weight_RC: Tensor, scale_BD: Tensor) -> Tensor:
    """bf16 out of FP8 with one scale for each block of 128 x 128: weight * scale, multiplied in fp32.

    (DeepSeek-V3, inference/kernel.py, `weight_dequant`.)
    """
    rows, columns = weight_RC.shape
    scale_RC = scale_BD.float().repeat_interleave(_FP8_BLOCK, 0)[:rows].repeat_interleave(_FP8_BLOCK, 1)[:, :columns]
    return (weight_RC.float() * scale_RC).bfloat16()


def model_hash(folder: Path) -> str:
    """The identity of a model's weights: of each tensor's HF name, dtype, shape and bytes, however they are stored.

    Tensors that the model does not use (a tied head's copy, rotary frequencies) do not count. Raises `ModelConfigError`
    for weights that are not finite.
    """
    reader = HFReader(folder)
    names = [name for name in hf_tensors(read_hf_config(folder)) if name in reader]
    not_finite = []

    def look(name: str) -> str:
        tensor = reader.get(name)
        if not is_finite(tensor):
            not_finite.append(name)
        return identity(tensor)

    with ThreadPoolExecutor() as threads:  # hashing lets go of the interpreter's lock
        identities = dict(zip(names, threads.map(look, names), strict=True))
    refuse_not_finite(folder, sorted(not_finite))
    return combined_hash(identities)


def known_model_hash(folder: Path, memo: Path) -> str:
    """`model_hash` of a folder that is one whole model, computed once: it is kept in the file `memo`, and counts while
    the folder's files are the same.

    That is told by their inodes, sizes and times of change (ctime, which no copying tool can set). Raises
    `ModelConfigError` for what `HFReader.check` and `model_hash` refuse.
    """
    files = sorted((path.name, *_state(path)) for path in folder.iterdir() if path.is_file())
    state = {"folder": str(folder.resolve()), "files": [list(file) for file in files], "finite": True}
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(memo.read_text())
        if kept == state | {"model_hash": kept["model_hash"]}:
            return kept["model_hash"]
    HFReader(folder).check(read_hf_config(folder))
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
