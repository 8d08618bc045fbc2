"""Prompts and responses of a batch as flat arrays. A rank knows the length of each, and may hold the tokens of some.

Shapes: B rows of the batch, H of them held here, T tokens of those, R response tokens of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Int32s = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Sequences:
    """`token_ids_T`: of the rows `held_H` (ascending), one after the other, each a prompt and then its response."""

    prompt_lengths_B: Int32s
    response_lengths_B: Int32s
    held_H: NDArray[np.int64]
    token_ids_T: Int32s

    def __post_init__(self) -> None:
        num_tokens = int(self.num_tokens_B[self.held_H].sum())
        assert num_tokens == len(self.token_ids_T), f"{len(self.token_ids_T)} tokens for lengths of {num_tokens}"

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Sequences:
        """A batch that is held whole. `prompts[i]` and `responses[i]` are token ids."""
        pairs = zip(prompts, responses, strict=True)
        rows = [np.asarray(ids, dtype=np.int32) for pair in pairs for ids in pair]
        return cls(
            prompt_lengths_B=np.array([len(prompt) for prompt in prompts], dtype=np.int32),
            response_lengths_B=np.array([len(response) for response in responses], dtype=np.int32),
            held_H=np.arange(len(prompts)),
            token_ids_T=np.concatenate([np.empty(0, dtype=np.int32), *rows]),
        )

    def __len__(self) -> int:
        return len(self.prompt_lengths_B)

    @property
    def num_tokens_B(self) -> Int32s:
        return self.prompt_lengths_B + self.response_lengths_B

    @property
    def positions_B(self) -> Int32s:
        """Positions that each takes in the model, where the last token is a label alone."""
        return self.num_tokens_B - 1

    def row(self, index: int) -> Int32s:
        """Prompt and response of a row that is held."""
        start = self._starts_B[index]
        assert start >= 0, f"row {index} is not held here"
        return self.token_ids_T[start : start + self.num_tokens_B[index]]

    def prompt(self, index: int) -> Int32s:
        return self.row(index)[: self.prompt_lengths_B[index]]

    def response(self, index: int) -> Int32s:
        return self.row(index)[self.prompt_lengths_B[index] :]

    def select(self, rows: Sequence[int]) -> Sequences:
        """The same batch with the tokens of `rows` (ascending) alone; they must be held."""
        pieces = [np.empty(0, dtype=np.int32), *(self.row(index) for index in rows)]
        held = np.asarray(rows, dtype=np.int64)
        return Sequences(self.prompt_lengths_B, self.response_lengths_B, held, np.concatenate(pieces))

    @cached_property
    def _starts_B(self) -> NDArray[np.int64]:
        """Where each row begins in `token_ids_T`; -1 where it is not held."""
        return starts_of(self.num_tokens_B, self.held_H)


def starts_of(lengths_B: Int32s, held_H: NDArray[np.int64]) -> NDArray[np.int64]:
    """[B] where each row's values begin, those of the rows `held_H` lying one after the other; -1 for other rows."""
    starts_B = np.full(len(lengths_B), -1, dtype=np.int64)
    sizes_H = lengths_B[held_H].astype(np.int64)
    starts_B[held_H] = np.cumsum(sizes_H) - sizes_H
    return starts_B
