"""What backward computes again instead of keeping it: held against a model's layers, and in Megatron-Core's words.

Importing this module is light.
"""

from __future__ import annotations

from typing import Any

from megatron_apo.config import ParallelConfig, TrainConfig
from megatron_apo.model.hf_config import ModelConfigError, ModelSpec
from megatron_apo.model.precision import Layers


def recompute_modules(spec: ModelSpec, layers: Layers) -> list[str]:
    """Values of `train.recompute_modules` that such layers have; the first is the default.

    Norms are parts of Transformer Engine's linear layers, but for the one before a mixture's router; those of local
    layers Megatron-Core recomputes with Transformer Engine's help alone (tensor_parallel/random.py,
    `CheckpointWithoutOutput`). The experts' activation is recomputed in its grouped products only.
    """
    modules = ["moe" if spec.num_experts else "mlp", "core_attn"]
    return [*modules, "moe_act", "layernorm"] if spec.num_experts and layers == "te" else modules


def check_recompute(spec: ModelSpec, parallel: ParallelConfig, train: TrainConfig, layers: Layers) -> None:
    """Raise `ModelConfigError`, one line a problem, where these layers do not have what is to be recomputed."""
    problems = []
    known = recompute_modules(spec, layers)
    if unknown := sorted(set(train.recompute_modules or ()) - set(known)):
        problems.append(
            f"train.recompute_modules: {', '.join(unknown)} is nothing that {spec.family}'s {layers} layers have, or "
            f"have apart; use some of {', '.join(known)}"
        )
    held = spec.num_layers // (parallel.pp * parallel.vpp)
    uniform = train.recompute_method == "uniform"
    if train.recompute == "full" and (held % train.recompute_layers if uniform else train.recompute_layers > held):
        problems.append(
            f"train.recompute_layers: {train.recompute_layers} "
            + (f"does not divide the {held}" if uniform else f"are more than the {held}")
            + f" layers that a model chunk of parallel.pp={parallel.pp} x parallel.vpp={parallel.vpp} has; use "
            + ("a divisor" if uniform else "at most as many")
        )
    if problems:
        raise ModelConfigError("\n".join(problems))


def recompute_arguments(spec: ModelSpec, train: TrainConfig) -> dict[str, Any]:
    """Fields of Megatron-Core's `TransformerConfig`.

    full: only the input of each layer, or of several together, is kept. selective: by default the insides of the
    feed-forward part alone are not. Those are four tensors of the feed-forward size, more than all else of a layer.
    Attention keeps O(s) with either kind of layers, and at 16k tokens is the slowest part to compute twice.
    """
    if train.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": train.recompute_method,
            "recompute_num_layers": train.recompute_layers,
        }
    if train.recompute == "selective":
        modules = train.recompute_modules or recompute_modules(spec, "local")[:1]
        return {"recompute_granularity": "selective", "recompute_modules": list(modules)}
    return {}
