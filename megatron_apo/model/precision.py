"""What a model computes in: fp32, bf16 with fp32 master weights and gradients, or FP8 through Transformer Engine.

`Precision.of` settles it for this machine, and the functions below say it to Megatron-Core 0.16: its model
(`model_arguments`), its DDP (`ddp_arguments`) and its optimizer (`optimizer_arguments`). Policy and reference are built
with one `Precision`, since the log-ratio of a token is a small difference of large numbers.

FP8 covers the products of linear layers with their inputs, each by the scales of the tensors at hand; attention, norms,
residuals, embedding and head stay bf16. Importing this module is light.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from megatron_apo.config import FP8Config, ModelConfig, OptimizerConfig, ParallelConfig, RecipeError
from megatron_apo.model.hf_config import ModelConfigError, ModelSpec
from megatron_apo.runtime.gpus import Capability, visible_gpus

if TYPE_CHECKING:
    from torch import Tensor

# Of Apex only this extension matters. Transformer Engine's layers have a fused gradient of their own, but Megatron-Core
# has one switch, under which its output layer asks for Apex's (tensor_parallel/layers.py): Apex decides for both.
APEX_EXTENSION = "fused_weight_gradient_mlp_cuda"
# What shows whether an installed package loads: each has a library that was built for one version of torch.
_IMPORTS = {"transformer_engine": "transformer_engine.pytorch", APEX_EXTENSION: f"torch, {APEX_EXTENSION}"}

Layers = Literal["te", "local"]

# What Transformer Engine takes for each recipe where it is not told (common/recipe/__init__.py).
_FORMAT = {"tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
# From the first capability to below the second (pytorch/quantization.py, `check_fp8_support` and its like).
_NO_END = (1000, 0)
_HARDWARE: dict[str, tuple[Capability, Capability, str]] = {
    "tensorwise": ((8, 9), _NO_END, "Ada or later"),
    "blockwise": ((9, 0), _NO_END, "Hopper or later"),
    "mxfp8": ((10, 0), (12, 0), "Blackwell (10.x)"),
}
# The first Transformer Engine with which Megatron-Core has a recipe (fp8_utils.py, `get_fp8_recipe`), and the first
# whose Adam does not copy both moments to fp32 at every step, for all parameters at once (optimizers/fused_adam.py).
_RECIPE_SINCE = {"tensorwise": (2, 2), "blockwise": (2, 3), "mxfp8": (2, 1)}
_MOMENTS_SINCE = (2, 13)


@dataclass(frozen=True)
class Precision:
    """How a model computes, on the layers that were chosen for it. The default is what converters and checks use."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    fp8: FP8Config | None = None
    layers: Layers = "local"

    @classmethod
    def of(cls, model: ModelConfig, parallel: ParallelConfig) -> Precision:
        """As the recipe asks, on this machine. Raises `RecipeError` where that cannot be."""
        return cls(model.dtype, model.fp8, layer_kind(model, parallel, min(visible_gpus(), default=None)))

    @property
    def log_ratio_tolerance(self) -> float:
        """How far log-probs by the same weights may differ between a pass with gradient and one without, nats a token.

        Our attention is one kernel for both. Transformer Engine asks cuDNN for a plan for training or for inference
        (`is_training` in fused_attn_fwd), which may add up in another order: then outputs differ by roundings. Both
        numbers are estimates, which no GPU has confirmed; where one is too small, the run says so at its first step.
        """
        if self.layers == "local":
            return 0.0
        return 0.5 if self.fp8 else 0.1


def layer_kind(
    model: ModelConfig, parallel: ParallelConfig, capability: Capability | None, *, elsewhere: bool = False
) -> Layers:
    """Transformer Engine's layers or Megatron-Core's own, on a GPU of `capability` (None: there is none).

    elsewhere: the GPU is another machine's, which counts as one that has Transformer Engine, new enough for anything.

    Raises `RecipeError`, one line a problem, where the recipe needs Transformer Engine's and they cannot run, or an FP8
    recipe that the GPU does not have.
    """
    missing = _missing(capability, elsewhere)
    needs = []
    if model.layers == "te":
        needs.append("model.layers: te needs Transformer Engine on a GPU, and {}; use auto or local")
    if model.fp8:
        needs.append("model.fp8: FP8 needs Transformer Engine on a GPU, and {}; use model.fp8=null")
    if parallel.sequence_parallel:
        needs.append("parallel.sequence_parallel: true needs Transformer Engine on a GPU, and {}; use false")
    if missing and needs:
        raise RecipeError([need.format(missing) for need in needs])
    if model.fp8 and capability and model.fp8.recipe not in (found := fp8_recipes(capability, elsewhere=elsewhere)):
        first, end, hardware = _HARDWARE[model.fp8.recipe]
        needs_te = _too_old(_RECIPE_SINCE[model.fp8.recipe]) if first <= capability < end else None
        needed = needs_te or f"{hardware}, and the GPU here has capability {capability[0]}.{capability[1]}"
        raise RecipeError(
            [f"model.fp8.recipe: {model.fp8.recipe} needs {needed}; use {' or '.join(found) or 'model.fp8=null'}"]
        )
    return "local" if missing or model.layers == "local" or model.dtype == "fp32" else "te"


def fp8_recipes(capability: Capability, *, elsewhere: bool = False) -> list[str]:
    """Values of `model.fp8.recipe` that such a GPU computes in, with the Transformer Engine that is here (elsewhere:
    with any)."""
    return [
        name
        for name, (first, end, _) in _HARDWARE.items()
        if first <= capability < end and (elsewhere or not _too_old(_RECIPE_SINCE[name]))
    ]


def has_transformer_engine() -> bool:
    """Whether it is installed and can be loaded: one built for another torch cannot."""
    return _has_package("transformer_engine") and load_error("transformer_engine") is None


def load_error(package: str) -> str | None:
    """Why Transformer Engine or Apex's extension, which is installed, cannot be loaded; None where it can."""
    return _import_error(_IMPORTS[package]) if _has_package(package) else None


def _has_package(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@cache
def _import_error(modules: str) -> str | None:
    """Last line of what importing them here says; in a process of its own, which a broken library may end."""
    found = subprocess.run([sys.executable, "-c", f"import {modules}"], capture_output=True, text=True)
    if not found.returncode:
        return None
    return next(reversed(found.stderr.strip().splitlines()), f"status {found.returncode}")


def has_fused_gradients() -> bool:
    """Whether NVIDIA's Apex was built with the extension that adds a layer's gradient to fp32 as it is computed.

    It is never required: one that was built for another torch counts as none.
    """
    return _has_package(APEX_EXTENSION) and load_error(APEX_EXTENSION) is None


def _too_old(since: tuple[int, int]) -> str | None:
    """That Transformer Engine `since` is needed, where an older one is installed."""
    here = _te_version()
    if here is None or here >= since:
        return None
    return f"Transformer Engine {since[0]}.{since[1]} or later, and here is {here[0]}.{here[1]}"


def _te_version() -> tuple[int, int] | None:
    """(2, 13) for Transformer Engine 2.13.0, or for a build on the way to it; None where nothing says."""
    try:
        found = re.match(r"(\d+)\.(\d+)", metadata.version("transformer-engine"))
    except metadata.PackageNotFoundError:
        return None
    return (int(found[1]), int(found[2])) if found else None


def optimizer_problems(config: OptimizerConfig, capability: Capability | None, *, elsewhere: bool = False) -> list[str]:
    """Where a GPU of `capability` (None: there is none) cannot keep the optimizer as wanted, one line a setting.
    elsewhere: as in `layer_kind`.

    Both settings are Megatron-Core's precision-aware optimizer, which compares Transformer Engine's version with what
    it needs (optimizer_config.py, `__post_init__`): a TypeError where there is none.
    """
    settings = {"cpu_offload": (config.cpu_offload, 0), "moments": (config.moments, "fp32")}
    missing = _missing(capability, elsewhere)
    if not missing and not elsewhere and config.moments == "bf16" and (needed := _too_old(_MOMENTS_SINCE)):
        return [f"optimizer.moments: bf16 needs {needed}, whose Adam copies both moments to fp32; use fp32"]
    return [
        f"optimizer.{key}: {value} needs Transformer Engine on a GPU, and {missing}; use {usual}"
        for key, (value, usual) in settings.items()
        if missing and value != usual
    ]


def _missing(capability: Capability | None, elsewhere: bool) -> str | None:
    """What keeps Transformer Engine from running on a GPU of `capability`."""
    if capability is None:
        return "here is no GPU"
    if elsewhere or has_transformer_engine():
        return None
    if error := load_error("transformer_engine"):
        return f"importing it fails here ({error})"
    return "it is not installed here"


def check_precision(spec: ModelSpec, parallel: ParallelConfig, fp8: FP8Config | None) -> None:
    """Raise `ModelConfigError`, one line a problem, when a model of this shape and layout cannot compute in `fp8`."""
    if fp8 is None:
        return
    multiple = fp8.multiple
    sizes = {
        "hidden_size": spec.hidden_size,
        "num_attention_heads x head_dim": spec.num_heads * spec.head_dim // parallel.tp,
        "rows of query, key and value": (spec.num_heads + 2 * spec.num_query_groups) * spec.head_dim // parallel.tp,
    }
    if spec.num_experts:
        sizes["moe_intermediate_size"] = spec.expert_ffn_size // parallel.tp
    else:
        sizes["intermediate_size"] = spec.ffn_size // parallel.tp
    problems = [
        f"model.fp8: {name} is {size} on a rank of parallel.tp={parallel.tp}, which {multiple} does not divide; use a "
        "smaller parallel.tp, or model.fp8=null"
        for name, size in sizes.items()
        if size % multiple
    ]
    per_stage = spec.num_layers // parallel.pp
    problems += [
        f"model.fp8.{key}: {value} are more than a stage of parallel.pp={parallel.pp} holds; use at most {per_stage}"
        for key, value in (("bf16_first_layers", fp8.bf16_first_layers), ("bf16_last_layers", fp8.bf16_last_layers))
        if value > per_stage
    ]
    if problems:
        raise ModelConfigError("\n".join(problems))


def model_arguments(precision: Precision) -> dict[str, Any]:
    """Fields of Megatron-Core's `TransformerConfig`."""
    import torch

    half = precision.dtype == "bf16"
    dtype = torch.bfloat16 if half else torch.float32
    arguments: dict[str, Any] = {"params_dtype": dtype, "pipeline_dtype": dtype, "bf16": half}
    fp8 = precision.fp8
    if fp8:
        arguments |= {
            "fp8": _FORMAT[fp8.recipe],
            "fp8_recipe": fp8.recipe,
            "fp8_param": fp8.param_gather,
            "first_last_layers_bf16": bool(fp8.bf16_first_layers or fp8.bf16_last_layers),
            "num_layers_at_start_in_bf16": fp8.bf16_first_layers,
            "num_layers_at_end_in_bf16": fp8.bf16_last_layers,
        }
    return arguments


def ddp_arguments(config: Any) -> dict[str, bool]:
    """Fields of Megatron-Core's `DistributedDataParallelConfig` for a model of this `TransformerConfig`.

    MXFP8 weights cannot be views of a buffer: they are gathered in bf16, through the gradients' buffer.
    """
    return {
        "grad_reduce_in_fp32": True,
        "fp8_param_gather": config.fp8_param,
        "reuse_grad_buf_for_mxfp8_param_ag": config.fp8_param and config.fp8_recipe == "mxfp8",
    }


def optimizer_arguments(config: Any) -> dict[str, Any]:
    """Fields of Megatron-Core's `OptimizerConfig` for a model of this `TransformerConfig`."""
    return {
        "bf16": config.bf16,
        "params_dtype": config.params_dtype,
        "fp8_recipe": config.fp8_recipe if config.fp8 else None,
        "reuse_grad_buf_for_mxfp8_param_ag": config.fp8_param and config.fp8_recipe == "mxfp8",
    }


def assign(parameter: Tensor, value: Tensor) -> None:
    """Copy `value` into a weight of any precision, before the optimizer is made.

    An FP8 weight (`param_gather`) rounds it. Megatron-Core makes the fp32 master from what Transformer Engine keeps
    beside the weight, which would still be what it was before loading (distrib_optimizer.py, and Transformer Engine's
    module/base.py, `_high_precision_init_val`).
    """
    import torch

    with torch.no_grad():
        parameter.copy_(value)  # `parameter.data` would be another object, on which an FP8 weight marks what is stale
    if getattr(parameter, "_high_precision_init_val", None) is not None:
        parameter._high_precision_init_val.copy_(value)  # type: ignore[attr-defined]


def plain(parameter: Tensor) -> Tensor:
    """The weight as an ordinary tensor: an FP8 one as the bf16 values that are computed with, others as they are."""
    from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor

    return dequantize_fp8_tensor(parameter) if is_float8tensor(parameter) else parameter.data
