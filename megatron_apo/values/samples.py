"""The rewards of a store: P prompts with n_p samples each, not everywhere the same number (see `sampling.py`).

A masked sample, cut at the length cap, was drawn and has no reward: it is NaN among the `drawn`, and not among the
`known()` of them, of which a prompt may have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_apo.values.ids import BLOCK_ROWS

Array = NDArray[np.float64]
_PART_ROWS = 1 << 20  # rows of one thread's turn
_THREADS = 4


def all_wrong(rewards_RN: Array) -> NDArray[np.bool_]:
    """[R] no reward above 0: what a filter leaves out, and adaptive sampling asks again before."""
    return rewards_RN.max(axis=1) <= 0


@dataclass(frozen=True)
class SamplesPerPrompt:
    """How many samples a prompt has."""

    fewest: int
    most: int
    mean: float

    def __str__(self) -> str:
        if self.fewest == self.most:
            return f"{self.most}"
        return f"{self.fewest} to {self.most} ({self.mean:.1f} on average)"


@dataclass(frozen=True)
class SampledRewards:
    """flat: [sum of n_p] rewards, prompt by prompt, in sample order. counts_P: [P] n_p."""

    flat: Array
    counts_P: NDArray[np.int64]

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[float]] | Array) -> SampledRewards:
        """From one sequence of rewards for each prompt, or a [P, N] array."""
        if isinstance(rows, np.ndarray):
            return cls(np.ascontiguousarray(rows, dtype=np.float64).reshape(-1), np.full(len(rows), rows.shape[1]))
        counts = np.array([len(row) for row in rows], dtype=np.int64)
        flat = np.concatenate([np.asarray(row, dtype=np.float64) for row in rows]) if len(rows) else np.empty(0)
        return cls(flat, counts)

    def __len__(self) -> int:
        return len(self.counts_P)

    @property
    def samples(self) -> SamplesPerPrompt:
        """How many there are; 0 of no prompts."""
        most = int(self.counts_P.max(initial=0))
        return SamplesPerPrompt(int(self.counts_P.min(initial=most)), most, len(self.flat) / max(len(self), 1))

    def known(self) -> SampledRewards:
        """Those that are not masked."""
        if not np.isnan(self.flat.min(initial=0.0)):
            return self
        known = ~np.isnan(self.flat)
        ends_P = np.cumsum(self.counts_P)
        before = np.concatenate([[0], np.cumsum(known)])
        return SampledRewards(self.flat[known], before[ends_P] - before[ends_P - self.counts_P])

    def blocks(self) -> Iterator[tuple[NDArray[np.intp] | slice, Array]]:
        """(rows, [R, n] rewards of those prompts), prompts of the same n together, at most 65,536 at a time; none of
        prompts without samples."""
        if not self.counts_P.any():
            return
        if self.counts_P.min() == self.counts_P.max():  # views, no copy
            matrix = self.flat.reshape(len(self), -1)
            for start in range(0, len(self), BLOCK_ROWS):
                yield slice(start, start + BLOCK_ROWS), matrix[start : start + BLOCK_ROWS]
            return
        starts_P = np.cumsum(self.counts_P) - self.counts_P
        for n in (np.flatnonzero(np.bincount(self.counts_P)[1:]) + 1).tolist():
            same = np.flatnonzero(self.counts_P == n)
            for start in range(0, len(same), BLOCK_ROWS):
                rows = same[start : start + BLOCK_ROWS]
                yield rows, self.flat[starts_P[rows][:, None] + np.arange(n)]

    def per_prompt(self, function: Callable[[Array], NDArray], dtype: type = np.float64) -> NDArray:
        """[P] what `function`, of [R, n] rewards to [R], says of each prompt; NaN, 0 or False where it has none."""
        found_P: NDArray = np.full(len(self), np.nan if dtype is np.float64 else 0, dtype=dtype)

        def fill(part: tuple[slice, SampledRewards]) -> None:
            prompts, rewards = part
            for rows, rewards_RN in rewards.blocks():
                found_P[prompts][rows] = function(rewards_RN)

        if len(self) <= _PART_ROWS:
            fill((slice(None), self))
        else:
            with ThreadPoolExecutor(_THREADS) as threads:  # numpy's loops release the interpreter
                for _ in threads.map(fill, self._parts()):
                    pass
        return found_P

    def _parts(self) -> Iterator[tuple[slice, SampledRewards]]:
        """Prompts one after another, 1,048,576 at a time, and views of their samples."""
        start = 0
        for first in range(0, len(self), _PART_ROWS):
            prompts = slice(first, first + _PART_ROWS)
            stop = start + int(self.counts_P[prompts].sum())
            yield prompts, SampledRewards(self.flat[start:stop], self.counts_P[prompts])
            start = stop

    def first(self, num_samples: int) -> SampledRewards:
        """The first `num_samples` of each prompt: what sampling no more than these would have given."""
        if not len(self) or self.counts_P.max() <= num_samples:
            return self
        kept_P = np.minimum(self.counts_P, num_samples)
        flat = np.empty(kept_P.sum())
        starts_P = np.cumsum(kept_P) - kept_P
        for rows, rewards_RN in self.blocks():
            kept_RN = rewards_RN[:, :num_samples]
            flat[starts_P[rows][:, None] + np.arange(kept_RN.shape[1])] = kept_RN
        return SampledRewards(flat, kept_P)

    def are_binary(self) -> bool:
        """Every reward is 0 or 1."""
        return all(((block == 0) | (block == 1)).all() for _, block in self.blocks())

    def num_right(self) -> NDArray[np.int64]:
        """[P] samples with a reward of at least 1."""
        return self.per_prompt(lambda rewards_RN: (rewards_RN >= 1).sum(axis=1), np.int64)
