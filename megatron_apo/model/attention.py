"""Core attention on `scaled_dot_product_attention`: O(s) memory, padded or packed.

Megatron-Core's local layer spec has an attention that stores s x s scores and refuses packed sequences; this one takes
its place. Packed sequences are gathered into groups of similar length (powers of two), one SDPA call each, so that
ten 16k-token responses and a hundred short ones cost neither s^2 memory nor a hundred calls.

Shapes: T tokens of a packed micro-batch, S padded length, B sequences, N query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_apo.data.batch import MicroBatch
from megatron_apo.model.context import context_split


@dataclass
class LengthGroup:
    """Sequences of similar length: `gather_BS` token indices (padding repeats the first token), `valid_BS` bool."""

    gather_BS: Tensor
    valid_BS: Tensor


@dataclass
class PackedLayout(PackedSeqParams):
    """Megatron's packed-sequence parameters plus the gather plan of `SDPAttention`.

    Padding that aligns a sequence is part of it for every attention: it comes last, so that causality keeps it from the
    rest, and what comes out at it is then always a number (0 x NaN is NaN in a gradient). So bounds with and without
    padding are one tensor, by which Transformer Engine knows that flash attention serves (dot_product_attention.py,
    `pad_between_seqs`). Both are there because it wants them under context parallelism (context_parallel.py).
    """

    lengths: tuple[int, ...] = ()  # tokens of each sequence, padding included
    groups: list[LengthGroup] = field(default_factory=list)
    scatter_T: Tensor | None = None  # position of each token in the groups' concatenated valid tokens

    @classmethod
    def of(cls, micro: MicroBatch) -> PackedLayout | None:
        """A micro-batch's, on its device; None where it is padded instead."""
        return cls.from_lengths(micro.lengths).to(micro.input_BS.device) if micro.packed else None

    @classmethod
    def from_lengths(cls, lengths: Sequence[int]) -> PackedLayout:
        """`lengths`: tokens of each packed sequence, in order, padding included; at least one, all positive."""
        starts = torch.tensor([0, *lengths]).cumsum(0)
        by_size: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            by_size.setdefault(math.ceil(math.log2(length)), []).append(index)
        groups, order = [], []
        for _, members in sorted(by_size.items()):
            first_B = starts[members]
            length_B = torch.tensor([lengths[i] for i in members])
            offset_S = torch.arange(int(length_B.max()))
            valid_BS = offset_S < length_B[:, None]
            gather_BS = first_B[:, None] + offset_S * valid_BS
            groups.append(LengthGroup(gather_BS, valid_BS))
            order.append(gather_BS[valid_BS])
        scatter_T = torch.empty(int(starts[-1]), dtype=torch.long)
        scatter_T[torch.cat(order)] = torch.arange(len(scatter_T))
        cu_seqlens = starts.to(torch.int32)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            cu_seqlens_q_padded=cu_seqlens,
            cu_seqlens_kv_padded=cu_seqlens,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            lengths=tuple(lengths),
            groups=groups,
            scatter_T=scatter_T,
        )

    def to(self, device: torch.device) -> PackedLayout:
        """The same on `device`. Bounds with and without padding stay one tensor."""
        if self.cu_seqlens_q.device == device:
            return self
        bounds = self.cu_seqlens_q.to(device)
        return replace(
            self,
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            cu_seqlens_q_padded=bounds,
            cu_seqlens_kv_padded=bounds,
            groups=[LengthGroup(group.gather_BS.to(device), group.valid_BS.to(device)) for group in self.groups],
            scatter_T=self.scatter_T.to(device),
        )


class SDPAttention(torch.nn.Module):
    """Drop-in for Megatron-Core's `DotProductAttention` (same constructor and call); causal self-attention only."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, *, pg_collection, softmax_scale, **unused):
        super().__init__()
        assert attention_type == "self" and config.attention_dropout == 0.0
        self.scale = softmax_scale
        self.context_group = pg_collection.cp

    def forward(
        self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        """Padded: query [S, B, N, D], key/value [S, B, G, D] -> [S, B, N*D]. Packed: [T, N, D] -> [T, N*D].

        Padding goes at the end of a sequence: causality keeps it out of every earlier position.

        A context-parallel rank gives and gets its own positions. Keys and values are gathered; the queries of other
        ranks stand as zeros, so that each rank computes the whole of the attention and keeps its part (Transformer
        Engine's attention shares the work out as well).
        """
        lengths = (len(query) * self.context_group.size(),)
        if packed_seq_params is not None:
            lengths = packed_seq_params.lengths
        split = context_split(lengths, self.context_group, query.device)
        if split is None:
            return self._whole(query, key, value, packed_seq_params)
        key, value = (split.whole(x, shared_gradient=False) for x in (key, value))
        queries = query.new_zeros(key.shape[:1] + query.shape[1:]).index_copy(0, split.held_L, query)
        return split.take(self._whole(queries, key, value, packed_seq_params), 0)

    def _whole(self, query: Tensor, key: Tensor, value: Tensor, packed_seq_params: PackedLayout | None) -> Tensor:
        if packed_seq_params is None:
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return out.permute(2, 0, 1, 3).flatten(2)
        pieces = []
        for group in packed_seq_params.groups:
            out = self._attend(*(_take(x, group.gather_BS).transpose(1, 2) for x in (query, key, value)))
            pieces.append(out.transpose(1, 2)[group.valid_BS])
        packed = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return packed.index_select(0, packed_seq_params.scatter_T).flatten(1)

    def _attend(self, query_BNSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor) -> Tensor:
        shared = _shares_heads(query_BNSD)
        if not shared:
            repeats = query_BNSD.shape[1] // key_BGSD.shape[1]
            key_BGSD, value_BGSD = (x.repeat_interleave(repeats, dim=1) for x in (key_BGSD, value_BGSD))
        return scaled_dot_product_attention(
            query_BNSD, key_BGSD, value_BGSD, is_causal=True, scale=self.scale, enable_gqa=shared
        )


def _shares_heads(query: Tensor) -> bool:
    """Whether a kernel of O(s) memory lets query heads share a key head. On a GPU flash attention does, which is
    16-bit; in fp32 the one that serves does not, and torch would silently store s x s scores (sdp_utils.cpp)."""
    return not (query.is_cuda and query.dtype == torch.float32)


def _take(x: Tensor, index_BS: Tensor) -> Tensor:
    return x.index_select(0, index_BS.flatten()).unflatten(0, index_BS.shape)
