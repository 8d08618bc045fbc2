"""The rotary position embedding that a Hugging Face `config.json` asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from megatron_apo.model.json_file import cut

# The constants that Megatron-Core 0.16 hard-codes for Llama 3 (rotary_pos_embedding.py, `_apply_scaling`).
_LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


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


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes rope_parameters; 4 wrote rope_theta and rope_scaling, which wins where both are."""
    return dict(config.get("rope_scaling") or config.get("rope_parameters") or {})


def read_rope(config: dict[str, Any], problems: list[str]) -> Rope:
    """The embedding of a config.json whose types fit; what is refused is added to `problems`."""
    rope = rope_settings(config)
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        problems.append(f"partial_rotary_factor {partial} is not supported; only 1 is")
    if nested := sorted(key for key, value in rope.items() if isinstance(value, dict)):
        problems.append(f"rope parameters apart for {cut(', '.join(nested))} are not supported")
    if kind == "default":
        return Rope(theta)
    if kind not in ("llama3", "yarn"):
        problems.append(f"rope type {cut(repr(kind))} is not supported; supported: default, llama3, yarn")
        return Rope(theta)
    if rope.get("factor") is None:
        problems.append(f"rope factor is missing; rope type {kind} needs it")
        return Rope(theta)
    factor = float(rope["factor"])
    # transformers' order (modeling_rope_utils.py, `standardize_rope_params`); vLLM calls it as well.
    rope["original_max_position_embeddings"] = (
        config.get("original_max_position_embeddings")
        or rope.get("original_max_position_embeddings")
        or config["max_position_embeddings"]
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
