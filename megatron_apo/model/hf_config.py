"""A Hugging Face `config.json`, read into what the trainer needs to know, or refused by name.

`read_hf_config(folder)` -> `ModelSpec`; `transformer_config(spec, ...)` -> Megatron-Core's `TransformerConfig`.
A setting that the Megatron model would not honour is an error, never a silent difference in logits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = ("llama", "qwen2", "qwen3")
# The constants that Megatron-Core 0.16 hard-codes for Llama 3 (rotary_pos_embedding.py, `_apply_scaling`).
_LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# What transformers assumes where a config.json is silent, and the fallbacks below do not.
_QWEN_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
_DEFAULTS = {"llama": {}, "qwen2": _QWEN_DEFAULTS, "qwen3": {"head_dim": 128} | _QWEN_DEFAULTS}

_REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


class ModelConfigError(ValueError):
    """A model folder that is missing, or whose configuration the Megatron model cannot honour."""


@dataclass(frozen=True)
class ModelSpec:
    """The architecture of a decoder-only model, as its Hugging Face configuration states it."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_llama3_factor: float | None  # None: plain RoPE
    tied: bool  # the output layer is the embedding
    qkv_bias: bool
    qk_norm: bool
    initializer_range: float


def read_hf_config(folder: Path) -> ModelSpec:
    """Read `folder/config.json`. Raises `ModelConfigError` with one line per problem."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelConfigError(f"model path {folder}: no config.json there; give a Hugging Face model folder")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ModelConfigError(f"{path}: not JSON ({error})") from None
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ModelConfigError(f"{path}: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    config = _DEFAULTS[family] | config
    if missing := [key for key in _REQUIRED if config.get(key) is None]:
        raise ModelConfigError(f"{path}: {', '.join(missing)}: missing")
    problems = _unsupported(config, family)
    rope_theta, llama3_factor = _rope(config, problems)
    if problems:
        raise ModelConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    num_heads = config["num_attention_heads"]
    return ModelSpec(
        family=family,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_size=config["intermediate_size"],
        num_heads=num_heads,
        num_query_groups=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
        vocab_size=config["vocab_size"],
        max_positions=config.get("max_position_embeddings", 2048),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_llama3_factor=llama3_factor,
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        initializer_range=config.get("initializer_range", 0.02),
    )


def check_layout(spec: ModelSpec, *, tp: int, pp: int) -> None:
    """Raise `ModelConfigError` when the model cannot be split over `tp` x `pp` ranks, with values that can."""
    fits = [size for size in range(1, spec.num_heads + 1) if _tp_fits(spec, size)]
    if tp not in fits:
        raise ModelConfigError(
            f"parallel.tp: {tp} does not fit {spec.num_heads} heads in {spec.num_query_groups} query groups; "
            f"use one of {fits}"
        )
    if spec.num_layers % pp:
        divisors = [size for size in range(1, spec.num_layers + 1) if spec.num_layers % size == 0]
        raise ModelConfigError(f"parallel.pp: {pp} does not divide {spec.num_layers} layers; use one of {divisors}")


def _tp_fits(spec: ModelSpec, tp: int) -> bool:
    groups = spec.num_query_groups
    qkv_rows = (spec.num_heads + 2 * groups) * spec.head_dim
    # Megatron shares a query group between ranks when tp is a multiple of the groups (attention.py).
    groups_fit = (groups % tp == 0 or tp % groups == 0) and qkv_rows % tp == 0
    return spec.num_heads % tp == 0 and groups_fit and spec.ffn_size % tp == 0


def _unsupported(config: dict[str, Any], family: str) -> list[str]:
    problems = []
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {config['hidden_act']!r} is not supported; only silu is")
    if config.get("attention_bias"):
        problems.append("attention_bias true (a bias on the output projection) is not supported")
    if config.get("mlp_bias"):
        problems.append("mlp_bias true is not supported")
    if config.get("use_sliding_window"):
        problems.append("use_sliding_window true is not supported")
    if config.get("attention_dropout"):
        problems.append(f"attention_dropout {config['attention_dropout']} is not supported; log-probs must repeat")
    if config.get("quantization_config"):
        problems.append("quantization_config (quantized weights) is not supported")
    if config.get("pretraining_tp", 1) != 1:
        problems.append(f"pretraining_tp {config['pretraining_tp']} is not supported; only 1 is")
    return problems


def _rope(config: dict[str, Any], problems: list[str]) -> tuple[float, float | None]:
    """(theta, Llama-3 factor or None). transformers 5 writes rope_parameters; 4 wrote rope_theta and rope_scaling."""
    rope = dict(config.get("rope_scaling") or {})
    rope.update(config.get("rope_parameters") or {})
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        problems.append(f"partial_rotary_factor {partial} is not supported; only 1 is")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        problems.append(f"rope type {kind!r} is not supported; supported: default, llama3")
        return theta, None
    for name, value in _LLAMA3_CONSTANTS.items():
        if float(rope.get(name, value)) != value:
            problems.append(f"rope {name} {rope[name]} is not supported; Megatron-Core fixes it at {value:g}")
    if "factor" not in rope:
        problems.append("rope factor is missing; rope type llama3 needs it")
    return theta, float(rope.get("factor", 1.0))


def transformer_config(spec: ModelSpec, *, tp: int, pp: int, dtype: str) -> Any:
    """Megatron-Core's `TransformerConfig` for this model. Fusions that change numerics stay off."""
    import torch
    from megatron.core.transformer import TransformerConfig

    bf16 = dtype == "bf16"
    return TransformerConfig(
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
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=spec.initializer_range,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        # Micro-batches differ in length; Megatron-Core asks for this dispatcher with it even in dense models.
        variable_seq_lengths=pp > 1,
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,  # the loss is a sum; gradients are divided by the global count
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
        bf16=bf16,
        attention_softmax_in_fp32=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        perform_initialization=False,  # weights are loaded, never drawn here
        use_cpu_initialization=not torch.cuda.is_available(),
        batch_p2p_comm=torch.cuda.is_available(),
    )
