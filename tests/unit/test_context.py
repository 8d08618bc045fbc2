"""The order of context parallelism: every position on one rank, causal work alike, Megatron-Core's own rotary order."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

from megatron_apo.model.context import context_split


class Group:
    """What `context_split` asks of a process group."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = lambda: rank, lambda: size


LENGTHS = (16, 8, 32)


@pytest.mark.parametrize("size", [2, 4])
def test_every_position_is_held_once_and_found_again(size):
    splits = [context_split(LENGTHS, Group(rank, size)) for rank in range(size)]
    held = torch.cat([split.held_L for split in splits])
    assert torch.equal(held.sort().values, torch.arange(sum(LENGTHS)))
    values = torch.rand(sum(LENGTHS), 3)
    parts = torch.cat([split.take(values, 0) for split in splits])
    assert all(torch.equal(parts[split.back_T], values) for split in splits)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_have_the_same_causal_work(size):
    starts = torch.tensor([0, 16, 24]).repeat_interleave(torch.tensor(LENGTHS))
    keys_seen = torch.arange(sum(LENGTHS)) - starts + 1
    work = {int(keys_seen[context_split(LENGTHS, Group(rank, size)).held_L].sum()) for rank in range(size)}
    assert len(work) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_the_order_is_megatrons(rank):
    """Its rotary embedding gives a rank's tokens the angles of these positions."""
    positions = torch.arange(8.0)
    angles = _get_thd_freqs_on_this_cp_rank(rank, 2, torch.empty(4), positions)
    assert torch.equal(angles, positions[context_split((8,), Group(rank, 2)).held_L])


def test_one_rank_holds_everything():
    assert context_split(LENGTHS, Group(0, 1)) is None
