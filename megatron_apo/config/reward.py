"""What grades responses, and the processes that it runs in."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from megatron_apo.config.base import MAY_CHANGE, Section, behind_fingerprint, in_fingerprint


class GraderConfig(Section):
    name: str = Field(
        "math",
        json_schema_extra=behind_fingerprint("reward_name"),
        description="arithmetic, gsm8k, math, reasoning-gym, or your own as my_module:MyReward",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        json_schema_extra=in_fingerprint("reward_options"),
        description="keyword arguments of that reward",
    )


class RewardConfig(GraderConfig):
    workers: int = Field(1, ge=1, json_schema_extra=MAY_CHANGE, description="grader processes")
    time_limit_s: float = Field(5.0, gt=0, description="a grader that takes longer is killed and its sample fails")
    memory_limit_gib: float = Field(
        8.0, gt=0, description="address space of a grader process; beyond it the sample fails"
    )
    failure_reward: float = Field(
        0.0,
        json_schema_extra=in_fingerprint("failure_reward"),
        description="reward of a sample whose grader hung, died or threw",
    )
    truncated: Literal["grade", "fail", "mask"] = Field(
        "grade",
        json_schema_extra=in_fingerprint("truncated"),
        description="responses cut at the length cap: graded like others; given failure_reward unseen; or in no V* and "
        "no loss, and graded in evaluations alone",
    )
