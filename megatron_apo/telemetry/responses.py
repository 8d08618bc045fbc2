"""What a batch of responses says of sampling: lengths, truncation, and how long the slowest kept the step waiting."""

from __future__ import annotations

import math
from statistics import fmean

import numpy as np

from megatron_apo.data.rollouts import RolloutBatch


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


def sampling_metrics(batch: RolloutBatch, step_s: float, generate_s: float) -> dict[str, float]:
    """What the sampling of the batch was like, in a step of so many seconds of which vLLM took `generate_s`.

    `rollout/slowest_share` is the share of the step in which only the slowest response was still running,
    `rollout/slowest_1pct_share` that in which only the slowest 1 % (at least one) were.
    """
    arrivals = sorted(batch.seconds_B.tolist())

    def share(num_slowest: int) -> float:
        before = arrivals[-1 - num_slowest] if len(arrivals) > num_slowest else 0.0
        return (arrivals[-1] - before) / step_s

    return {
        "tokens_per_s/generate": int(batch.sequences.response_lengths_B.sum()) / generate_s,
        "rollout/slowest_share": share(1),
        "rollout/slowest_1pct_share": share(math.ceil(len(batch) / 100)),
    }
