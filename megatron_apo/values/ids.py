"""Prompt ids, 128 bits each, as pairs of numbers, and where in a store each of them is. P rows, W ids asked for."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

HASH_BYTES = 16  # ids and text hashes are 128 bit
BLOCK_ROWS = 1 << 16  # rows handled at once: bounds the temporaries of a large store
Ids = NDArray[np.uint64]  # [.., 2] halves, the first one leading


class RowsById:
    """Rows by their ids.

    One sorted array holds, for each row, its id's leading bits and below them its number: plain numbers sort several
    times faster than an order of rows is found. Ids that share the leading bits, which are few, are compared whole.
    """

    def __init__(self, ids_P2: Ids):
        self._ids_P2 = ids_P2
        self._row_bits = np.uint64((1 << max(len(ids_P2) - 1, 1).bit_length()) - 1)
        self._sorted_P = np.empty(len(ids_P2), dtype=np.uint64)
        for start in range(0, len(ids_P2), BLOCK_ROWS):
            block = slice(start, min(start + BLOCK_ROWS, len(ids_P2)))
            self._sorted_P[block] = ids_P2[block, 0] & ~self._row_bits | np.arange(start, block.stop, dtype=np.uint64)
        self._sorted_P.sort()

    def find(self, wanted_W2: Ids) -> NDArray[np.intp]:
        """[W] rows; -1 where an id is not there."""
        position_W = np.searchsorted(self._sorted_P, wanted_W2[:, 0] & ~self._row_bits)
        found_W = np.full(len(wanted_W2), -1, dtype=np.intp)
        # Almost always one round: as many as ids share their leading bits.
        while (open_ := np.flatnonzero((found_W < 0) & (position_W < len(self._sorted_P)))).size:
            candidates = self._sorted_P[position_W[open_]]
            rows = self._rows(candidates)
            same = (self._ids_P2[rows] == wanted_W2[open_]).all(axis=1)
            found_W[open_[same]] = rows[same]
            position_W[open_] += 1
            past = (candidates ^ wanted_W2[open_, 0]) > self._row_bits
            position_W[open_[past]] = len(self._sorted_P)
        return found_W

    def repeated(self) -> NDArray[np.intp]:
        """[R, 2] pairs of rows that have the same id."""
        blocks = range(0, len(self._sorted_P), BLOCK_ROWS)
        near = np.concatenate([np.empty(0, dtype=np.intp), *(self._near(start) for start in blocks)])
        rows = self._rows(self._sorted_P[np.union1d(near, near + 1)])
        rows = rows[np.lexsort((rows, self._ids_P2[rows, 1], self._ids_P2[rows, 0]))]
        same = (self._ids_P2[rows[1:]] == self._ids_P2[rows[:-1]]).all(axis=1)
        return np.stack([rows[:-1][same], rows[1:][same]], axis=1)

    def _near(self, start: int) -> NDArray[np.intp]:
        """Places in a block from `start` whose id shares its leading bits with the next one's."""
        block = self._sorted_P[start : start + BLOCK_ROWS + 1]
        return start + np.flatnonzero((block[1:] ^ block[:-1]) <= self._row_bits)

    def _rows(self, entries: NDArray[np.uint64]) -> NDArray[np.intp]:
        return (entries & self._row_bits).astype(np.intp)


def ids_of_hex(prompt_ids: Iterable[str]) -> Ids:
    data = b"".join(bytes.fromhex(prompt_id) for prompt_id in prompt_ids)
    return np.frombuffer(data, dtype=">u8").reshape(-1, 2).astype(np.uint64)


def hex_of_ids(ids: Ids) -> list[str]:
    text = ids.astype(">u8").tobytes().hex()
    return [text[i : i + 2 * HASH_BYTES] for i in range(0, len(text), 2 * HASH_BYTES)]
