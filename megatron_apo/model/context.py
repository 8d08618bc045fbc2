"""Context parallelism: which positions of a micro-batch a rank holds, and how the whole is put together again.

Each sequence is cut into 2 x CP pieces of equal length; rank r holds pieces r and 2 x CP - 1 - r, so that causal
attention costs every rank the same. That is the order that Transformer Engine's attention and Megatron-Core's rotary
embedding assume (rope_utils.py, `_get_thd_freqs_on_this_cp_rank`); nothing else in this package knows it. How many
pieces there are, a recipe knows too, which aligns sequences to them (config/parallel.py, `pieces_per_sequence`).

Shapes: T tokens of a packed micro-batch or of a padded sequence, L = T / CP tokens that one rank holds of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


@dataclass(frozen=True)
class ContextSplit:
    """How the positions of one micro-batch are spread over the ranks of `group`."""

    held_L: Tensor  # the positions that this rank holds, in its order
    back_T: Tensor  # where each position is when all ranks' are concatenated
    group: Any

    def take(self, values: Tensor, dim: int) -> Tensor:
        """This rank's part of `values`, whose `dim` has T positions."""
        return values.index_select(dim, self.held_L)

    def whole(self, part: Tensor, *, shared_gradient: bool) -> Tensor:
        """Every position, in order, from each rank's `part` [L, ...]. Collective.

        shared_gradient: every rank computes the same from the whole, so that each has its part's gradient already;
        otherwise the ranks' gradients add up.
        """
        gathered = gather_from_sequence_parallel_region(
            part, tensor_parallel_output_grad=not shared_gradient, group=self.group
        )
        return gathered.index_select(0, self.back_T)


@lru_cache(maxsize=16)  # a micro-batch's is asked for by every layer
def context_split(lengths: tuple[int, ...], group: Any, device: str | torch.device = "cpu") -> ContextSplit | None:
    """For tensors on `device`; None where `group` has one rank.

    lengths: tokens of each sequence that lie one after the other, padding included; 2 x CP divides each.
    """
    size = group.size()
    if size == 1:
        return None
    held = [_positions(lengths, size, rank) for rank in range(size)]
    return ContextSplit(held[group.rank()].to(device), torch.cat(held).argsort().to(device), group)


def _positions(lengths: Sequence[int], size: int, rank: int) -> Tensor:
    found, start = [], 0
    for length in lengths:
        piece, rest = divmod(length, 2 * size)
        assert rest == 0, f"{length} tokens are not a multiple of twice the context-parallel size {size}"
        for index in (rank, 2 * size - 1 - rank):
            found.append(torch.arange(start + index * piece, start + (index + 1) * piece))
        start += length
    return torch.cat(found)
