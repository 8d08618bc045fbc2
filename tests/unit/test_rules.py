"""The mapping's rules against explicit loops, and its names against the real models'."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_apo.model.hf_config import ModelSpec
from megatron_apo.weights.families import EMBEDDING, LAYER_ROWS, model_entries, tied_head_entry
from megatron_apo.weights.rules import QKV, Copy, GatedMLP, Vocabulary
from tests.models import _COMMON, VARIANTS


def make_spec(**changes) -> ModelSpec:
    values = dict(
        family="qwen3",
        num_layers=4,
        hidden_size=8,
        ffn_size=8,
        num_heads=4,
        num_query_groups=2,
        head_dim=6,
        vocab_size=11,
        max_positions=64,
        norm_eps=1e-6,
        rope_theta=1e4,
        rope_llama3_factor=None,
        tied=False,
        qkv_bias=False,
        qk_norm=True,
        initializer_range=0.02,
    )
    return ModelSpec(**(values | changes))


ALL_RULES = [
    Copy("m", ("h",), shape=("hidden",)),
    Copy("m", ("h",), shape=("head",)),
    Copy("m", ("h",), shape=("hidden", "heads"), dim=1),
    Copy("m", ("h",), shape=("hidden", "ffn"), dim=1),
    Vocabulary("m", ("h",)),
    QKV("m", ("q", "k", "v")),
    QKV("m", ("q", "k", "v"), bias=True),
    GatedMLP("m", ("gate", "up")),
]
SPECS = st.builds(
    lambda tp, groups, per_group, head, ffn, hidden, vocab: (
        tp,
        make_spec(
            # One group is shared between ranks: its queries must split, and so must the rows of key and value.
            num_query_groups=groups if groups == 1 else groups * tp,
            num_heads=per_group * tp * groups,
            head_dim=head * tp,
            ffn_size=ffn * tp,
            hidden_size=hidden,
            vocab_size=vocab,
        ),
    ),
    tp=st.sampled_from([1, 2, 4]),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    head=st.integers(1, 4),
    ffn=st.integers(1, 5),
    hidden=st.integers(1, 7),
    vocab=st.integers(1, 30),
)


def full_tensors(rule, spec, dtype=torch.float32):
    """Distinct values everywhere: a wrong order cannot hide."""
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape in rule.hf_shapes(spec)]


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: f"{type(rule).__name__}{rule.hf}")
@settings(deadline=None)
@given(case=SPECS)
def test_merge_undoes_split(rule, case):
    tp, spec = case
    for dtype in (torch.float32, torch.bfloat16):
        tensors = full_tensors(rule, spec, dtype)
        shards = rule.split(tensors, spec, tp)
        assert len(shards) == tp and len({shard.shape for shard in shards}) == 1
        merged = rule.merge(shards, spec)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(merged, tensors, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("heads", "groups", "tp"), [(4, 2, 1), (4, 2, 2), (4, 1, 2), (4, 4, 4), (6, 2, 2), (4, 1, 4)])
def test_query_key_value_interleave(heads, groups, tp, bias):
    spec, rule = make_spec(num_heads=heads, num_query_groups=groups), QKV("m", ("q", "k", "v"), bias=bias)
    query, key, value = tensors = full_tensors(rule, spec)
    size, per_group = spec.head_dim, heads // groups
    rows = []
    for group in range(groups):
        for head in range(group * per_group, (group + 1) * per_group):
            rows += [query[head * size + i] for i in range(size)]
        rows += [key[group * size + i] for i in range(size)]
        rows += [value[group * size + i] for i in range(size)]
    assert torch.equal(torch.cat(rule.split(tensors, spec, tp)), torch.stack(rows))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_gated_mlp_shards(tp):
    spec, rule = make_spec(), GatedMLP("m", ("gate", "up"))
    gate, up = full_tensors(rule, spec)
    share = spec.ffn_size // tp
    for rank, shard in enumerate(rule.split([gate, up], spec, tp)):
        own = slice(rank * share, (rank + 1) * share)
        assert torch.equal(shard, torch.cat([gate[own], up[own]]))


@pytest.mark.parametrize(("tp", "rows"), [(1, 11), (2, 6), (4, 3)])
def test_vocabulary_padding_is_zero_and_dropped(tp, rows):
    spec, rule = make_spec(), Vocabulary("m", ("h",))
    (tensor,) = full_tensors(rule, spec)
    shards = rule.split([tensor], spec, tp)
    assert [len(shard) for shard in shards] == [rows] * tp
    whole = torch.cat(shards)
    assert torch.equal(whole[:11], tensor) and not whole[11:].any()
    whole[11:] = 7.0  # what training left in the padding is not exported
    assert torch.equal(rule.merge(whole.chunk(tp), spec)[0], tensor)


def test_replicated_and_column_split_copies():
    spec = make_spec()
    norm, projection = ALL_RULES[0], ALL_RULES[2]
    (weight,) = full_tensors(norm, spec)
    assert all(torch.equal(shard, weight) for shard in norm.split([weight], spec, 4))
    (matrix,) = full_tensors(projection, spec)
    assert torch.equal(projection.split([matrix], spec, 4)[2], matrix[:, 12:18])


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_are_those_of_the_real_model(variant):
    model_class, config_class, changes = VARIANTS[variant]
    config = getattr(transformers, config_class)(**(_COMMON | changes))
    with torch.device("meta"):
        model = getattr(transformers, model_class)(config)
    spec = make_spec(
        family=config.model_type,
        hidden_size=48,
        ffn_size=96,
        num_query_groups=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or 12,
        vocab_size=101,
        tied=config.tie_word_embeddings,
    )
    entries = model_entries(spec, pp=1)
    names = list(chain.from_iterable(entry.hf for entry in entries))
    shapes = list(chain.from_iterable(entry.rule.hf_shapes(spec) for entry in entries))
    assert len(set(names)) == len(names)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if spec.tied:
        wanted.pop("lm_head.weight")
    assert dict(zip(names, shapes, strict=True)) == wanted


@pytest.mark.parametrize("family", LAYER_ROWS)
def test_transformer_engine_spellings_are_megatrons(family):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    # The local spec itself says what its layer norms are called when fused into the linear layer that follows.
    renamed = get_gpt_layer_local_spec(normalization="RMSNorm").submodules.sharded_state_dict_keys_map
    assert len(renamed) == 2
    for rule in LAYER_ROWS[family]:
        local = rule.megatron.removeprefix("decoder.layers.{layer}.")
        prefix = next((prefix for prefix in renamed if local.startswith(prefix)), None)
        wanted = prefix and "decoder.layers.{layer}." + local.replace(prefix, renamed[prefix])
        assert rule.te == wanted, local


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_stages_hold_every_layer_once(pp, tied):
    spec = make_spec(tied=tied)
    entries = model_entries(spec, pp)
    whole = model_entries(spec, 1)
    assert [entry.hf for entry in entries] == [entry.hf for entry in whole]
    for entry in entries:
        if entry.layer is not None:
            assert entry.pp_rank == entry.layer // (4 // pp)
            assert f"layers.{entry.layer % (4 // pp)}." in entry.megatron and f"layers.{entry.layer}." in entry.hf[0]
    ends = [entry.pp_rank for entry in entries if entry.layer is None]
    assert ends == ([0, pp - 1] if tied else [0, pp - 1, pp - 1])
    head = tied_head_entry(spec, pp)
    if tied and pp > 1:
        assert (head.megatron, head.hf, head.pp_rank) == ("output_layer.weight", EMBEDDING.hf, pp - 1)
    else:
        assert head is None
