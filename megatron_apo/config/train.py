"""The steps of stage 2 and those of the warm start."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_apo.config.base import MAY_CHANGE, MAY_CHANGE_AT_CONSTANT_RATE, Section
from megatron_apo.config.model import ModelConfig
from megatron_apo.config.optimizer import OptimizerConfig

# Megatron-Core's (transformer_config.py, `__post_init__`); what layers have of them: model/recompute.py.
RecomputeModule = Literal["core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts"]


class TrainConfig(Section):
    steps: int = Field(200, ge=1, json_schema_extra=MAY_CHANGE_AT_CONSTANT_RATE, description="rollout batches")
    target_reward: float | None = Field(
        None,
        json_schema_extra=MAY_CHANGE,
        description="training ends, before train.steps, where the mean reward of the last target_responses drawn is "
        "at least this; none: it does not",
    )
    target_responses: int = Field(
        512,
        ge=1,
        json_schema_extra=MAY_CHANGE,
        description="responses of target_reward's mean, rounded up to whole steps: a mean of few is at a target by "
        "chance",
    )
    max_minutes: float | None = Field(
        None,
        gt=0,
        json_schema_extra=MAY_CHANGE,
        description="training ends, before train.steps, with the first step that brings the time of all steps to this; "
        "evaluations, saves and starts do not count; none: no limit",
    )
    prompts_per_step: int = Field(256, ge=1, description="prompts of one rollout batch")
    minibatches: int = Field(2, ge=1, description="optimizer steps per rollout batch; divides prompts_per_step")
    streamed: bool = Field(
        False,
        json_schema_extra=MAY_CHANGE,
        description="compute responses as they come, in waves, while the rest of the step is still generated",
    )
    packing: bool = Field(
        True, json_schema_extra=MAY_CHANGE, description="pack sequences; false: pad to the longest of a micro-batch"
    )
    tokens_per_micro_batch: int = Field(
        4096, ge=1, json_schema_extra=MAY_CHANGE, description="token budget of one micro-batch (padding included)"
    )
    log_prob_chunk_tokens: int = Field(
        2048, ge=1, json_schema_extra=MAY_CHANGE, description="tokens whose logits exist at once"
    )
    entropy: bool = Field(
        False,
        json_schema_extra=MAY_CHANGE,
        description="also measure the policy's entropy, from the logits of the training pass",
    )
    importance: Literal["none", "token", "sequence"] = Field(
        "none",
        description="weigh the gradient of each token, or each response's, by min(pi / pi_sampler, importance_cap) at "
        "the weights that sampled",
    )
    importance_cap: float = Field(2.0, gt=0, description="largest importance weight")
    first_log_ratio_tolerance: float | None = Field(
        None,
        ge=0,
        json_schema_extra=MAY_CHANGE,
        description="largest |log pi/pi_ref| of a token on the first batch, nats, where both are one model; none: 0, "
        "and on Transformer Engine's layers 0.1 in bf16 and 0.5 in FP8",
    )
    max_skipped_steps: int = Field(
        3,
        ge=1,
        json_schema_extra=MAY_CHANGE,
        description="optimizer steps in a row with a gradient that is not finite, at which the run stops",
    )
    save_every: int = Field(
        0, ge=0, json_schema_extra=MAY_CHANGE, description="steps between checkpoints; 0: only the final HF export"
    )
    record: bool = Field(
        False, json_schema_extra=MAY_CHANGE, description="keep each step's batch in RUN/rollouts, for train.replay"
    )
    replay: Path | None = Field(
        None,
        json_schema_extra=MAY_CHANGE,
        description="folder of recorded batches to train on, without vLLM; none: sample them",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        json_schema_extra=MAY_CHANGE,
        description="what backward computes again: selective: parts of layers, by default feed-forward ones; "
        "full: layers' inside",
    )
    recompute_modules: list[RecomputeModule] | None = Field(
        None,
        min_length=1,
        json_schema_extra=MAY_CHANGE,
        description="parts that selective recomputes; null: mlp, or moe where there are experts",
    )
    recompute_method: Literal["uniform", "block"] = Field(
        "uniform",
        json_schema_extra=MAY_CHANGE,
        description="full: all layers, recompute_layers at a time, or only the first recompute_layers",
    )
    recompute_layers: int = Field(
        1, ge=1, json_schema_extra=MAY_CHANGE, description="layers of recompute_method; of each model chunk"
    )
    offload_while_sampling: bool = Field(
        False,
        json_schema_extra=MAY_CHANGE,
        description="gradients, main weights and optimizer state leave the GPU while vLLM generates",
    )

    def problems(self, model: ModelConfig, optimizer: OptimizerConfig) -> list[str]:
        """Combinations that cannot work, one line each."""
        found = self._idle_problems()
        if self.target_reward is not None and self.replay is not None:
            found.append(
                f"train.target_reward: {self.target_reward} is of responses that are drawn, which train.replay draws "
                "none of; leave it out, or sample"
            )
        if self.save_every and optimizer.cpu_offload:  # Megatron-Core can; no checkpoint of it was ever read back
            found.append(
                f"train.save_every: {self.save_every} is untested with optimizer.cpu_offload={optimizer.cpu_offload}; "
                "use 0, or optimizer.cpu_offload=0"
            )
        if model.has_fp8_weights:  # both take weights for plain bytes
            found += [
                f"train.{key}: {value} does not take the FP8 weights that model.fp8.param_gather makes; use {usual}, "
                "or model.fp8.param_gather=false"
                for key, usual in (("save_every", 0), ("offload_while_sampling", False))
                if (value := getattr(self, key)) != usual
            ]
        return found

    def _idle_problems(self) -> list[str]:
        """What is set for a way of working that is not chosen."""
        found = []
        for key, kind in (
            ("recompute_modules", "selective"),
            ("recompute_method", "full"),
            ("recompute_layers", "full"),
        ):
            if self.recompute != kind:
                found += self.idle("train", key, f"train.recompute={kind}", self.recompute)
        if self.importance == "none":
            found += self.idle("train", "importance_cap", "train.importance=token or sequence", "none")
        return found


class WarmupConfig(Section):
    start: Path | None = Field(
        None, description="HF folder that a warm start begins from; it is exported to model.path"
    )
    data: str | None = Field(None, description="SFT data: prompt and response columns; none: no warm start")
    response_column: str = Field("response", description="column that holds the target response")
    steps: int = Field(400, ge=1, description="optimizer steps")
    sequences_per_step: int = Field(64, ge=1, description="sequences of one optimizer step")
    lr: float = Field(
        1e-3, gt=0, description="peak learning rate, after a twentieth of the steps; it falls linearly to 0"
    )
