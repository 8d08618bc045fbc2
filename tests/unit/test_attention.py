"""SDPAttention, padded and packed, against masked softmax attention in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_apo.model.attention import PackedLayout, SDPAttention, _shares_heads
from tests.largest import Largest

N, D = 4, 6
LENGTHS = [1, 2, 3, 4, 5, 8, 9, 1, 16, 7, 17]


class OneRank:
    """What the attention asks of a context-parallel group."""

    def size(self):
        return 1


def attention(scale=None):
    config, groups = SimpleNamespace(attention_dropout=0.0), SimpleNamespace(cp=OneRank())
    return SDPAttention(config, 1, None, "self", pg_collection=groups, softmax_scale=scale)


def naive(query_TND, key_TGD, value_TGD, scale=None):
    """One sequence -> [T, N*D], scores and softmax in full."""
    repeat = query_TND.shape[1] // key_TGD.shape[1]
    key_TND, value_TND = (x.repeat_interleave(repeat, dim=1) for x in (key_TGD, value_TGD))
    scores_NTT = torch.einsum("tnd,snd->nts", query_TND, key_TND) * (scale or query_TND.shape[2] ** -0.5)
    later = torch.ones(scores_NTT.shape[1:], dtype=torch.bool).triu(1)
    return torch.einsum("nts,snd->tnd", scores_NTT.masked_fill(later, -torch.inf).softmax(-1), value_TND).flatten(1)


def inputs(*shape, groups):
    torch.manual_seed(0)
    return [torch.randn(*shape, heads, D) for heads in (N, groups, groups)]


def compare(ours, exact, found, wanted):
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=2e-6)
    upstream = torch.randn(found.shape)
    found.backward(upstream)
    wanted.backward(upstream.double())
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [1, 1], [12], [8, 8], [3, 300]])
def test_packed(lengths, groups, scale):
    values = inputs(sum(lengths), groups=groups)
    ours = [x.clone().requires_grad_() for x in values]
    exact = [x.double().requires_grad_() for x in values]
    found = attention(scale)(*ours, None, packed_seq_params=PackedLayout.from_lengths(lengths))
    pieces = zip(*(x.split(lengths) for x in exact), strict=True)
    compare(ours, exact, found, torch.cat([naive(*piece, scale=scale) for piece in pieces]))


def test_heads_of_its_own_where_no_kernel_shares_them(monkeypatch):
    """As in fp32 on a GPU, whose kernel of O(s) memory has no query groups."""
    values = inputs(sum(LENGTHS), groups=2)
    layout, results = PackedLayout.from_lengths(LENGTHS), []
    for shares in (True, False):
        ours = [x.clone().requires_grad_() for x in values]
        monkeypatch.setattr("megatron_apo.model.attention._shares_heads", lambda query, shares=shares: shares)
        with monkeypatch.context() as patch:
            patch.setattr("megatron_apo.model.attention.scaled_dot_product_attention", only_with_gqa(shares))
            found = attention()(*ours, None, packed_seq_params=layout)
        found.square().sum().backward()
        results.append([found, *(x.grad for x in ours)])
    for shared, own in zip(*results, strict=True):
        torch.testing.assert_close(own, shared, rtol=1e-5, atol=1e-6)


def only_with_gqa(wanted):
    def attend(query, key, value, *, enable_gqa, **options):
        assert enable_gqa == wanted and (key.shape[1] == query.shape[1]) != wanted
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=enable_gqa, **options)

    return attend


@pytest.mark.parametrize(
    ("is_cuda", "dtype", "shares"),
    [(True, torch.float32, False), (True, torch.bfloat16, True), (False, torch.float32, True)],
)
def test_where_heads_are_shared(is_cuda, dtype, shares):
    assert _shares_heads(SimpleNamespace(is_cuda=is_cuda, dtype=dtype)) == shares


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(9, 3), (1, 2), (40, 1)])
def test_padded(shape, groups):
    values = inputs(*shape, groups=groups)  # [S, B, heads, D]
    ours = [x.clone().requires_grad_() for x in values]
    exact = [x.double().requires_grad_() for x in values]
    found = attention()(*ours, None)
    rows = [naive(*(x[:, b] for x in exact)) for b in range(shape[1])]
    compare(ours, exact, found, torch.stack(rows, dim=1))


def test_right_padding_changes_no_earlier_position():
    query, key, value = inputs(12, 2, groups=2)
    whole = attention()(query, key, value, None)
    for x in (query, key, value):
        x[7:, 1] = 1e3
    padded = attention()(query, key, value, None)
    assert torch.equal(padded[:7], whole[:7])
    assert torch.equal(padded[:, 0], whole[:, 0])
    torch.testing.assert_close(attention()(query[:7], key[:7], value[:7], None), whole[:7], rtol=1e-5, atol=1e-6)


def test_packed_sequences_do_not_see_each_other():
    values, layout = inputs(sum(LENGTHS), groups=2), PackedLayout.from_lengths(LENGTHS)
    before = attention()(*values, None, packed_seq_params=layout)
    for x in values:
        x[10:15] += 100  # the sequence of length 5
    after = attention()(*values, None, packed_seq_params=layout)
    changed = (before != after).any(dim=1).nonzero().flatten().tolist()
    assert changed == [10, 11, 12, 13, 14]


def test_layout_is_megatrons_packed_parameters():
    layout = PackedLayout.from_lengths(LENGTHS)
    assert layout.qkv_format == "thd" and layout.max_seqlen_q == layout.max_seqlen_kv == 17
    assert layout.cu_seqlens_q.dtype == torch.int32
    assert layout.cu_seqlens_q.tolist() == [0, 1, 3, 6, 10, 15, 23, 32, 33, 49, 56, 73]
    assert len(layout.groups) == 6  # up to 1, 2, 4, 8, 16 and 32 tokens
    # Within a group no sequence is padded to twice its length.
    assert all(2 * group.valid_BS.sum(1).min() > group.valid_BS.shape[1] for group in layout.groups)


@pytest.mark.parametrize("packed", [True, False])
def test_memory_grows_with_length_not_its_square(packed):
    length, heads, groups, dim = 4096, 2, 1, 8
    shape = (length,) if packed else (length, 1)
    values = [torch.randn(*shape, count, dim, requires_grad=True) for count in (heads, groups, groups)]
    layout = PackedLayout.from_lengths([length]) if packed else None
    with Largest() as largest:
        attention()(*values, None, packed_seq_params=layout).sum().backward()
    assert largest.num_elements <= 2 * length * heads * dim
