"""Adam, its learning rate, and where its state is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_apo.config.base import Section
from megatron_apo.config.model import ModelConfig


class OptimizerConfig(Section):
    lr: float = Field(1e-6, gt=0, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of a decay")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="decay after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="optimizer steps of linear warm-up")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first-moment decay")
    beta2: float = Field(0.95, ge=0, lt=1, description="Adam's second-moment decay")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon; mind the gradient's scale, 2*b2 for loss_scale paper")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    clip_grad: float = Field(1.0, ge=0, description="largest gradient norm; 0: no clipping")
    distributed: bool = Field(True, description="shard optimizer state over data-parallel ranks")
    cpu_offload: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of main weights and moments that live and are updated on the CPU; Transformer Engine only",
    )
    moments: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="precision of Adam's moments; bf16 with Transformer Engine 2.13 or later only",
    )

    def problems(self, model: ModelConfig) -> list[str]:
        """Combinations that cannot work, one line each."""
        found = []
        if self.min_lr > self.lr:
            found.append(f"optimizer.min_lr: {self.min_lr} is above optimizer.lr={self.lr}; lower it")
        for key, value, default in (("cpu_offload", self.cpu_offload, 0), ("moments", self.moments, "fp32")):
            if value != default and not self.distributed:
                found.append(f"optimizer.{key}: {value} is the sharded optimizer's; set optimizer.distributed to true")
            if value != default and model.dtype == "fp32":
                found.append(f"optimizer.{key}: {value} is for bf16 weights; set model.dtype to bf16, or use {default}")
        if self.cpu_offload and self.moments == "bf16":
            found.append(
                f"optimizer.moments: bf16, but optimizer.cpu_offload={self.cpu_offload} keeps them in fp32; use fp32, "
                "or optimizer.cpu_offload=0"
            )
        if model.has_fp8_weights and not self.distributed:
            found.append(
                "model.fp8.param_gather: only the distributed optimizer turns fp32 master weights into FP8 ones; set "
                "optimizer.distributed to true, or use false"
            )
        if self.cpu_offload and model.has_fp8_weights:
            found.append(
                f"optimizer.cpu_offload: {self.cpu_offload} does not take the FP8 weights that model.fp8.param_gather "
                "makes; use 0, or model.fp8.param_gather=false"
            )
        return found
