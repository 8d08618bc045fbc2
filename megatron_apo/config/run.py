"""A run's folder and seed, its evaluations, and what it tells of itself."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from megatron_apo.config.base import MAY_CHANGE, Section


class RunConfig(Section):
    dir: Path = Field(
        Path("runs/apo"),
        json_schema_extra=MAY_CHANGE,
        description="folder of this run: recipe, metrics, logs, checkpoints, report",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seeds prompts' order, rollouts and initial weights")


class EvalConfig(Section):
    samples: int = Field(8, ge=1, description="k of avg@k at sampling.temperature")
    every: int = Field(0, ge=0, description="steps between evaluations; 0: only before and after")
    overlapped: bool = Field(
        False, description="evaluate while the next step is learned; needs engines that keep their memory meanwhile"
    )
    max_prompts: int | None = Field(
        None, ge=1, description="first rows of a held-out source without a number of its own; none: all"
    )
    prompts_per_shard: int = Field(
        8, ge=1, description="`evaluate`: prompts that a worker takes at a time, and a killed one loses"
    )


class TelemetryConfig(Section):
    tensorboard: bool = Field(True, description="write RUN/tensorboard")
    progress: bool = Field(True, description="draw progress bars")
    wandb: str | None = Field(
        None, min_length=1, description="Weights & Biases project to write to as well; offline where it is not reached"
    )
    peak_tflops: float | None = Field(
        None, gt=0, description="peak of one rank's device, for MFU; none: by the GPU's name, no MFU for one not known"
    )
