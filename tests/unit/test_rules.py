"""The mapping's rules against explicit loops, and its names against the real models'."""

from __future__ import annotations

from itertools import chain, permutations
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_apo.config import ParallelConfig
from megatron_apo.model.build import build_model
from megatron_apo.model.hf_config import ModelSpec, read_hf_config
from megatron_apo.model.precision import Precision
from megatron_apo.parallel.groups import alone
from megatron_apo.weights.families import EMBEDDING, EXPERT_ROWS, layer_rows, model_entries, tied_head_entry
from megatron_apo.weights.rules import QKV, Copy, GatedMLP, Piece, Vocabulary
from tests.models import VARIANTS, make_model
from tests.specs import model_spec


def make_spec(**changes) -> ModelSpec:
    sizes = dict(num_layers=4, hidden_size=8, ffn_size=8, num_heads=4, num_query_groups=2, head_dim=6, vocab_size=11)
    return model_spec(**(dict(family="qwen3", qk_norm=True) | sizes | changes))


ALL_RULES = [
    Copy("m", ("h",), shape=("hidden",)),
    Copy("m", ("h",), shape=("head",)),
    Copy("m", ("h",), shape=("hidden", "heads"), dim=1),
    Copy("m", ("h",), shape=("hidden", "ffn"), dim=1),
    Vocabulary("m", ("h",)),
    QKV("m", ("q", "k", "v")),
    QKV("m", ("q", "k", "v"), bias=True),
    GatedMLP("m", ("gate", "up")),
    GatedMLP("m", ("gate", "up"), shape=("ffn",)),
    GatedMLP("m", ("gate", "up"), shape=("expert_ffn", "hidden")),
    Copy("m", ("h",), shape=("hidden", "expert_ffn"), dim=1),
    Copy("m", ("h",), shape=("experts", "hidden")),
]
SPECS = st.builds(
    lambda tp, groups, shared, per_group, head, ffn, hidden, vocab: (
        tp,
        make_spec(
            # A group may be shared between ranks: its queries must split, and so must the rows of key and value.
            num_query_groups=groups if shared else groups * tp,
            num_heads=per_group * tp * groups,
            head_dim=head * tp,
            ffn_size=ffn * tp,
            expert_ffn_size=(ffn + 1) * tp,
            num_experts=groups,
            hidden_size=hidden,
            vocab_size=vocab,
        ),
    ),
    tp=st.sampled_from([1, 2, 4, 8]),
    groups=st.integers(1, 3),
    shared=st.booleans(),
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


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: f"{type(rule).__name__}{rule.hf}")
@settings(deadline=None)
@given(case=SPECS)
def test_pieces_put_together_what_was_split(rule, case):
    """Bitwise, each element once, whatever is in the padding."""
    tp, spec = case
    tensors = full_tensors(rule, spec)
    found = [torch.full_like(tensor, torch.nan) for tensor in tensors]
    times = [torch.zeros_like(tensor) for tensor in tensors]
    for tp_rank, shard in enumerate(rule.split(tensors, spec, tp)):
        if isinstance(rule, Vocabulary):
            shard = shard.where(tp_rank * len(shard) + torch.arange(len(shard))[:, None] < spec.vocab_size, 7.0)
        pieces = rule.pieces(spec, tp, tp_rank)
        for piece in pieces:
            target = found[piece.hf][piece.full]
            assert (
                target.shape
                == shard[piece.shard].shape
                == tuple(one.stop - one.start for one in piece.full) + tuple(target.shape[len(piece.full) :])
            )
            target.copy_(shard[piece.shard])
            times[piece.hf][piece.full] += 1
        assert not any(follow_each_other(one, other) for one, other in permutations(pieces, 2)), "not merged"
    assert all(map(torch.equal, found, tensors)) and all(bool((count == 1).all()) for count in times)


def follow_each_other(one: Piece, other: Piece) -> bool:
    """In the full tensor and in the shard alike, by the first dimension."""
    pairs = ((one.full[0], other.full[0]), (one.shard[0], other.shard[0]))
    return one.hf == other.hf and all(first.stop == second.start for first, second in pairs)


def test_pieces_are_worked_out_once_for_all_layers():
    spec = make_spec()
    rows = [entry.rule for entry in model_entries(spec, 1) if entry.megatron.endswith("linear_qkv.weight")]
    assert len(rows) == spec.num_layers and len({id(rule.pieces(spec, 2, 1)) for rule in rows}) == 1


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


@pytest.mark.parametrize("shape", [("ffn", "hidden"), ("ffn",)])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_gated_mlp_shards(tp, shape):
    spec, rule = make_spec(), GatedMLP("m", ("gate", "up"), shape=shape)
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
def test_names_and_shapes_are_those_of_the_folder(variant, tmp_path):
    folder = make_model(variant, tmp_path)
    spec = read_hf_config(folder)
    entries = model_entries(spec, pp=1)
    names = list(chain.from_iterable(entry.hf for entry in entries))
    shapes = list(chain.from_iterable(entry.rule.hf_shapes(spec) for entry in entries))
    assert len(set(names)) == len(names)
    wanted = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert dict(zip(names, shapes, strict=True)) == wanted
    assert spec.num_weights == sum(prod(shape) for shape in shapes if len(shape) == 2)
    experts = [shape for name, shape in wanted.items() if ".experts." in name]
    assert spec.num_expert_weights == sum(map(prod, experts))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_on_the_meta_device_has_exactly_the_rows(variant, tmp_path):
    """Names, and shapes as the rules split them; no parameter takes memory."""
    spec = read_hf_config(make_model(variant, tmp_path))
    with alone() as topology, torch.device("meta"):
        (model,) = build_model(spec, ParallelConfig(), topology, Precision("bf16"))
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    expected = {}
    for entry in model_entries(spec, pp=1):
        tensors = [torch.empty(shape, device="meta") for shape in entry.rule.hf_shapes(spec)]
        expected[entry.megatron] = entry.rule.split(tensors, spec, 1)[0].shape
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == expected


@pytest.mark.parametrize("num_experts", [0, 4])
def test_transformer_engine_spellings_are_megatrons(num_experts):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    # The local spec itself says what its layer norms are called when fused into the linear layer that follows.
    renamed = dict(get_gpt_layer_local_spec(normalization="RMSNorm").submodules.sharded_state_dict_keys_map)
    assert len(renamed) == 2
    if num_experts:  # the norm before experts is fused into nothing (moe_module_specs.py, `fuse_pre_mlp_layernorm`)
        renamed.pop("pre_mlp_layernorm.")
    for rule in layer_rows(make_spec(num_experts=num_experts, qkv_bias=True, output_bias=True, mlp_bias=True)):
        local = rule.megatron.removeprefix("decoder.layers.{layer}.")
        prefix = next((prefix for prefix in renamed if local.startswith(prefix)), None)
        wanted = prefix and "decoder.layers.{layer}." + local.replace(prefix, renamed[prefix])
        assert rule.te == wanted, local
    # TEGroupedLinear numbers the weights of one module (extensions/transformer_engine.py).
    assert [rule.te for rule in EXPERT_ROWS] == [
        f"decoder.layers.{{layer}}.mlp.experts.linear_fc{n}.weight{{expert}}" for n in (1, 2)
    ]


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_expert_ranks_hold_every_expert_once(ep):
    spec = make_spec(family="qwen3_moe", num_experts=4, experts_per_token=2, expert_ffn_size=6)
    entries = model_entries(spec, pp=2, ep=ep)
    assert [entry.hf for entry in entries] == [entry.hf for entry in model_entries(spec, 1)]
    experts = [entry for entry in entries if ".experts." in entry.hf[0]]
    assert len(experts) == 4 * 4 * 2
    for entry in experts:
        expert = int(entry.hf[0].split(".experts.")[1].split(".")[0])
        per_rank = 4 // ep
        assert entry.ep_rank == expert // per_rank
        assert f"local_experts.{expert % per_rank}." in entry.megatron and entry.te.endswith(
            f"weight{expert % per_rank}"
        )
    assert all(entry.ep_rank is None for entry in entries if entry not in experts)


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_stages_hold_every_layer_once(pp, vpp, tied):
    spec = make_spec(tied=tied)
    entries = model_entries(spec, pp, vpp=vpp)
    whole = model_entries(spec, 1)
    assert [entry.hf for entry in entries] == [entry.hf for entry in whole]
    for entry in entries:
        if entry.layer is not None:
            per_chunk = 4 // (pp * vpp)
            assert entry.chunk * pp + entry.pp_rank == entry.layer // per_chunk
            assert f"layers.{entry.layer % per_chunk}." in entry.megatron and f"layers.{entry.layer}." in entry.hf[0]
    ends = [(entry.pp_rank, entry.chunk) for entry in entries if entry.layer is None]
    last = (pp - 1, vpp - 1)
    assert ends == ([(0, 0), last] if tied else [(0, 0), last, last])
    head = tied_head_entry(spec, pp, vpp)
    if tied and pp > 1:
        assert (head.megatron, head.hf) == ("output_layer.weight", EMBEDDING.hf)
        assert (head.pp_rank, head.chunk) == last
    else:
        assert head is None
