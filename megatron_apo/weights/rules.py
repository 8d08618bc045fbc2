"""How one Megatron parameter corresponds to Hugging Face tensors, in both directions.

A `Rule` knows four things: the HF names, how full HF tensors become this parameter's tensor-parallel shards (`split`),
how the shards become the full HF tensors again (`merge`), and which slice of a shard is which slice of a full tensor
(`pieces`). `merge(split(x)) == x` bitwise, for every TP that fits, and so is what the pieces of all ranks, copied one
by one, put together. Rules hold no state and are never changed at run time.

Shapes are full, unsharded: H hidden, N query heads, G query groups, D head size, F ffn, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megatron_apo.model.hf_config import ModelSpec


def _sizes(spec: ModelSpec) -> dict[str, int]:
    """Sizes of dimensions by the names that rows use."""
    return {
        "hidden": spec.hidden_size,
        "heads": spec.num_heads * spec.head_dim,
        "head": spec.head_dim,
        "ffn": spec.ffn_size,
        "experts": spec.num_experts,
        "expert_ffn": spec.expert_ffn_size,
        "value": 1,
    }


@dataclass(frozen=True)
class Piece:
    """Elements that a full HF tensor and one rank's shard have in common, in one order and shape.

    hf: which of the rule's HF tensors; full, shard: where in it and where in the shard, by slices of the leading
    dimensions (the others are whole). Bounds are given, so that the slices alone say how many elements these are.
    """

    hf: int
    full: tuple[slice, ...]
    shard: tuple[slice, ...]


@dataclass(frozen=True)
class Rule:
    """A row of a family's table. `{layer}` in names stands for the layer's index, `{expert}` for the expert's.

    megatron: parameter name, in the local layer spec's spelling; te: in Transformer Engine's, where it differs.
    """

    megatron: str
    hf: tuple[str, ...]
    te: str | None = None

    def hf_shapes(self, spec: ModelSpec) -> list[tuple[int, ...]]:
        """Full shape of each HF tensor, in the order of `hf`."""
        raise NotImplementedError

    def split(self, tensors: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        """Full HF tensors -> the parameter's shard on each of `tp` ranks."""
        raise NotImplementedError

    def merge(self, shards: Sequence[Tensor], spec: ModelSpec) -> list[Tensor]:
        """Shards in tensor-rank order -> full HF tensors, in the order of `hf`."""
        raise NotImplementedError

    def pieces(self, spec: ModelSpec, tp: int, tp_rank: int) -> tuple[Piece, ...]:
        """What tensor rank `tp_rank` of `tp` gives to the full HF tensors, in as few pieces as there are runs of rows.

        Over all tensor ranks each element is in one piece: of a replicated parameter the first rank gives everything,
        and padding is given by none.
        """
        return _pieces(self, spec, tp, tp_rank)

    def _pieces(self, spec: ModelSpec, tp: int, tp_rank: int) -> list[Piece]:
        raise NotImplementedError


@cache
def _pieces(rule: Rule, spec: ModelSpec, tp: int, tp_rank: int) -> tuple[Piece, ...]:
    """Worked out once for each rule: all layers, and all experts, have the same ones."""
    return tuple(rule._pieces(spec, tp, tp_rank))


def _split_rows(runs: Sequence[tuple[int, int, int]], tp: int, tp_rank: int) -> list[Piece]:
    """Pieces of a parameter whose rows are `runs` (which HF tensor, its first row, number of rows) one after the other,
    split over rows as `torch.chunk` splits them."""
    size = -(-sum(rows for _, _, rows in runs) // tp)
    first, end = tp_rank * size, (tp_rank + 1) * size
    pieces, position = [], 0  # position: the run's first row in the parameter
    for hf, start, rows in runs:
        low, high = max(first, position), min(end, position + rows)
        if low < high:
            shift = start - position
            pieces.append(Piece(hf, (slice(low + shift, high + shift),), (slice(low - first, high - first),)))
        position += rows
    return pieces


@dataclass(frozen=True)
class Copy(Rule):
    """The same tensor on both sides: `shape` names its dimensions; `dim` is the one split over TP, None: replicated."""

    shape: tuple[str, ...] = ()
    dim: int | None = None

    def hf_shapes(self, spec: ModelSpec) -> list[tuple[int, ...]]:
        sizes = _sizes(spec)
        return [tuple(sizes[name] for name in self.shape)]

    def split(self, tensors: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        (tensor,) = tensors
        return [tensor] * tp if self.dim is None else list(tensor.chunk(tp, dim=self.dim))

    def merge(self, shards: Sequence[Tensor], spec: ModelSpec) -> list[Tensor]:
        return [shards[0] if self.dim is None else torch.cat(list(shards), dim=self.dim)]

    def _pieces(self, spec: ModelSpec, tp: int, tp_rank: int) -> list[Piece]:
        (shape,) = self.hf_shapes(spec)
        if self.dim is None:
            return _split_rows([(0, 0, shape[0])], 1, 0) if tp_rank == 0 else []
        before = tuple(slice(0, size) for size in shape[: self.dim])
        return [
            Piece(0, before + piece.full, before + piece.shard)
            for piece in _split_rows([(0, 0, shape[self.dim])], tp, tp_rank)
        ]


@dataclass(frozen=True)
class Vocabulary(Rule):
    """[V, H] split over rows; Megatron's copy is padded with zero rows so that TP divides it."""

    def hf_shapes(self, spec: ModelSpec) -> list[tuple[int, ...]]:
        return [(spec.vocab_size, spec.hidden_size)]

    def split(self, tensors: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        (tensor,) = tensors
        padding = -len(tensor) % tp
        if padding:
            tensor = torch.cat([tensor, tensor.new_zeros(padding, *tensor.shape[1:])])
        return list(tensor.chunk(tp))

    def merge(self, shards: Sequence[Tensor], spec: ModelSpec) -> list[Tensor]:
        return [torch.cat(list(shards))[: spec.vocab_size]]

    def _pieces(self, spec: ModelSpec, tp: int, tp_rank: int) -> list[Piece]:
        return _split_rows([(0, 0, spec.vocab_size)], tp, tp_rank)


@dataclass(frozen=True)
class QKV(Rule):
    """Query, key and value in one parameter, interleaved by query group: [q..q k v] for each group, split over rows.

    Works on weights [., H] and biases [.]. (Megatron-Core attention.py, `get_query_key_value_tensors`.)
    """

    bias: bool = False

    def hf_shapes(self, spec: ModelSpec) -> list[tuple[int, ...]]:
        tail = () if self.bias else (spec.hidden_size,)
        return [(heads * spec.head_dim, *tail) for heads in (spec.num_heads, *(spec.num_query_groups,) * 2)]

    def split(self, tensors: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        groups = [tensor.unflatten(0, (spec.num_query_groups, -1)) for tensor in tensors]
        return list(torch.cat(groups, dim=1).flatten(0, 1).chunk(tp))

    def merge(self, shards: Sequence[Tensor], spec: ModelSpec) -> list[Tensor]:
        groups = torch.cat(list(shards)).unflatten(0, (spec.num_query_groups, -1))
        query_rows = spec.num_heads // spec.num_query_groups * spec.head_dim
        parts = groups.split([query_rows, spec.head_dim, spec.head_dim], dim=1)
        return [part.flatten(0, 1) for part in parts]

    def _pieces(self, spec: ModelSpec, tp: int, tp_rank: int) -> list[Piece]:
        rows = (spec.num_heads // spec.num_query_groups * spec.head_dim, spec.head_dim, spec.head_dim)
        runs = [(hf, group * rows[hf], rows[hf]) for group in range(spec.num_query_groups) for hf in range(3)]
        return _split_rows(runs, tp, tp_rank)


@dataclass(frozen=True)
class GatedMLP(Rule):
    """gate and up in one parameter, [F, H] or biases [F]: each rank holds its slice of gate, then its slice of up."""

    shape: tuple[str, ...] = ("ffn", "hidden")

    def hf_shapes(self, spec: ModelSpec) -> list[tuple[int, ...]]:
        sizes = _sizes(spec)
        return [tuple(sizes[name] for name in self.shape)] * 2

    def split(self, tensors: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        gate, up = tensors
        return [torch.cat(pair) for pair in zip(gate.chunk(tp), up.chunk(tp), strict=True)]

    def merge(self, shards: Sequence[Tensor], spec: ModelSpec) -> list[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([gate for gate, _ in halves]), torch.cat([up for _, up in halves])]

    def _pieces(self, spec: ModelSpec, tp: int, tp_rank: int) -> list[Piece]:
        size = _sizes(spec)[self.shape[0]] // tp
        full = (slice(tp_rank * size, (tp_rank + 1) * size),)
        return [Piece(hf, full, (slice(hf * size, (hf + 1) * size),)) for hf in range(2)]
