"""Which prompts a step uses, and each sample's seed: pure functions of the run's seed; a resumed run repeats them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def step_prompts(step: int, *, num_prompts: int, prompts_per_step: int, seed: int) -> list[int]:
    """Indices of step `step` (from 0): a walk through all prompts, shuffled anew each epoch."""
    first = step * prompts_per_step
    return [
        int(_epoch_order(p // num_prompts, num_prompts, seed)[p % num_prompts])
        for p in range(first, first + prompts_per_step)
    ]


@lru_cache(maxsize=2)
def _epoch_order(epoch: int, num_prompts: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(num_prompts)


def sample_seed(run_seed: int, purpose: str, step: int, prompt_id: str) -> int:
    """Base seed of one prompt's samples, 31 bits; sample i uses base + i (vLLM's own rule for n > 1).

    `purpose` keeps stages apart: "vstar", "train", "eval".
    """
    text = f"{run_seed}/{purpose}/{step}/{prompt_id}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


def sample_seeds(run_seed: int, purpose: str, step: int, prompt_ids: Sequence[str]) -> list[int]:
    """A seed for each response: a prompt that is there several times gets its samples 0, 1, ..., never one twice."""
    repeats: Counter[str] = Counter()
    seeds = []
    for prompt_id in prompt_ids:
        seeds.append(sample_seed(run_seed, purpose, step, prompt_id) + repeats[prompt_id])
        repeats[prompt_id] += 1
    return seeds
