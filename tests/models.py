"""Tiny random Hugging Face models of every family, made where a test needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_COMMON = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 101,  # not divisible by TP: the last shard is padded
    "max_position_embeddings": 16384,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,  # transformers gives the padding row no gradient
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN = {  # as DeepSeek-R1-0528-Qwen3-8B has it; the tests' sequences are on both sides of the original length
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "attn_factor": 0.8782488562869419,
}
_YARN_IN_FULL = {"factor": 3.0, "attention_factor": 0.9, "beta_fast": 0.9, "beta_slow": 0.05, "truncate": False}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 12}
# name: (model class, config class, what differs)
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": False}),
    "llama3-tied": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": _LLAMA3_ROPE}),
    "llama-biases": ("LlamaForCausalLM", "LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-mlp-bias-yarn": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"mlp_bias": True, "num_key_value_heads": 4, "head_dim": 16, "rope_parameters": _YARN | _YARN_IN_FULL},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {"tie_word_embeddings": False}),
    "qwen2-tied-one-group": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {"tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"tie_word_embeddings": False, "head_dim": 20}),
    "qwen3-attention-bias": ("Qwen3ForCausalLM", "Qwen3Config", {"attention_bias": True, "head_dim": 12}),
    "qwen3-tied": ("Qwen3ForCausalLM", "Qwen3Config", {"tie_word_embeddings": True, "head_dim": 12}),
    "qwen3-yarn": ("Qwen3ForCausalLM", "Qwen3Config", {"rope_parameters": _YARN, "head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _EXPERTS | {"norm_topk_prob": True}),
    "qwen3_moe-tied-plain": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _EXPERTS | {"norm_topk_prob": False, "tie_word_embeddings": True, "attention_bias": True},
    ),
}
EXPERTS = [name for name in VARIANTS if "moe" in name]


def make_model(name: str, folder: Path, seed: int = 0) -> Path:
    """Save a random fp32 model of variant `name` under `folder`; returns its path."""
    model_class, config_class, changes = VARIANTS[name]
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**(_COMMON | changes)))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start constant, which would hide a swapped one
            parameter.add_(torch.randn_like(parameter) * 0.05)
    path = folder / name
    model.save_pretrained(path)
    return path


def as_saved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's tensors by their names in the folder: transformers 5 holds a layer's experts as one, [experts, ..]."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                prefix = name.replace("gate_up_proj", str(expert))
                found |= {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                found[name.replace("down_proj", f"{expert}.down_proj.weight")] = down
        else:
            found[name] = tensor
    return found


def hf_log_probs(
    path: Path,
    prompts: list[list[int]],
    responses: list[list[int]],
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """Log-probs of each response's tokens by transformers in `dtype`, one sequence at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    found = []
    with torch.no_grad():
        for prompt, response in zip(prompts, responses, strict=True):
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
            found.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1))
    return found
