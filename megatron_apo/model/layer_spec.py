"""Which modules the layers are made of: Transformer Engine's, or Megatron-Core's own around our attention.

Transformer Engine fuses the norm before attention and before a dense feed-forward part into the linear layer that
follows (`te` names in `weights/families.py`), and holds a rank's experts in one grouped layer.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_apo.config import RecipeError
from megatron_apo.model.attention import SDPAttention
from megatron_apo.model.hf_config import ModelSpec
from megatron_apo.model.precision import Layers


def block_spec(spec: ModelSpec, config: TransformerConfig, layers: Layers) -> TransformerBlockSubmodules:
    """The layers of one model chunk, and the norm behind the last of them.

    Given a layer alone, Megatron-Core takes that norm from whatever is installed: with Apex one that has no RMSNorm
    (transformer_block.py, `LayerNormImpl`).
    """
    chunks = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
    if layers == "te":
        layer, norm = _te_layer(spec)
    else:
        layer, norm = _local_layer(spec), WrappedTorchNorm
    submodules = layer.submodules
    # `TransformerConfig` has one switch for the bias of all linear layers, so that it is asked for here, one by one.
    if spec.output_bias:
        attention = submodules.self_attention.submodules
        attention.linear_proj = _with_bias(attention.linear_proj)
    if spec.mlp_bias:
        mlp = submodules.mlp.submodules
        mlp.linear_fc1, mlp.linear_fc2 = _with_bias(mlp.linear_fc1), _with_bias(mlp.linear_fc2)
    return TransformerBlockSubmodules(layer_specs=[layer] * (config.num_layers // chunks), layer_norm=norm)


def _te_layer(spec: ModelSpec) -> tuple[ModuleSpec, type]:
    if not gpt_layer_specs.HAVE_TE:
        raise RecipeError(
            [
                "model.layers: Transformer Engine is installed here, but cannot be imported (`python -c 'import "
                "transformer_engine.pytorch'` says why); repair it, or use local"
            ]
        )
    layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        num_experts=spec.num_experts or None, moe_grouped_gemm=spec.num_experts > 0, qk_layernorm=spec.qk_norm
    )
    return layer, gpt_layer_specs.TENorm


def _local_layer(spec: ModelSpec) -> ModuleSpec:
    layer = gpt_layer_specs.get_gpt_layer_local_spec(
        num_experts=spec.num_experts or None, qk_layernorm=spec.qk_norm, normalization="RMSNorm"
    )
    layer.submodules.self_attention.submodules.core_attention = SDPAttention
    if spec.num_experts:
        # With experts, Transformer Engine's layers keep this norm apart too; checkpoints name it as it is.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return layer


def _with_bias(linear: type) -> type:
    """`linear`, made with a bias whatever it is told."""

    class WithBias(linear):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, bias: bool, **kwargs: Any):
            super().__init__(*args, bias=True, **kwargs)

    return WithBias
