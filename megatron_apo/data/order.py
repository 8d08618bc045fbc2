"""Which prompts come next, and each sample's seed: functions of the run's seed and of how many prompts were drawn."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def step_prompts(step: int, *, num_prompts: int, prompts_per_step: int, seed: int) -> list[int]:
    """Indices of step `step` (from 0): a walk through all prompts, shuffled anew each epoch."""
    places = range(step * prompts_per_step, (step + 1) * prompts_per_step)
    return [_shuffled(place, num_prompts, seed) for place in places]


@dataclass
class PromptWalk:
    """The prompts that a run learns from, one after the other: a walk through each source at the pace of its weight.

    Prompt j of a source comes at time (j + 1/2) / weight, so that sources take turns, and of any number of prompts each
    has its share to within one. A source is shuffled anew each epoch. drawn: how many prompts there were so far, which
    is all its state.
    """

    sizes: Sequence[int]
    weights: Sequence[float]
    seed: int
    drawn: int = 0

    def draw(self, count: int) -> list[tuple[int, int]]:
        """(source, index in it) of the next prompts."""
        first, self.drawn = self.drawn, self.drawn + count
        return _walk(first, self.drawn, self.sizes, self.weights, self.seed)


def _walk(first: int, last: int, sizes: Sequence[int], weights: Sequence[float], seed: int) -> list[tuple[int, int]]:
    """(source, index in it) at the places `first` to `last` of the walk."""
    if len(sizes) == 1:
        return [(0, _shuffled(place, sizes[0], seed)) for place in range(first, last)]
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    # Of the first n prompts a source has n * share, give or take half the number of sources: all others lie before
    # `first` or after `last`.
    slack = len(sizes) // 2 + 2
    begins = [max(0, math.floor(first * share) - slack) for share in shares]
    ends = [math.ceil(last * share) + slack for share in shares]
    near = [np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)]
    places = np.concatenate(near)
    sources = np.repeat(np.arange(len(sizes)), [len(one) for one in near])
    times = np.concatenate([(one + 0.5) / share for one, share in zip(near, shares, strict=True)])
    before = sum(begins)
    chosen = np.lexsort((sources, times))[first - before : last - before]
    pairs = zip(sources[chosen].tolist(), places[chosen].tolist(), strict=True)
    return [(source, _shuffled(place, sizes[source], seed, source)) for source, place in pairs]


def _shuffled(place: int, num_prompts: int, seed: int, source: int = 0) -> int:
    """The index at a place of the walk."""
    return int(_epoch_order(place // num_prompts, num_prompts, seed, source)[place % num_prompts])


@lru_cache(maxsize=64)
def _epoch_order(epoch: int, num_prompts: int, seed: int, source: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch, source] if source else [seed, epoch]).permutation(num_prompts)


def sample_seed(run_seed: int, purpose: str, step: int, prompt_id: str) -> int:
    """Base seed of one prompt's samples, 31 bits; sample i uses base + i (vLLM's own rule for n > 1).

    `purpose` keeps stages apart: "vstar", "train", "eval".
    """
    text = f"{run_seed}/{purpose}/{step}/{prompt_id}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


def sample_seeds(run_seed: int, purpose: str, step: int, prompt_ids: Sequence[str], num_samples: int = 1) -> list[int]:
    """The base seed of each prompt's samples, so many: a prompt that is there several times gets none of them twice."""
    repeats: Counter[str] = Counter()
    seeds = []
    for prompt_id in prompt_ids:
        seeds.append(sample_seed(run_seed, purpose, step, prompt_id) + repeats[prompt_id])
        repeats[prompt_id] += num_samples
    return seeds
