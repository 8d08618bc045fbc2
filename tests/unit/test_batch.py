"""Micro-batches against a construction token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_apo.data.batch import make_micro_batch
from megatron_apo.model.build import IGNORE

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
    if micro.layout is None:
        return [[tuple(t) for t in row.tolist()] for row in flat]
    bounds = micro.layout.cu_seqlens_q.tolist()
    return [[tuple(t) for t in flat[0][a:b].tolist()] for a, b in zip(bounds, bounds[1:], strict=False)]


@settings(deadline=None)
@given(pairs=PAIRS, packing=st.booleans(), data=st.data())
def test_against_the_naive_construction(pairs, packing, data):
    prompts, responses = [list(p) for p, _ in pairs], [list(r) for _, r in pairs]
    indices = data.draw(st.permutations(range(len(pairs))).map(lambda order: order[: max(1, len(order) - 1)]))
    micro = make_micro_batch(indices, prompts, responses, packing)
    expected = [naive(prompts[i], responses[i]) for i in indices]
    found = rows_of(micro)
    if packing:
        assert micro.input_BS.shape == (1, sum(map(len, expected)))
        assert found == expected
    else:
        width = max(map(len, expected))
        for row, wanted in zip(found, expected, strict=True):
            assert len(row) == width
            assert row[: len(wanted)] == wanted
            assert [(p, label) for _, p, label in row[len(wanted) :]] == [
                (p, IGNORE) for p in range(len(wanted), width)
            ]
    # The positions that have a label are the response tokens, sequence by sequence.
    wanted = [token for i in indices for token in responses[i]]
    assert micro.label_BS[micro.label_BS != IGNORE].tolist() == wanted
    assert micro.sequence_R.tolist() == [k for k, i in enumerate(indices) for _ in responses[i]]
    values = [[100.0 * i + t for t in range(len(response))] for i, response in enumerate(responses)]
    gathered = micro.gather(values)
    assert gathered.dtype == torch.float32
    assert gathered.tolist() == [100.0 * i + t for i in indices for t in range(len(responses[i]))]


@pytest.mark.parametrize("packing", [True, False])
def test_one_token_prompts_and_responses(packing):
    micro = make_micro_batch([0, 1, 2], [[5], [6, 7, 8], [9]], [[1], [2], [3, 4]], packing)
    assert micro.label_BS[micro.label_BS != IGNORE].tolist() == [1, 2, 3, 4]
    assert micro.sequence_R.tolist() == [0, 1, 2, 2]
    if packing:
        assert micro.input_BS.tolist() == [[5, 6, 7, 8, 9, 3]]
        assert micro.position_BS.tolist() == [[0, 0, 1, 2, 0, 1]]
        assert micro.label_BS.tolist() == [[1, IGNORE, IGNORE, 2, 3, 4]]
        assert micro.layout.cu_seqlens_q.tolist() == [0, 1, 4, 6] and micro.layout.max_seqlen_q == 3
    else:
        assert micro.input_BS.tolist() == [[5, 0, 0], [6, 7, 8], [9, 3, 0]]
        assert micro.label_BS.tolist() == [[1, IGNORE, IGNORE], [IGNORE, IGNORE, 2], [3, 4, IGNORE]]
