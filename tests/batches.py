"""Rollout batches that no engine sampled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_apo.data.rollouts import FINISH_REASONS, RolloutBatch
from megatron_apo.data.sequences import Int32s, Sequences

# Overrides of a recipe that learns from batches like these, whose log-probs are no sampler's.
UNSAMPLED = ["mismatch.warn=null", "mismatch.stop=null"]


def make_batch(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    rewards: Sequence[float] | None = None,
    log_probs: Sequence[Sequence[float]] | None = None,
    prompt_ids: Sequence[str] | None = None,
    finish_reasons: Sequence[str] | None = None,
    seconds: Sequence[float] | None = None,
    weight_version: int = 0,
) -> RolloutBatch:
    """A batch that is held whole. By default rewards, seconds and the sampler's log-probs are 0, prompts "0", "1" .."""
    count = len(prompts)
    ids = tuple(prompt_ids or map(str, range(count)))
    return RolloutBatch(
        prompt_ids=ids,
        group_B=groups_of(ids),
        sequences=Sequences.of(prompts, responses),
        log_prob_R=np.array(
            [x for row in log_probs for x in row] if log_probs else [0.0] * sum(map(len, responses)), dtype=np.float32
        ),
        reward_B=np.array(rewards if rewards is not None else [0.0] * count, dtype=np.float64),
        finish_reason_B=np.array(
            [FINISH_REASONS.index(reason) for reason in finish_reasons or ["stop"] * count], dtype=np.uint8
        ),
        weight_version_B=np.full(count, weight_version, dtype=np.int64),
        seconds_B=np.array(seconds if seconds is not None else [0.0] * count, dtype=np.float64),
        wave_B=np.zeros(count, dtype=np.int32),
    )


def groups_of(prompt_ids: Sequence[str]) -> Int32s:
    """[B] the number of each response's prompt, counted from 0 in the order in which prompts first come."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(prompt_id, len(numbers)) for prompt_id in prompt_ids], dtype=np.int32)


def no_values(batch: RolloutBatch) -> list[float]:
    """A V* of 0 for each response, so that rewards are advantages."""
    return [0.0] * len(batch)


def assert_same_batch(ours: RolloutBatch, theirs: RolloutBatch) -> None:
    """Bit for bit, what is held and what is everyone's; seconds apart."""
    assert ours.prompt_ids == theirs.prompt_ids
    names = ("group_B", "log_prob_R", "reward_B", "finish_reason_B", "weight_version_B", "wave_B")
    pairs = {name: (getattr(ours, name), getattr(theirs, name)) for name in names}
    names = ("prompt_lengths_B", "response_lengths_B", "held_H", "token_ids_T")
    pairs |= {name: (getattr(ours.sequences, name), getattr(theirs.sequences, name)) for name in names}
    for name, (mine, other) in pairs.items():
        assert mine.dtype == other.dtype and mine.tobytes() == other.tobytes(), name
