"""Which responses of a batch are learned from: by `reward.truncated=mask` not those that were cut at the length cap.

A masked response has no reward. It is in no target, no loss and not in the count that divides the gradient, whatever
the method: an objective is given the others alone. What is told of policy, reference and sampler needs no reward, and
is of all responses. Source: the overlong filtering of DAPO (arXiv 2503.14476, section 3.4).

Shapes: B responses of the batch, K of them learned from, R response tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_apo.config import Recipe
from megatron_apo.data.batch import MicroBatch
from megatron_apo.data.rollouts import RolloutBatch


@dataclass(frozen=True)
class Part:
    """What is learned from of a micro-batch. places: of its sequences among the K. token_R: which response tokens are
    theirs. sequence_R: the position in `places` of each of these tokens."""

    places: list[int]
    token_R: slice | Tensor
    sequence_R: Tensor


@dataclass(frozen=True)
class Learned:
    """The K responses of a batch that are learned from; the same on every rank. masked_B: the others."""

    masked_B: NDArray[np.bool_]

    @classmethod
    def of(cls, recipe: Recipe, batch: RolloutBatch) -> Learned:
        """By the recipe's rule."""
        return cls(batch.masked_B(recipe.reward.truncated))

    @property
    def rows(self) -> list[int]:
        """[K] of the batch."""
        return np.flatnonzero(~self.masked_B).tolist()

    @cached_property
    def place_of(self) -> dict[int, int]:
        """Row of the batch -> its place among the K, of those that are learned from."""
        return {row: place for place, row in enumerate(self.rows)}

    def has_any(self, minibatch: Sequence[Sequence[Iterable[int]]]) -> bool:
        """Of the rows [replica][micro-batch] of a minibatch."""
        return any(not self.masked_B[row] for rank in minibatch for rows in rank for row in rows)

    def part(self, micro: MicroBatch) -> Part:
        masked = self.masked_B[micro.indices]
        places = [self.place_of[row] for row in micro.indices if row in self.place_of]
        if len(places) == len(micro.indices):
            return Part(places, slice(None), micro.sequence_R)
        known = torch.from_numpy(~masked).to(micro.sequence_R.device)
        token_R = known[micro.sequence_R]
        return Part(places, token_R, (known.cumsum(0) - 1)[micro.sequence_R[token_R]])
