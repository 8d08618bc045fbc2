"""A Hugging Face `config.json`, read into what the trainer needs to know, or refused by name.

`read_hf_config(folder)` -> `ModelSpec`; `megatron_config.py` makes Megatron-Core's configuration of that.
A setting that the Megatron model would not honour is an error, never a silent difference in logits.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_apo.config import ParallelConfig, model_config_file

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
# What transformers assumes where a config.json is silent, and the fallbacks below do not.
_QWEN_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": _QWEN_DEFAULTS,
    "qwen3": {"head_dim": 128} | _QWEN_DEFAULTS,
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
}
_REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
# Which families read a bias switch; set for another, transformers and vLLM would each do as they like.
# With attention_bias, qwen3 and qwen3_moe have a bias on the output projection too: see `check_served`.
_READS_BIAS = {
    "attention_bias": ("llama", "qwen3", "qwen3_moe"),
    "mlp_bias": ("llama",),
    "qkv_bias": (),
    "bias": (),
}
# Features of other architectures, by the key that turns them on. Absent, null, false, 0, 1 and empty are off.
_FOREIGN = (
    "attention_multiplier",
    "attn_logit_softcapping",
    "clip_qkv",
    "dual_chunk_attention_config",
    "embedding_multiplier",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "n_shared_experts",
    "num_nextn_predict_layers",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "scale_depth",
    "scale_emb",
    "shared_expert_intermediate_size",
    "use_mrope",
)
# The constants that Megatron-Core 0.16 hard-codes for Llama 3 (rotary_pos_embedding.py, `_apply_scaling`).
_LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
FP8_BLOCK = [128, 128]


class ModelConfigError(ValueError):
    """A model folder that is missing, or whose configuration the Megatron model cannot honour."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of base `theta`. llama3 and yarn stretch it by `factor`; what follows is yarn's."""

    theta: float
    kind: Literal["default", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_positions: int = 0  # of the training before the stretch
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # multiplies sine and cosine
    truncate: bool = True  # round the bounds between stretched and kept dimensions


@dataclass(frozen=True)
class ModelSpec:
    """The architecture of a decoder-only model, as its Hugging Face configuration states it."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int  # of a dense layer; a mixture of experts has none
    num_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope: Rope
    tied: bool  # the output layer is the embedding
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    qk_norm: bool
    initializer_range: float
    num_experts: int = 0  # 0: dense; otherwise every layer is a mixture of experts
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    norm_topk_prob: bool = False  # the weights of a token's experts add up to 1
    fp8_blocks: bool = False  # the folder's linear weights are FP8 with a scale for each 128 x 128 block

    @property
    def num_weights(self) -> int:
        """Numbers in the model's matrices, to which norms and biases add next to nothing."""
        attention = 2 * (self.num_heads + self.num_query_groups) * self.head_dim * self.hidden_size
        feed_forward = self.hidden_size * (self.num_experts or 3 * self.ffn_size)  # of a mixture, the router
        vocabulary = (1 if self.tied else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * (attention + feed_forward) + vocabulary + self.num_expert_weights

    @property
    def num_expert_weights(self) -> int:
        """Those of `num_weights` that expert-parallel ranks share out."""
        return self.num_layers * self.num_experts * 3 * self.expert_ffn_size * self.hidden_size


def read_hf_config(folder: Path) -> ModelSpec:
    """Read `folder/config.json`, or that of a shape. Raises `ModelConfigError` with one line per problem."""
    path = model_config_file(Path(folder))
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
    required = (*_REQUIRED, "num_experts_per_tok", "moe_intermediate_size") if family == "qwen3_moe" else _REQUIRED
    problems = [f"{key}: missing" for key in required if config.get(key) is None]
    problems += _unsupported(config, family)
    rope = _rope(config, problems)
    experts = _experts(config, problems) if family == "qwen3_moe" else {}
    if problems:
        raise ModelConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    num_heads = config["num_attention_heads"]
    attention_bias = bool(config.get("attention_bias"))
    return ModelSpec(
        family=family,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_size=config["intermediate_size"],
        num_heads=num_heads,
        num_query_groups=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
        vocab_size=config["vocab_size"],
        max_positions=_max_positions(config),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope=rope,
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias")),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        initializer_range=config.get("initializer_range", 0.02),
        fp8_blocks=bool(config.get("quantization_config")),
        **experts,
    )


def check_served(spec: ModelSpec) -> None:
    """Raise `ModelConfigError` for a model that vLLM 0.32 would load, and compute otherwise than it is."""
    if spec.output_bias and spec.family.startswith("qwen3"):
        raise ModelConfigError(
            f"attention_bias: vLLM skips {spec.family}'s bias of the output projection without a word, so that such a "
            "model can be converted but not sampled"
        )


def check_layout(spec: ModelSpec, parallel: ParallelConfig) -> None:
    """Raise `ModelConfigError`, one line a problem, when the model cannot be split so, with values that can."""
    problems = []
    tp, pp, vpp, ep = parallel.tp, parallel.pp, parallel.vpp, parallel.ep
    fits = [size for size in range(1, spec.num_heads + 1) if _tp_fits(spec, size)]
    if spec.num_experts and tp > 1 and not parallel.sequence_parallel:
        problems.append(
            f"parallel.tp: {tp}, but Megatron-Core trains a mixture of experts on several tensor ranks under sequence "
            "parallelism only; set parallel.sequence_parallel to true, or use 1, and parallel.ep"
        )
    elif tp not in fits:
        problems.append(
            f"parallel.tp: {tp} does not fit {spec.num_heads} heads in {spec.num_query_groups} query groups; "
            f"use one of {fits}"
        )
    if spec.num_layers % pp:
        problems.append(
            f"parallel.pp: {pp} does not divide {spec.num_layers} layers; use one of {_divisors(spec.num_layers)}"
        )
    elif spec.num_layers % (pp * vpp):
        problems.append(
            f"parallel.vpp: {vpp} x parallel.pp={pp} does not divide {spec.num_layers} layers; use one of "
            f"{_divisors(spec.num_layers // pp)}"
        )
    if not spec.num_experts and ep > 1:
        problems.append(f"parallel.ep: {ep}, but {spec.family} has no experts; use 1")
    elif spec.num_experts % ep:
        problems.append(
            f"parallel.ep: {ep} does not divide {spec.num_experts} experts; use one of {_divisors(spec.num_experts)}"
        )
    if problems:
        raise ModelConfigError("\n".join(problems))


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _tp_fits(spec: ModelSpec, tp: int) -> bool:
    groups = spec.num_query_groups
    qkv_rows = (spec.num_heads + 2 * groups) * spec.head_dim
    # Megatron shares a query group between ranks when tp is a multiple of the groups (attention.py).
    groups_fit = (groups % tp == 0 or tp % groups == 0) and qkv_rows % tp == 0
    return spec.num_heads % tp == 0 and groups_fit and (spec.expert_ffn_size or spec.ffn_size) % tp == 0


def _max_positions(config: dict[str, Any]) -> int:
    return config.get("max_position_embeddings", 2048)


def _unsupported(config: dict[str, Any], family: str) -> list[str]:
    problems = []
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {config['hidden_act']!r} is not supported; only silu is")
    for key, families in _READS_BIAS.items():
        if config.get(key) and family not in families:
            problems.append(f"{key} true is not supported for {family}")
    if config.get("use_sliding_window"):
        problems.append("use_sliding_window true is not supported")
    window = config.get("sliding_window") if family == "mistral" else None
    if window is not None and window < _max_positions(config):
        problems.append(
            f"sliding_window {window} (transformers' default is 4096) is not supported where it is smaller than "
            f"max_position_embeddings {_max_positions(config)}"
        )
    if other := sorted(set(config.get("layer_types") or ()) - {"full_attention"}):
        problems.append(f"layer_types {', '.join(other)} is not supported; only full_attention is")
    if config.get("attention_dropout"):
        problems.append(f"attention_dropout {config['attention_dropout']} is not supported; log-probs must repeat")
    quantization = config.get("quantization_config") or {}
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if quantization and (method, block) != ("fp8", FP8_BLOCK):
        problems.append(
            f"quantization_config {method} with weight_block_size {block} is not supported; only fp8 with "
            f"{FP8_BLOCK} is, and weights that are not quantized"
        )
    if config.get("pretraining_tp", 1) != 1:
        problems.append(f"pretraining_tp {config['pretraining_tp']} is not supported; only 1 is")
    problems += [
        f"{key} {config[key]} is not supported for {family}"
        for key in _FOREIGN
        if config.get(key) not in (None, False, 0, 1, [], {})
    ]
    if family != "qwen3_moe" and (config.get("num_experts") or config.get("num_local_experts")):
        problems.append(f"a mixture of experts is not supported for {family}")
    return problems


def _experts(config: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """What `ModelSpec` says of the experts. transformers 5 writes num_local_experts; 4 wrote num_experts."""
    num_experts = config.get("num_local_experts") or config.get("num_experts") or 128
    per_token, normalize = config["num_experts_per_tok"] or 0, bool(config.get("norm_topk_prob"))
    if config.get("decoder_sparse_step", 1) != 1:
        problems.append(f"decoder_sparse_step {config['decoder_sparse_step']} is not supported; only 1 is")
    if config.get("mlp_only_layers"):
        problems.append(f"mlp_only_layers {config['mlp_only_layers']} is not supported; every layer has experts")
    if per_token > num_experts:
        problems.append(f"num_experts_per_tok {per_token} is more than num_experts {num_experts}")
    if per_token == 1 and normalize:
        problems.append("norm_topk_prob true with num_experts_per_tok 1 is not supported: the router has no gradient")
    return {
        "num_experts": num_experts,
        "experts_per_token": per_token,
        "expert_ffn_size": config["moe_intermediate_size"],
        "norm_topk_prob": normalize,
    }


def _rope(config: dict[str, Any], problems: list[str]) -> Rope:
    """transformers 5 writes rope_parameters; 4 wrote rope_theta and rope_scaling, which wins where both are."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        problems.append(f"partial_rotary_factor {partial} is not supported; only 1 is")
    if nested := sorted(key for key, value in rope.items() if isinstance(value, dict)):
        problems.append(f"rope parameters apart for {', '.join(nested)} are not supported")
    if kind == "default":
        return Rope(theta)
    if kind not in ("llama3", "yarn"):
        problems.append(f"rope type {kind!r} is not supported; supported: default, llama3, yarn")
        return Rope(theta)
    if rope.get("factor") is None:
        problems.append(f"rope factor is missing; rope type {kind} needs it")
        return Rope(theta)
    factor = float(rope["factor"])
    # transformers' order (modeling_rope_utils.py, `standardize_rope_params`); vLLM calls it as well.
    rope["original_max_position_embeddings"] = (
        config.get("original_max_position_embeddings")
        or rope.get("original_max_position_embeddings")
        or _max_positions(config)
    )
    if kind == "yarn":
        return _yarn(rope, theta, factor, problems)
    for name, value in _LLAMA3_CONSTANTS.items():
        if float(rope.get(name, value)) != value:
            problems.append(f"rope {name} {rope[name]} is not supported; Megatron-Core fixes it at {value:g}")
    return Rope(theta, "llama3", factor)


def _yarn(rope: dict[str, Any], theta: float, factor: float, problems: list[str]) -> Rope:
    """YaRN as transformers 5.19 (`_compute_yarn_parameters`) and vLLM 0.32 (yarn_scaling_rope.py) both compute it.

    Neither reads `attn_factor`, which DeepSeek-R1-0528-Qwen3-8B sets for engines that multiply by it: it is ignored
    here as well, so that trainer, transformers and rollouts agree.
    """
    if factor <= 1:
        problems.append(f"rope factor {factor:g} is not supported for yarn; it must be above 1")
        return Rope(theta)

    def concentration(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0

    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        both = mscale and mscale_all_dim
        attention_factor = concentration(mscale) / concentration(mscale_all_dim) if both else concentration(1.0)
    return Rope(
        theta,
        "yarn",
        factor,
        original_max_positions=int(rope["original_max_position_embeddings"]),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        attention_factor=float(attention_factor),
        truncate=bool(rope.get("truncate", True)),
    )
