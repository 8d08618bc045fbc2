"""Baselines: what is taken off a step's rewards so that the gradient is less noisy, apart from any method.

    Offline         V* of the prompt from the store, by any estimator: the reference's, whatever the policy has become
    BatchMean       mean reward of the batch
    GroupMean       mean reward of the prompt's responses in this step (GRPO, arXiv 2402.03300)
    LeaveOneOut     the same without the response's own reward (RLOO, arXiv 2402.14740)
    KernelSmoothed  the prompt's own past beside its group's other responses (kernel.py)

A mean of n rewards, the response's own among them, makes the expected gradient of the reward 1 - 1/n times as long:
the other rewards do not depend on what this response was. That is how BatchMean and GroupMean are defined, so that a
batch's or a group's advantages add up to 0; in a group of one nothing is left to learn. What a method adds to the
rewards, such as a KL to the reference, is in no mean and keeps its length: beside the reward it then weighs n / (n-1)
times as much. The others leave the expected gradient as it is. Where LeaveOneOut and KernelSmoothed have nothing to go
by (a group of one, no past) they say the mean reward of the batch's other responses; 0, if there are none.

A response that is not learned from, or has no reward, is in no statistic and its baseline is NaN.
Shapes: B responses of a step, P groups of them, each of one prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_apo.values.samples import Array

Lookup = Callable[[Sequence[str]], Array]  # values of prompts by id: `PromptValues.lookup`


@dataclass(frozen=True)
class StepRewards:
    """The rewards of a step (from 0). known_B: which of them are in statistics; what is in reward_B elsewhere counts
    for nothing. group_B: 0 to P - 1, and prompts_P the ids of these groups' prompts."""

    step: int
    prompt_ids: Sequence[str]
    group_B: NDArray[np.intp]
    reward_B: Array
    known_B: NDArray[np.bool_]
    prompts_P: Sequence[str]

    @classmethod
    def of(
        cls, step: int, prompt_ids: Sequence[str], group_B: ArrayLike, reward_B: ArrayLike, learned_B: ArrayLike
    ) -> StepRewards:
        """Raises `ValueError` for a group of several prompts. A prompt may have several groups in a step."""
        rewards, learned = np.asarray(reward_B, dtype=np.float64), np.asarray(learned_B, dtype=bool)
        numbers, first_P, groups = np.unique(np.asarray(group_B), return_index=True, return_inverse=True)
        lengths = {len(column) for column in (prompt_ids, groups, rewards, learned)}
        if len(lengths) > 1:
            raise ValueError(f"step {step}: ids, groups, rewards and learned are of {sorted(lengths)} responses")
        prompts = [prompt_ids[row] for row in first_P]
        for prompt_id, group in zip(prompt_ids, groups, strict=True):
            if prompt_id != prompts[group]:
                raise ValueError(f"step {step}: group {numbers[group]} is of {prompts[group]} and of {prompt_id}")
        return cls(step, prompt_ids, groups, rewards, learned & ~np.isnan(rewards), prompts)

    @cached_property
    def totals(self) -> tuple[Array, NDArray[np.intp]]:
        """([P] sum, [P] number) of each group's rewards."""
        total_P, num_P = np.zeros(len(self.prompts_P)), np.zeros(len(self.prompts_P), dtype=np.intp)
        np.add.at(total_P, self.group_B[self.known_B], self.reward_B[self.known_B])
        np.add.at(num_P, self.group_B[self.known_B], 1)
        return total_P, num_P

    def others(self) -> tuple[Array, NDArray[np.intp]]:
        """([B] sum, [B] number) of the rewards of each response's group but its own."""
        return _sums_of_others(self.reward_B, self.group_B, self.known_B)

    def mean_of_others(self) -> Array:
        """[B] mean of the batch's rewards but one's own; 0 where there are none."""
        total_B, num_B = _sums_of_others(self.reward_B, np.zeros_like(self.group_B), self.known_B)
        return total_B / np.maximum(num_B, 1)


class Baseline(ABC):
    """A source of baselines. Each step it is asked for `values`, and then told by `update` that the step was taken.

    num_fallbacks: of the responses last asked for, those for which it had nothing to go by.
    """

    has_state: ClassVar[bool] = False  # goes from step to step: saved with the run

    def __init__(self) -> None:
        self.num_fallbacks = 0

    def values(
        self, step: int, prompt_ids: Sequence[str], group_B: ArrayLike, reward_B: ArrayLike, learned_B: ArrayLike
    ) -> Array:
        """[B] baselines of the responses of step `step` (from 0). Raises `ValueError` for what is no step's batch."""
        batch = StepRewards.of(step, prompt_ids, group_B, reward_B, learned_B)
        value_B = np.where(batch.known_B, self._values(batch), np.nan)
        without_B = batch.known_B & np.isnan(value_B)
        self.num_fallbacks = int(without_B.sum())
        if self.num_fallbacks:
            value_B[without_B] = batch.mean_of_others()[without_B]
        return value_B

    def update(
        self, step: int, prompt_ids: Sequence[str], group_B: ArrayLike, reward_B: ArrayLike, learned_B: ArrayLike
    ) -> None:
        """Take in what step `step` has brought."""
        if self.has_state:
            self._update(StepRewards.of(step, prompt_ids, group_B, reward_B, learned_B))

    def write(self, path: Path) -> None:
        """Write the state as a file, whole or not at all. Without state there is nothing to write, and no file."""
        assert not self.has_state

    def read(self, path: Path, next_step: int) -> None:
        """Go on as the source that wrote the file after the step before `next_step` would, bit for bit. Raises
        `ValueError` of one line for any other file. Without state there is nothing to read."""
        assert not self.has_state

    @abstractmethod
    def _values(self, batch: StepRewards) -> Array:
        """[B] baselines; NaN where there is nothing to go by. Anything where nothing is known of a response."""

    def _update(self, batch: StepRewards) -> None:
        raise NotImplementedError


class Offline(Baseline):
    """lookup: `PromptValues.lookup` of a store under the estimator that is wanted, whose errors are raised."""

    def __init__(self, lookup: Lookup):
        super().__init__()
        self._lookup = lookup

    def _values(self, batch: StepRewards) -> Array:
        value_B = np.full(len(batch.prompt_ids), np.nan)
        value_B[batch.known_B] = self._lookup([batch.prompt_ids[row] for row in np.flatnonzero(batch.known_B)])
        return value_B


class BatchMean(Baseline):
    def _values(self, batch: StepRewards) -> Array:
        known_K = batch.reward_B[batch.known_B]
        return np.full(len(batch.reward_B), known_K.mean() if len(known_K) else np.nan)


class GroupMean(Baseline):
    def _values(self, batch: StepRewards) -> Array:
        total_P, num_P = batch.totals
        return (total_P / np.maximum(num_P, 1))[batch.group_B]


class LeaveOneOut(Baseline):
    def _values(self, batch: StepRewards) -> Array:
        return ratio(*batch.others())


def ratio(total_B: Array, weight_B: ArrayLike) -> Array:
    """[B] a mean from its sum and weight; NaN of nothing."""
    with np.errstate(invalid="ignore"):
        return np.asarray(total_B / np.where(np.asarray(weight_B) > 0, weight_B, np.nan))


def _sums_of_others(
    reward_B: Array, group_B: NDArray[np.intp], known_B: NDArray[np.bool_]
) -> tuple[Array, NDArray[np.intp]]:
    """([B] sum, [B] number) of the known rewards of each row's group but its own.

    Those before and those after are added up: to take one's own off the sum of all would round by the size of one's
    own, whatever is left.
    """
    order_B = np.argsort(group_B, kind="stable")
    size_P = np.bincount(group_B)
    place_B = np.arange(len(group_B)) - np.repeat(np.cumsum(size_P) - size_P, size_P)
    sums = []
    for value_B in (np.where(known_B, reward_B, 0.0), known_B.astype(np.intp)):
        table_PG = np.zeros((len(size_P), size_P.max(initial=0) + 2), dtype=value_B.dtype)  # a column of 0 at each end
        table_PG[group_B[order_B], place_B + 1] = value_B[order_B]
        before_PG, after_PG = table_PG.cumsum(axis=1), table_PG[:, ::-1].cumsum(axis=1)[:, ::-1]
        sum_B = np.empty_like(value_B)
        sum_B[order_B] = before_PG[group_B[order_B], place_B] + after_PG[group_B[order_B], place_B + 2]
        sums.append(sum_B)
    return sums[0], sums[1]
