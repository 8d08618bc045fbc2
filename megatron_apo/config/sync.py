"""How weights reach the engines, and how far vLLM's log-probs may then be from the trainer's."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from megatron_apo.config.base import MAY_CHANGE, Section
from megatron_apo.config.model import ModelConfig
from megatron_apo.config.rollout import RolloutConfig


class Difference(NamedTuple):
    """|vLLM's log-prob - trainer's| of probe tokens, nats."""

    mean: float
    max: float


class SyncConfig(Section):
    transport: Literal["auto", "shm", "collective", "ipc"] = Field(
        "auto",
        description="shm: buckets in host memory that trainer and engines share; collective: over the network, from "
        "each pipeline stage to every engine; ipc: in memory of the GPU that a rank and an engine share; auto: shm "
        "where all engines are on rank 0's machine, else collective, or ipc for colocated ones on GPUs",
    )
    timeout_s: float = Field(
        120.0,
        ge=1,
        json_schema_extra=MAY_CHANGE,
        description="how long an engine may be silent while it is sent weights",
    )
    dir: Path | None = Field(None, description="folder of the shm transport; none: a private one under /dev/shm")
    bucket_mib: int = Field(
        32, ge=1, json_schema_extra=MAY_CHANGE, description="weights that travel at a time; three such are in sync.dir"
    )
    probe_every: int = Field(
        50, ge=1, description="steps between comparisons of log-probs with vLLM's (always before the first)"
    )
    probe_sequences: int = Field(8, ge=1, description="sequences whose log-probs are compared")
    probe_tokens: int = Field(64, ge=2, description="tokens of each of them; they are made of prompts")
    probe_tolerance: float | None = Field(
        None, gt=0, description="largest |log-prob difference| of a probe token; none: by precision, 5e-4 in fp32"
    )
    probe_tolerance_mean: float | None = Field(
        None, gt=0, description="mean |log-prob difference| of the probe tokens; none: by precision, 5e-5 in fp32"
    )

    def tolerance(self, model: ModelConfig, rollout: RolloutConfig) -> Difference:
        """What right weights should stay below in this precision, where the recipe does not say.

        It judges that vLLM computes what the trainer does; that it has the weights is proven tensor by tensor at every
        sync, in any precision. In fp32 a mean of 1.2e-5 and a maximum of 1.1e-4 were seen of a language model with 30
        layers and 49,152 tokens, where each side is up to 4e-5 from float64, and no more than 1e-6 of small ones: four
        times that is allowed. In bf16, on a CPU, a mean of .002 and a maximum of .06. The rest are estimates.
        A log-prob is a difference of logits. bf16 keeps one of 16 to 32 to 1/16, and vLLM writes logits in its own
        dtype; 1.0 leaves room for 16 such roundings, of both logits and of the hidden states before them. FP8's values
        have 4 bits less, but only as factors of sums, where most errors cancel: twice that. Means are of hundreds of
        tokens, which differ either way: ten times what was seen, and as much again for FP8.
        """
        usual = {
            "fp32": Difference(mean=5e-5, max=5e-4),
            "16-bit": Difference(mean=0.02, max=1.0),
            "fp8": Difference(mean=0.1, max=2.0),
        }[_precision(model, rollout)]
        return Difference(self.probe_tolerance_mean or usual.mean, self.probe_tolerance or usual.max)

    def problems(self, rollout: RolloutConfig) -> list[str]:
        """Combinations that cannot work, one line each."""
        if rollout.placement == "dedicated" and self.transport in ("shm", "ipc"):
            return [
                f"sync.transport: {self.transport}, but with rollout.placement=dedicated no engine shares memory "
                "with the trainer; use collective, or auto"
            ]
        return []


class MismatchConfig(Section):
    warn: float | None = Field(
        3.0,
        gt=1,
        description="a step's mean |log-prob trainer - sampler| is warned of above so many times its baseline",
    )
    stop: float | None = Field(
        10.0, gt=1, description="and ends the run above so many, before the optimizer's step; none: never"
    )
    floor: float | None = Field(
        None,
        gt=0,
        description="least baseline, nats a token; the baseline is the median of the run's first 20 steps. none: by "
        "precision, 1e-5 in fp32",
    )

    def least_baseline(self, model: ModelConfig, rollout: RolloutConfig) -> float:
        """`floor`, or what the mean over a step's tokens should stay well below in this precision, nats.

        fp32: the demonstration has 1e-6. bf16: .002 was seen on a GPU, and vime tells of .011 with Qwen3-4B. The floors
        are ten and five times what was seen, so that with factors of 3 and 10 an honest first step, of which no median
        is known yet, is well below either limit: 3e-5 and 1e-4 in fp32, .03 and .1 in bf16. NeMo-RL accepts 1.05, in
        hard cases 1.1, of the mean of exp |difference|, which is 1 more than the mean of small differences. FP8 is an
        estimate, five times bf16's: 4 bits less, but only in factors of sums, where most errors cancel.
        """
        if self.floor is not None:
            return self.floor
        return {"fp32": 1e-5, "16-bit": 0.01, "fp8": 0.05}[_precision(model, rollout)]

    def problems(self) -> list[str]:
        """Combinations that cannot work, one line each."""
        if self.warn is not None and self.stop is not None and self.warn > self.stop:
            return [f"mismatch.warn: {self.warn} is above mismatch.stop={self.stop}; lower it, or use null"]
        return []


def _precision(model: ModelConfig, rollout: RolloutConfig) -> Literal["fp32", "16-bit", "fp8"]:
    """The coarsest that the trainer or vLLM computes in."""
    if model.fp8 or rollout.quantization or rollout.kv_cache_dtype == "fp8":
        return "fp8"
    return "fp32" if (model.dtype, rollout.dtype) == ("fp32", "float32") else "16-bit"
