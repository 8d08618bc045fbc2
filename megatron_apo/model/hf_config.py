"""A Hugging Face `config.json`, read into what the trainer needs to know, or refused by name.

`read_hf_config(folder)` -> `ModelSpec`; `megatron_config.py` makes Megatron-Core's configuration of that.
A setting that the Megatron model would not honour is an error, never a silent difference in logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_apo.config import ParallelConfig, model_config_file
from megatron_apo.model.config_types import MAX_EXPERTS_IN_ALL, ROPE, SETTINGS, wrong_types
from megatron_apo.model.json_file import cut, read_object
from megatron_apo.model.rope import Rope, read_rope, rope_settings

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
_COMMON_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "initializer_range": 0.02}
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
FP8_BLOCK = [128, 128]


class ModelConfigError(ValueError):
    """A model folder that is missing, or whose configuration the Megatron model cannot honour."""


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
    head: Literal["vocabulary", "value"] = "vocabulary"  # what is behind the final norm: an output layer, or one row

    @property
    def num_weights(self) -> int:
        """Numbers in the model's matrices, to which norms and biases add next to nothing."""
        attention = 2 * (self.num_heads + self.num_query_groups) * self.head_dim * self.hidden_size
        feed_forward = self.hidden_size * (self.num_experts or 3 * self.ffn_size)  # of a mixture, the router
        embedding = self.vocab_size * self.hidden_size
        head = self.hidden_size if self.head == "value" else 0 if self.tied else embedding
        return self.num_layers * (attention + feed_forward) + embedding + head + self.num_expert_weights

    @property
    def num_expert_weights(self) -> int:
        """Those of `num_weights` that expert-parallel ranks share out."""
        return self.num_layers * self.num_experts * 3 * self.expert_ffn_size * self.hidden_size

    def as_critic(self) -> ModelSpec:
        """The same layers under a value head. There is no output layer, with which an embedding could be tied."""
        return replace(self, head="value", tied=False)


def read_hf_config(folder: Path) -> ModelSpec:
    """Read `folder/config.json`, or that of a shape. Raises `ModelConfigError` with one line per problem.

    Settings that are of a wrong type are told before those that are not supported."""
    path = model_config_file(Path(folder))
    if not path.is_file():
        raise ModelConfigError(f"model path {folder}: no config.json there; give a Hugging Face model folder")
    try:
        config = read_object(path)
    except ValueError as error:
        raise ModelConfigError(str(error)) from None
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ModelConfigError(
            f"{path}: model_type {cut(repr(family))} is not supported; supported: {', '.join(FAMILIES)}"
        )
    config = _COMMON_DEFAULTS | _DEFAULTS[family] | config
    required = (*_REQUIRED, "num_experts_per_tok", "moe_intermediate_size") if family == "qwen3_moe" else _REQUIRED
    missing = [f"{key}: missing" for key in required if config.get(key) is None]
    wrong = wrong_types(config, SETTINGS)
    if not wrong:
        wrong = wrong_types(rope_settings(config), ROPE, "rope ")
    _refuse(path, missing + wrong if wrong else [])
    problems = missing + _unsupported(config, family)
    rope = read_rope(config, problems)
    if not missing:
        problems += _inconsistent(config)
    experts = _experts(config, problems) if family == "qwen3_moe" and not missing else {}
    _refuse(path, problems)
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
        max_positions=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        rope=rope,
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias")),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        initializer_range=config["initializer_range"],
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


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        raise ModelConfigError("\n".join(f"{path}: {problem}" for problem in problems))


def _inconsistent(config: dict[str, Any]) -> list[str]:
    """Sizes that do not go together."""
    hidden_size, heads = config["hidden_size"], config["num_attention_heads"]
    groups, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim")
    if heads % groups:
        return [f"num_key_value_heads: {groups} does not divide num_attention_heads {heads}; correct it"]
    if head_dim is None and hidden_size % heads:
        return [f"num_attention_heads: {heads} does not divide hidden_size {hidden_size}; give head_dim"]
    if (head_dim or hidden_size // heads) % 2:
        return [f"head_dim: {head_dim or hidden_size // heads} is odd, and rotary embeddings take pairs; correct it"]
    return []


def _unsupported(config: dict[str, Any], family: str) -> list[str]:
    problems = []
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {cut(repr(config['hidden_act']))} is not supported; only silu is")
    for key, families in _READS_BIAS.items():
        if config.get(key) and family not in families:
            problems.append(f"{key} true is not supported for {family}")
    if config.get("use_sliding_window"):
        problems.append("use_sliding_window true is not supported")
    window = config.get("sliding_window") if family == "mistral" else None
    longest = config["max_position_embeddings"]
    if window is not None and window < longest:
        problems.append(
            f"sliding_window {window} (transformers' default is 4096) is not supported where it is smaller than "
            f"max_position_embeddings {longest}"
        )
    if other := sorted(set(config.get("layer_types") or ()) - {"full_attention"}):
        problems.append(f"layer_types {cut(', '.join(other))} is not supported; only full_attention is")
    if config.get("attention_dropout"):
        problems.append(f"attention_dropout {config['attention_dropout']} is not supported; log-probs must repeat")
    quantization = config.get("quantization_config") or {}
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if quantization and (method, block) != ("fp8", FP8_BLOCK):
        problems.append(
            f"quantization_config {cut(method)} with weight_block_size {cut(block)} is not supported; only fp8 with "
            f"{FP8_BLOCK} is, and weights that are not quantized"
        )
    if config.get("pretraining_tp", 1) != 1:
        problems.append(f"pretraining_tp {config['pretraining_tp']} is not supported; only 1 is")
    problems += [
        f"{key} {cut(repr(config[key]))} is not supported for {family}"
        for key in _FOREIGN
        if config.get(key) not in (None, False, 0, 1, [], {})
    ]
    problems += [
        f"{key} {config[key]}: a mixture of experts is not supported for {family}"
        for key in ("num_experts", "num_local_experts")
        if family != "qwen3_moe" and config.get(key)
    ]
    return problems


def _experts(config: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """What `ModelSpec` says of the experts. transformers 5 writes num_local_experts; 4 wrote num_experts."""
    named = [config[key] for key in ("num_local_experts", "num_experts") if config.get(key) is not None]
    num_experts = named[0] if named else 128
    per_token, normalize = config["num_experts_per_tok"], bool(config.get("norm_topk_prob"))
    if num_experts * config["num_hidden_layers"] > MAX_EXPERTS_IN_ALL:
        problems.append(
            f"num_experts: {num_experts} in each of {config['num_hidden_layers']} layers are more than the "
            f"{MAX_EXPERTS_IN_ALL} in all that are supported"
        )
    if config.get("decoder_sparse_step", 1) != 1:
        problems.append(f"decoder_sparse_step {config['decoder_sparse_step']} is not supported; only 1 is")
    if config.get("mlp_only_layers"):
        problems.append(f"mlp_only_layers {cut(config['mlp_only_layers'])} is not supported; every layer has experts")
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
