"""What a batch of rollouts and the time it took say of a step, by the names of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_apo.config import Recipe
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.model.flops import training_rates
from megatron_apo.model.hf_config import ModelSpec
from megatron_apo.telemetry.gpu import peak_tflops


def rollout_metrics(
    batch: RolloutBatch,
    seconds: Mapping[str, float],
    spec: ModelSpec,
    *,
    masked_B: NDArray[np.bool_],
    num_ranks: int,
    peak_flops: float | None,
    has_reference: bool,
    critic: ModelSpec | None = None,
) -> dict[str, float]:
    """Rewards, lengths, and the rates of each part of a step.

    seconds: of the step's phases. masked_B: responses without a reward; rewards are of the others, NaN without any. The
    rest: see `training_rates`.
    """
    prompt_lengths, response_lengths = batch.sequences.prompt_lengths_B, batch.sequences.response_lengths_B
    return {
        "reward/mean": _mean(batch.reward_B[~masked_B]),
        **response_metrics(batch),
        "response/masked": float(masked_B.mean()),
        **training_rates(
            spec,
            list(zip(prompt_lengths.tolist(), response_lengths.tolist(), strict=True)),
            seconds,
            num_ranks=num_ranks,
            peak_flops=peak_flops,
            has_reference=has_reference,
            critic=critic,
        ),
    }


def source_metrics(
    batch: RolloutBatch, names: Sequence[str], masked_B: NDArray[np.bool_] | None = None
) -> dict[str, float]:
    """Of each source's responses, by the names of metrics.jsonl; nothing where there is one source alone.

    names: of each prompt's source, [B]. masked_B: responses without a reward; none: none is.
    """
    masked_B = np.zeros(len(names), dtype=bool) if masked_B is None else masked_B
    found: dict[str, float] = {}
    for name in sorted(set(names) - {""}):
        own = np.array([one == name for one in names])
        found |= {
            f"source/{name}/share": float(own.mean()),
            f"source/{name}/reward": _mean(batch.reward_B[own & ~masked_B]),
            f"source/{name}/mean_tokens": float(batch.sequences.response_lengths_B[own].mean()),
            f"source/{name}/truncated": float(batch.truncated_B[own].mean()),
        }
    return found


def _mean(values: NDArray[np.float64]) -> float:
    return fmean(values.tolist()) if len(values) else math.nan


def response_metrics(batch: RolloutBatch) -> dict[str, float]:
    """Lengths, by the names of metrics.jsonl."""
    lengths = batch.sequences.response_lengths_B.tolist()
    return {
        "response/mean_tokens": fmean(lengths),
        "response/p50_tokens": float(np.percentile(lengths, 50)),
        "response/p95_tokens": float(np.percentile(lengths, 95)),
        "response/max_tokens": max(lengths),
        "response/truncated": float(batch.truncated_B.mean()),
    }


def peak_flops(recipe: Recipe, device: torch.device) -> float | None:
    """Most FLOPs a second that one rank's device can do in the recipe's precision, where that is known."""
    tflops = recipe.telemetry.peak_tflops
    if tflops is None and device.type == "cuda":
        tflops = peak_tflops(torch.cuda.get_device_name(device), fp8=recipe.model.fp8 is not None)
    return tflops and tflops * 1e12
