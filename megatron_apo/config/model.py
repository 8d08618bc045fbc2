"""The policy and its reference: where they are, and what they are computed in."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from megatron_apo.config.base import MAY_CHANGE, Section, behind_fingerprint
from megatron_apo.config.shipped import SHAPE, shape_name, shapes


class FP8Config(Section):
    recipe: Literal["tensorwise", "blockwise", "mxfp8"] = Field(
        "tensorwise", description="one scale for each tensor, block (Hopper or later) or 32 values (Blackwell)"
    )
    param_gather: bool = Field(
        False, description="hold and gather weights in FP8 too; their fp32 masters need optimizer.distributed"
    )
    bf16_first_layers: int = Field(0, ge=0, description="layers computed in bf16 at the model's start")
    bf16_last_layers: int = Field(0, ge=0, description="layers computed in bf16 at the model's end")

    @property
    def multiple(self) -> int:
        """Each dimension of an FP8 product is a multiple of it (Megatron-Core's fp8_utils.py, `get_fp8_align_size`)."""
        return 32 if self.recipe == "mxfp8" else 16

    @property
    def token_multiple(self) -> int:
        """The tokens that a rank makes FP8 are a multiple of it.

        Whole blocks of 128 are asked for only where ranks gather them (Transformer Engine's `Float8BlockQuantizer`,
        `is_quantizable`), and cost little elsewhere.
        """
        return 128 if self.recipe == "blockwise" else self.multiple

    @field_validator("recipe", mode="before")
    @classmethod
    def _has_current_scales(cls, value: object) -> object:
        if value == "delayed":
            raise ValueError(
                "'tensorwise', 'blockwise' or 'mxfp8': delayed scaling updates its scales in forwards with gradients "
                "alone, and the reference has none, so that it would drift from the policy"
            )
        return value


class ModelConfig(Section):
    path: Path = Field(
        json_schema_extra=behind_fingerprint("model_hash", "tokenizer_hash", "template_hash"),
        description="Hugging Face folder of the starting policy (config.json, safetensors, tokenizer); for `doctor` "
        "also shape:NAME, a public model's config.json without weights, of launch/recipes/shapes",
    )
    reference: Path | None = Field(
        None,
        json_schema_extra=behind_fingerprint("model_hash"),
        description="Hugging Face folder of pi_ref, or as model.path a shape; none: the same as model.path",
    )
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="what the trainer computes in; bf16 keeps master weights and gradients in fp32"
    )
    layers: Literal["auto", "te", "local"] = Field(
        "auto", description="Transformer Engine's layers or Megatron-Core's own; auto: te in bf16 where it can run"
    )
    fp8: FP8Config | None = Field(
        None, description="matrix products of the layers in FP8, of policy and reference alike; none: in model.dtype"
    )
    reference_mode: Literal["resident", "offload", "swap"] = Field(
        "resident",
        json_schema_extra=MAY_CHANGE,
        description="pi_ref on the device; in host memory, on the device while it computes; or in the policy's own "
        "buffers while it computes",
    )

    @field_validator("path", "reference")
    @classmethod
    def _has_a_known_shape(cls, value: Path | None) -> Path | None:
        if value is not None and (name := shape_name(value)) is not None and name not in (known := shapes()):
            raise ValueError(f"a Hugging Face folder, or one of {', '.join(SHAPE + other for other in known)}")
        return value

    @property
    def reference_path(self) -> Path:
        return self.reference or self.path

    @property
    def shapes(self) -> dict[str, Path]:
        """Those of `folders` that are shapes."""
        return {key: folder for key, folder in self.folders.items() if shape_name(folder) is not None}

    @property
    def folders(self) -> dict[str, Path]:
        """The Hugging Face folders by their keys in a recipe; the reference's where it is another."""
        reference = {} if self.reference_path == self.path else {"model.reference": self.reference_path}
        return {"model.path": self.path} | reference

    @property
    def has_fp8_weights(self) -> bool:
        """Weights are Transformer Engine's FP8 tensors, which what moves or saves plain ones does not take."""
        return self.fp8 is not None and self.fp8.param_gather

    def problems(self) -> list[str]:
        """Combinations that cannot work, one line each."""
        found = []
        if self.layers == "te" and self.dtype == "fp32":
            found.append(
                "model.layers: te with model.dtype=fp32 would hold whole attention matrices, since Transformer "
                "Engine's fused attention is 16-bit; set model.dtype to bf16, or model.layers to local"
            )
        if self.fp8 and self.dtype == "fp32":
            found.append("model.fp8: what is not in FP8 is bf16, and model.dtype is fp32; set it to bf16")
        if self.fp8 and self.layers == "local":
            found.append("model.fp8: model.layers=local has no FP8, Transformer Engine has; set model.layers to auto")
        if self.reference_mode != "resident" and self.has_fp8_weights:
            found.append(
                f"model.reference_mode: {self.reference_mode} moves plain tensors, and with model.fp8.param_gather "
                "weights are Transformer Engine's; use resident, or model.fp8.param_gather=false"
            )
        return found
