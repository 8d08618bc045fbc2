"""Stage 1: how many samples a prompt has, how they become V*, and where they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_apo.config.base import MAY_CHANGE, SAME_IN_ALL_SHARDS, Section, in_fingerprint
from megatron_apo.config.reward import RewardConfig

EstimatorName = Literal["log_mean_exp", "debiased", "beta_smoothed", "mean", "max"]


class AdaptiveConfig(Section):
    stderr: float = Field(0.1, gt=0, description="prompts are sampled until V*'s standard error is at most this")
    beta1: float = Field(0.5, gt=0, description="b1 of the V* that stderr is meant for")
    step: int = Field(4, ge=1, description="samples of a further round")
    most: int = Field(64, ge=1, description="samples that no prompt exceeds")
    all_wrong: int = Field(32, ge=0, description="least samples of a prompt that has no reward above 0")
    reward_range: tuple[float, float] = Field((0.0, 1.0), description="lowest and highest reward there can be")

    def problems(self, samples_per_prompt: int, reward: RewardConfig) -> list[str]:
        """Combinations that cannot work, one line each."""
        found = []
        if samples_per_prompt > self.most:
            found.append(
                f"vstar.adaptive.most: {self.most} is below vstar.samples_per_prompt={samples_per_prompt}; raise it"
            )
        if self.all_wrong > self.most:
            found.append(
                f"vstar.adaptive.all_wrong: {self.all_wrong} is above vstar.adaptive.most={self.most}; lower it"
            )
        low, high = self.reward_range
        if low >= high:
            found.append(f"vstar.adaptive.reward_range: [{low}, {high}] is empty; give the lowest and highest reward")
        elif not low <= reward.failure_reward <= high:
            found.append(
                f"reward.failure_reward: {reward.failure_reward} is outside vstar.adaptive.reward_range="
                f"[{low}, {high}]; widen that"
            )
        return found


MANIFEST = "manifest.json"  # of a store that is closed


class VStarConfig(Section):
    dir: Path = Field(json_schema_extra=MAY_CHANGE | {"default": "RUN/vstar"}, description="folder of the V* store")
    samples_per_prompt: int = Field(
        8,
        ge=1,
        json_schema_extra=in_fingerprint("samples_per_prompt"),
        description="N: responses of pi_ref per prompt (of the first round)",
    )
    adaptive: AdaptiveConfig | None = Field(
        None,
        json_schema_extra=in_fingerprint("adaptive"),
        description="further rounds where V* is uncertain; none: N for all. Where sampling stops by what it found, "
        "shares of right samples are biased; estimator beta_smoothed suits it",
    )
    samples_used: int | None = Field(None, ge=1, description="stage 2 takes each prompt's first so many; none: all")
    beta1: float = Field(0.5, gt=0, description="b1 of V* = b1 log mean exp(r/b1)")
    estimator: EstimatorName = Field(
        "log_mean_exp", description="how rewards become V*; beta_smoothed takes rewards of 0 and 1 alone"
    )
    filter: Literal["none", "all_wrong", "all_right", "both", "success_rate"] = Field(
        "none", description="prompts left out of stage 2"
    )
    success_rate: tuple[float, float] = Field(
        (0.0, 1.0), description="filter success_rate keeps prompts whose share of right samples lies in between"
    )
    at_start: bool = Field(
        False,
        json_schema_extra=MAY_CHANGE,
        description="train fills the store itself where it is not closed, before its first step, on the engines that "
        "it goes on with (one machine without a GPU; rollout.prefix_caching holds)",
    )
    prefix_caching: bool = Field(True, description="stage 1's samples of a prompt share its prefill")
    claim_expires_s: float = Field(
        300,
        ge=5,
        description="a worker silent for longer is dead, its shards go to others (also of an evaluation); well above "
        "NFS's caching",
    )
    prompts_per_shard: int = Field(
        64,
        ge=1,
        json_schema_extra=SAME_IN_ALL_SHARDS | MAY_CHANGE,
        description="rows of one Parquet shard: what a worker takes at a time, and a killed one loses",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**31,
        json_schema_extra=in_fingerprint("seed"),
        description="seeds the samples of pi_ref; runs of any run.seed can share a store",
    )
    keep_responses: bool = Field(
        False, json_schema_extra=SAME_IN_ALL_SHARDS | MAY_CHANGE, description="store the sampled token ids as well"
    )

    @property
    def is_closed(self) -> bool:
        """Whether stage 1 has been through with the store, whatever became of it since."""
        return (self.dir / MANIFEST).exists()

    def problems(self, reward: RewardConfig) -> list[str]:
        """Combinations that cannot work, one line each."""
        found = self.adaptive.problems(self.samples_per_prompt, reward) if self.adaptive else []
        most = self.adaptive.most if self.adaptive else self.samples_per_prompt
        if (self.samples_used or 0) > most:
            found.append(f"vstar.samples_used: {self.samples_used} is above the {most} that a prompt has; lower it")
        low, high = self.success_rate
        if not 0 <= low <= high <= 1:
            found.append(f"vstar.success_rate: [{low}, {high}] is no range within 0 and 1; use 0 <= low <= high <= 1")
        if (low, high) != (0, 1) and self.filter != "success_rate":
            found.append(
                f"vstar.success_rate: [{low}, {high}] is for vstar.filter=success_rate, and this one is "
                f"{self.filter}; set that, or leave the range out"
            )
        return found
