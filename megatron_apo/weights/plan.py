"""How a model's Hugging Face tensors leave the trainer: in buckets of bounded size, planned once from shapes alone.

    plan = Plan.of(spec, dtype, bucket_bytes, pp=2)     the same on every rank
    for bucket in plan.buckets:                         in Hugging Face order
        bucket.views(buffer)                            the bucket's tensors in a flat buffer

A bucket is what one pipeline stage holds of a run of neighbouring tensors. Which ranks of the stage hold which of them:
`gather.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from megatron_apo.model.hf_config import ModelSpec
from megatron_apo.weights.families import Entry, model_entries
from megatron_apo.weights.rules import Rule
from megatron_apo.weights.safetensors_file import num_bytes

BUCKET_BYTES = 256 * 2**20
ALIGNMENT_BYTES = 64  # of each tensor in a bucket, and of a bucket's size: a cache line, and more than any dtype needs


@dataclass(frozen=True)
class TensorMeta:
    """A full Hugging Face tensor, not yet made."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Bucket:
    """Neighbouring tensors of one pipeline stage, which travel together."""

    index: int  # in its plan
    pp_rank: int  # the stage that holds the tensors
    entries: tuple[Entry, ...]  # the parameters that they come from
    tensors: tuple[TensorMeta, ...]  # in Hugging Face order
    offsets: tuple[int, ...]  # where each tensor begins in the bucket, bytes
    num_bytes: int  # of the whole bucket, with the gaps that alignment leaves

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in a flat uint8 `buffer` of at least `num_bytes`, without a copy. Its first byte has to lie where
        an element of any of the dtypes may."""
        buffer = buffer[: self.num_bytes]
        by_dtype = {dtype: buffer.view(dtype) for dtype in {tensor.dtype for tensor in self.tensors}}
        found = []
        for tensor, offset in zip(self.tensors, self.offsets, strict=True):
            start = offset // tensor.dtype.itemsize
            found.append(by_dtype[tensor.dtype][start : start + prod(tensor.shape)].view(tensor.shape))
        return found


@dataclass(frozen=True)
class Plan:
    """Every tensor of a model in Hugging Face order, cut into buckets."""

    buckets: tuple[Bucket, ...]

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        dtype: torch.dtype,
        bucket_bytes: int = BUCKET_BYTES,
        *,
        pp: int = 1,
        ep: int = 1,
        vpp: int = 1,
    ) -> Plan:
        """The plan of a model that is spread over `pp` stages of `vpp` chunks and `ep` expert ranks; `dtype` is what
        its tensors are sent in.

        A bucket ends where the stage does, and where the next parameter would make it larger than `bucket_bytes`: the
        tensors of one parameter stay together, even where they alone are more than that.
        """
        shapes: dict[Rule, list[tuple[int, ...]]] = {}
        units = []
        for entry in model_entries(spec, pp, ep, vpp):
            if entry.rule not in shapes:
                shapes[entry.rule] = entry.rule.hf_shapes(spec)
            pairs = zip(entry.hf, shapes[entry.rule], strict=True)
            units.append(_Unit(entry.pp_rank, (entry,), tuple(TensorMeta(name, dtype, shape) for name, shape in pairs)))
        return cls(_cut(units, bucket_bytes))

    @classmethod
    def of_tensors(cls, tensors: Iterable[TensorMeta], bucket_bytes: int = BUCKET_BYTES) -> Plan:
        """The plan of tensors that no parameters of Megatron are behind, each of its own dtype."""
        return cls(_cut([_Unit(0, (), (tensor,)) for tensor in tensors], bucket_bytes))

    @cached_property
    def tensors(self) -> tuple[TensorMeta, ...]:
        """Of all buckets, in Hugging Face order."""
        return tuple(tensor for bucket in self.buckets for tensor in bucket.tensors)

    @cached_property
    def num_bytes(self) -> int:
        """Size of all tensors' elements, bytes."""
        return sum(map(num_bytes, self.tensors))

    @cached_property
    def largest_bucket_bytes(self) -> int:
        """Size of the largest bucket, bytes; 0 without one."""
        return max((bucket.num_bytes for bucket in self.buckets), default=0)


@dataclass(frozen=True)
class _Unit:
    """What no bucket's end may part."""

    pp_rank: int
    entries: tuple[Entry, ...]
    tensors: tuple[TensorMeta, ...]

    @cached_property
    def num_bytes(self) -> int:
        return sum(_aligned(tensor) for tensor in self.tensors)


def _cut(units: Sequence[_Unit], bucket_bytes: int) -> tuple[Bucket, ...]:
    buckets: list[Bucket] = []
    members: list[_Unit] = []
    filled = 0  # bytes
    for unit in units:
        if members and (unit.pp_rank != members[0].pp_rank or filled + unit.num_bytes > bucket_bytes):
            buckets.append(_bucket(len(buckets), members))
            members, filled = [], 0
        members.append(unit)
        filled += unit.num_bytes
    return (*buckets, _bucket(len(buckets), members)) if members else ()


def _bucket(index: int, units: Sequence[_Unit]) -> Bucket:
    tensors = tuple(tensor for unit in units for tensor in unit.tensors)
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += _aligned(tensor)
    entries = tuple(entry for unit in units for entry in unit.entries)
    return Bucket(index, units[0].pp_rank, entries, tensors, tuple(offsets), end)


def _aligned(tensor: TensorMeta) -> int:
    """Bytes that the tensor takes in a bucket."""
    return -(-num_bytes(tensor) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
