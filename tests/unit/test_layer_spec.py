"""What the layers are made of: Transformer Engine's modules in their places, each bias where the model has it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megatron_apo.config import ParallelConfig, RecipeError
from megatron_apo.model.attention import SDPAttention
from megatron_apo.model.layer_spec import block_spec
from megatron_apo.model.megatron_config import transformer_config
from megatron_apo.model.precision import Precision
from tests.unit.test_precision import EXPERTS, SPEC

BIASED = replace(SPEC, family="llama", output_bias=True, mlp_bias=True)


class Linear:
    """Stands for a linear layer: it tells whether it was given a bias."""

    def __init__(self, *sizes: int, bias: bool, skip_bias_add: bool):
        self.bias = bias


class FusedLinear(Linear):
    pass


class RowLinear(Linear):
    pass


class Attention:
    pass


class Norm:
    pass


class GroupedExperts:
    pass


class Provider:
    """Stands for Megatron-Core's `TESpecProvider`, which cannot be had without Transformer Engine."""

    def fuse_layernorm_and_linear(self):
        return True

    def column_parallel_layer_norm_linear(self):
        return FusedLinear

    def column_parallel_linear(self):
        return Linear

    def row_parallel_linear(self):
        return RowLinear

    def layer_norm(self, rms_norm=False, for_qk=False):
        return Norm

    def core_attention(self):
        return Attention

    def activation_func(self):
        return None

    def grouped_mlp_modules(self, moe_use_grouped_gemm, moe_use_legacy_grouped_gemm):
        assert moe_use_grouped_gemm and not moe_use_legacy_grouped_gemm
        return GroupedExperts, MLPSubmodules(linear_fc1=Linear, linear_fc2=RowLinear)


@pytest.fixture
def te(monkeypatch):
    monkeypatch.setattr(gpt_layer_specs, "HAVE_TE", True)
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", Provider, raising=False)
    monkeypatch.setattr(gpt_layer_specs, "TENorm", Norm, raising=False)


def block(spec, layers, parallel=None):
    precision = Precision("bf16", layers=layers)
    return block_spec(spec, transformer_config(spec, parallel or ParallelConfig(), precision), layers)


def has_bias(linear: type) -> bool:
    return linear(8, 8, bias=False, skip_bias_add=True).bias


def test_transformer_engines_layer(te):
    made = block(SPEC, "te")
    layer = made.layer_specs[0].submodules
    attention, mlp = layer.self_attention.submodules, layer.mlp.submodules
    assert (made.layer_norm, layer.input_layernorm, layer.pre_mlp_layernorm) == (Norm, IdentityOp, IdentityOp)
    assert (attention.linear_qkv, attention.linear_proj) == (FusedLinear, RowLinear)
    assert attention.core_attention is Attention
    assert (attention.q_layernorm, attention.k_layernorm) == (Norm, Norm)
    assert (mlp.linear_fc1, mlp.linear_fc2) == (FusedLinear, RowLinear)
    plain = block(replace(SPEC, qk_norm=False), "te").layer_specs[0].submodules.self_attention.submodules
    assert (plain.q_layernorm, plain.k_layernorm) == (IdentityOp, IdentityOp)


def test_transformer_engines_experts(te):
    layer = block(EXPERTS, "te").layer_specs[0].submodules
    assert layer.pre_mlp_layernorm is Norm  # nothing to fuse it into: the router reads its output as well
    assert layer.mlp.submodules.experts.module is GroupedExperts


def test_biases_of_transformer_engines_layer(te):
    layer = block(BIASED, "te").layer_specs[0].submodules
    mlp, projection = layer.mlp.submodules, layer.self_attention.submodules.linear_proj
    for linear, kind in ((projection, RowLinear), (mlp.linear_fc1, FusedLinear), (mlp.linear_fc2, RowLinear)):
        assert issubclass(linear, kind) and has_bias(linear)
    assert not has_bias(layer.self_attention.submodules.linear_qkv)  # `add_qkv_bias` is its switch
    (only,) = block(replace(SPEC, output_bias=True), "te").layer_specs[:1]
    assert has_bias(only.submodules.self_attention.submodules.linear_proj)
    assert not has_bias(only.submodules.mlp.submodules.linear_fc2)


def test_local_layers():
    made = block(BIASED, "local")
    layer = made.layer_specs[0].submodules
    attention, mlp = layer.self_attention.submodules, layer.mlp.submodules
    assert (made.layer_norm, layer.input_layernorm) == (WrappedTorchNorm, WrappedTorchNorm)
    assert attention.core_attention is SDPAttention
    assert issubclass(attention.linear_proj, RowParallelLinear) and issubclass(mlp.linear_fc1, ColumnParallelLinear)


@pytest.mark.parametrize(("pp", "vpp", "layers"), [(1, 1, 8), (2, 1, 4), (2, 2, 2), (4, 2, 1)])
def test_a_chunk_has_its_share_of_the_layers(pp, vpp, layers):
    assert len(block(SPEC, "local", ParallelConfig(pp=pp, vpp=vpp)).layer_specs) == layers


def test_a_transformer_engine_that_does_not_load_is_named(monkeypatch):
    monkeypatch.setattr(gpt_layer_specs, "HAVE_TE", False)
    with pytest.raises(RecipeError, match="^model.layers: .*cannot be imported.*; repair it, or use local$"):
        block(SPEC, "te")
