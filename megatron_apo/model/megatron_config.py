"""A model's architecture, layout and precision as Megatron-Core's `TransformerConfig`."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from megatron_apo.config import ParallelConfig, TrainConfig
from megatron_apo.model.hf_config import ModelSpec, Rope
from megatron_apo.model.precision import Precision, has_fused_gradients, model_arguments
from megatron_apo.model.recompute import recompute_arguments


def transformer_config(
    spec: ModelSpec, parallel: ParallelConfig, precision: Precision, train: TrainConfig | None = None
) -> TransformerConfig:
    """Megatron-Core's configuration of this model. Fusions that change numerics stay off.

    train: says which activations backward computes again instead of keeping them; none: none.
    """
    on_gpu = torch.cuda.is_available() and torch.get_default_device().type != "meta"
    config = TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_query_groups,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,  # one switch for every linear layer; `layer_spec.py` gives a bias to those that have one
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=spec.initializer_range,
        tensor_model_parallel_size=parallel.tp,
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.cp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        # Micro-batches differ in length; Megatron-Core asks for this dispatcher with it even in dense models. Under the
        # interleaved schedule they do not: there stages that first exchange lengths would wait for each other.
        variable_seq_lengths=parallel.pp > 1 and parallel.vpp == 1,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=parallel.ep,
        **(_router_arguments(spec, precision) if spec.num_experts else {}),
        calculate_per_token_loss=True,  # the loss is a sum; gradients are divided by the global count
        **model_arguments(precision),
        **(recompute_arguments(spec, train) if train else {}),
        attention_softmax_in_fp32=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        # In bf16 this sum is the more exact one: products are added to fp32 without being rounded to bf16. It writes
        # `main_grad`, which weights have under Megatron-Core's DDP alone.
        gradient_accumulation_fusion=on_gpu and precision.dtype == "bf16" and has_fused_gradients(),
        persist_layer_norm=False,
        perform_initialization=False,  # weights are loaded, never drawn here
        use_cpu_initialization=not on_gpu,  # also what honours `torch.device("meta")`
        batch_p2p_comm=torch.cuda.is_available(),
    )
    if spec.rope.kind == "yarn":
        _set_yarn(config, spec.rope)
    return config


def _router_arguments(spec: ModelSpec, precision: Precision) -> dict[str, Any]:
    """What makes the layers mixtures of experts, without auxiliary losses."""
    return {
        "num_moe_experts": spec.num_experts,
        "moe_ffn_hidden_size": spec.expert_ffn_size,
        "moe_router_topk": spec.experts_per_token,
        # A softmax over the chosen experts alone adds up to 1; one over all of them, before the choice, does not.
        "moe_router_pre_softmax": not spec.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": precision.layers == "te",
    }


def _set_yarn(config: Any, rope: Rope) -> None:
    """Attributes that Megatron-Core's model and attention look for, beside the fields of its `TransformerConfig`."""
    config.yarn_rotary_scaling_factor = rope.factor
    config.yarn_original_max_position_embeddings = rope.original_max_positions
    config.yarn_beta_fast = rope.beta_fast
    config.yarn_beta_slow = rope.beta_slow
    config.yarn_correction_range_round_to_int = rope.truncate
    # Megatron-Core derives the attention factor, (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1).
    config.yarn_mscale = (rope.attention_factor - 1.0) / (0.1 * math.log(rope.factor))
    config.yarn_mscale_all_dim = 0.0
