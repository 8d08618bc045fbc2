"""Micro-batches against a construction token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_apo.config import aligned
from megatron_apo.data.batch import IGNORE, make_micro_batch
from megatron_apo.data.sequences import Sequences
from megatron_apo.model.attention import PackedLayout

TOKENS = st.lists(st.integers(0, 50), min_size=1, max_size=12)
PAIRS = st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=6)


def naive(prompt, response):
    """[(input, position, label)] of one sequence: each token but the last predicts the next one."""
    tokens = prompt + response
    return [(tokens[i], i, tokens[i + 1] if i + 1 >= len(prompt) else IGNORE) for i in range(len(tokens) - 1)]


def rows_of(micro):
    """The sequences of a micro-batch as `naive` gives them, padding cut off."""
    flat = [
        torch.stack([micro.input_BS, micro.position_BS, micro.label_BS], dim=-1)[b] for b in range(len(micro.input_BS))
    ]
    layout = PackedLayout.of(micro)
    if layout is None:
        return [[tuple(t) for t in row.tolist()] for row in flat]
    bounds = layout.cu_seqlens_q.tolist()
    return [[tuple(t) for t in flat[0][a:b].tolist()] for a, b in zip(bounds, bounds[1:], strict=False)]


@settings(deadline=None)
@given(pairs=PAIRS, packing=st.booleans(), multiple=st.sampled_from([1, 4, 6, 16]), data=st.data())
def test_against_the_naive_construction(pairs, packing, multiple, data):
    prompts, responses = [list(p) for p, _ in pairs], [list(r) for _, r in pairs]
    indices = data.draw(st.permutations(range(len(pairs))).map(lambda order: order[: max(1, len(order) - 1)]))
    micro = make_micro_batch(indices, Sequences.of(prompts, responses), packing, multiple)
    expected = [naive(prompts[i], responses[i]) for i in indices]
    widths = [aligned(len(row), multiple) for row in expected]
    if packing:
        assert micro.input_BS.shape == (1, sum(widths)) and micro.lengths == tuple(widths)
    else:
        widths = [max(widths)] * len(widths)
        assert micro.lengths == (widths[0],)
    for row, wanted, width in zip(rows_of(micro), expected, widths, strict=True):
        assert len(row) == width
        assert row[: len(wanted)] == wanted
        padding = [(position, label) for _, position, label in row[len(wanted) :]]
        assert padding == [(position, IGNORE) for position in range(len(wanted), width)]
    # The positions that have a label are the response tokens, sequence by sequence.
    wanted = [token for i in indices for token in responses[i]]
    assert micro.label_BS[micro.label_BS != IGNORE].tolist() == wanted
    assert micro.sequence_R.tolist() == [k for k, i in enumerate(indices) for _ in responses[i]]


@pytest.mark.parametrize("packing", [True, False])
def test_one_token_prompts_and_responses(packing):
    micro = make_micro_batch([0, 1, 2], Sequences.of([[5], [6, 7, 8], [9]], [[1], [2], [3, 4]]), packing)
    assert micro.label_BS[micro.label_BS != IGNORE].tolist() == [1, 2, 3, 4]
    assert micro.sequence_R.tolist() == [0, 1, 2, 2]
    if packing:
        assert micro.input_BS.tolist() == [[5, 6, 7, 8, 9, 3]]
        assert micro.position_BS.tolist() == [[0, 0, 1, 2, 0, 1]]
        assert micro.label_BS.tolist() == [[1, IGNORE, IGNORE, 2, 3, 4]]
        layout = PackedLayout.of(micro)
        assert layout.cu_seqlens_q.tolist() == [0, 1, 4, 6] and layout.max_seqlen_q == 3
    else:
        assert micro.input_BS.tolist() == [[5, 0, 0], [6, 7, 8], [9, 3, 0]]
        assert micro.label_BS.tolist() == [[1, IGNORE, IGNORE], [IGNORE, IGNORE, 2], [3, 4, IGNORE]]


def test_alignment_pads_every_packed_sequence_and_the_width_of_padded_ones():
    sequences = [0, 1, 2], Sequences.of([[5], [6, 7, 8], [9]], [[1], [2], [3, 4]])
    packed = make_micro_batch(*sequences, packing=True, multiple=2)
    assert packed.input_BS.tolist() == [[5, 0, 6, 7, 8, 0, 9, 3]]
    assert packed.position_BS.tolist() == [[0, 1, 0, 1, 2, 3, 0, 1]]
    assert packed.label_BS.tolist() == [[1, IGNORE, IGNORE, IGNORE, 2, IGNORE, 3, 4]]
    layout = PackedLayout.of(packed)
    assert layout.cu_seqlens_q.tolist() == [0, 2, 6, 8] and layout.max_seqlen_q == 4
    # One tensor for all bounds: by its identity Transformer Engine knows that nothing lies between sequences.
    bounds = [layout.cu_seqlens_q_padded, layout.cu_seqlens_kv, layout.cu_seqlens_kv_padded]
    assert all(tensor is layout.cu_seqlens_q for tensor in bounds)
    padded = make_micro_batch(*sequences, packing=False, multiple=2)
    assert padded.input_BS.tolist() == [[5, 0, 0, 0], [6, 7, 8, 0], [9, 3, 0, 0]]
    assert padded.label_BS[1].tolist() == [IGNORE, IGNORE, 2, IGNORE] and PackedLayout.of(padded) is None


def test_a_micro_batch_needs_no_row_but_its_own():
    """A rank that holds some rows lays these out as one that holds all does."""
    whole = Sequences.of([[5], [6, 7, 8], [9]], [[1], [2], [3, 4]])
    part = whole.select([0, 2])
    assert part.token_ids_T.tolist() == [5, 1, 9, 3, 4] and len(part) == 3
    ours, theirs = make_micro_batch([2, 0], part, True), make_micro_batch([2, 0], whole, True)
    for name in ("input_BS", "position_BS", "label_BS", "sequence_R"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    with pytest.raises(AssertionError, match="row 1 is not held here"):
        make_micro_batch([0, 1], part, True)


def test_a_packed_micro_batch_is_filled_with_sequences_of_padding():
    micro = make_micro_batch([0], Sequences.of([[5, 6]], [[7, 8]]), packing=True, multiple=2, fill_to=600)
    assert micro.lengths == (4, 256, 256, 84)  # attention to one of 596 tokens would cost more
    assert micro.input_BS.shape == (1, 600) and micro.input_BS[0, :4].tolist() == [5, 6, 7, 0]
    assert (micro.label_BS != IGNORE).nonzero().tolist() == [[0, 1], [0, 2]] and micro.sequence_R.tolist() == [0, 0]
    assert make_micro_batch([0], Sequences.of([[5, 6]], [[7, 8]]), True, 2, fill_multiple=16).lengths == (4, 12)
    assert make_micro_batch([0], Sequences.of([[5, 6]], [[7, 8]]), True, 2, fill_to=18, fill_multiple=16).lengths == (
        4,
        28,
    )
    assert make_micro_batch([0], Sequences.of([[5, 6]], [[7, 8]]), True, 2, fill_multiple=4).lengths == (4,)
