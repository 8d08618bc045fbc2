"""What a batch of responses says of sampling: lengths, truncation, and how long the slowest kept the step waiting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from megatron_apo.data.rollout import Rollout


def response_metrics(batch: Sequence[Rollout], step_s: float) -> dict[str, float]:
    """By the names of metrics.jsonl; `step_s`: seconds of the whole step.

    `rollout/slowest_share`: the share of the step in which only the slowest 1 % of the responses (at least one) were
    still running, from the arrival of the last one before them to that of the very last.
    """
    lengths = [len(rollout.response_ids) for rollout in batch]
    arrivals = sorted(rollout.seconds for rollout in batch)
    before = arrivals[-1 - math.ceil(len(batch) / 100)] if len(batch) > 1 else 0.0
    return {
        "response/mean_tokens": fmean(lengths),
        "response/p50_tokens": float(np.percentile(lengths, 50)),
        "response/p95_tokens": float(np.percentile(lengths, 95)),
        "response/max_tokens": max(lengths),
        "response/truncated": fmean(rollout.finish_reason == "length" for rollout in batch),
        "rollout/slowest_share": (arrivals[-1] - before) / step_s,
    }
