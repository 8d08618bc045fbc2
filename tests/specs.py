"""A small model's shape, for tests that build no model."""

from __future__ import annotations

from typing import Any

from megatron_apo.model.hf_config import ModelSpec, Rope


def model_spec(**changes: Any) -> ModelSpec:
    """Dense, untied, without biases; `changes` are fields of `ModelSpec`, the sizes among them."""
    values: dict[str, Any] = {
        "max_positions": 64,
        "norm_eps": 1e-6,
        "rope": Rope(1e4),
        "tied": False,
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "initializer_range": 0.02,
    }
    return ModelSpec(**(values | changes))
