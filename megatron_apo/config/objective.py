"""The training method, and its settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_apo.config.base import Section


class ObjectiveConfig(Section):
    name: Literal["apo"] = Field("apo", description="the method; see megatron_apo/objectives")
    beta2: float = Field(1e-3, gt=0, description="b2: weight of the log-ratio in the regression")
    loss_scale: Literal["paper", "unit"] = Field("paper", description="unit divides by 2*b2 (REINFORCE's units)")
