"""Micro-batches: sequences laid out for one forward of the model.

Shapes: B sequences, S padded length, T tokens of a packed micro-batch, R response tokens of a micro-batch
(concatenated in sequence order: the positions whose label is not `IGNORE`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_apo.data.packing import padded_lengths
from megatron_apo.data.sequences import Sequences

IGNORE = -100  # a label that asks for no log-prob, as in torch's cross-entropy


@dataclass
class MicroBatch:
    """One forward of the model. Packed: B = 1, and `lengths` says where sequences begin.

    lengths: positions of the sequences that lie one after the other in a row, padding included.
    """

    indices: list[int]  # which sequences of the batch these are
    input_BS: Tensor
    position_BS: Tensor
    label_BS: Tensor  # next token, IGNORE where it is not part of a response
    sequence_R: Tensor  # position in `indices` of each response token
    lengths: tuple[int, ...]
    packed: bool

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`."""
        if device == self.input_BS.device:
            return self
        names = ("input_BS", "position_BS", "label_BS", "sequence_R")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **moved)


def make_micro_batch(
    indices: list[int],
    sequences: Sequences,
    packing: bool,
    multiple: int = 1,
    fill_to: int = 0,
    fill_multiple: int = 1,
) -> MicroBatch:
    """Lay out the rows `indices` of a batch, which must be held. No prompt and no response is empty.

    A sequence's last token is only a label, so that it takes one position fewer than it has tokens, which
    `padded_lengths` rounds up and fills up. Padding comes after its sequence, where causality keeps it from every token
    before, and has no label: it is in no sum.
    """
    rows = [sequences.row(index) for index in indices]
    prompt_lengths = [int(sequences.prompt_lengths_B[index]) for index in indices]
    widths = padded_lengths(
        [len(row) - 1 for row in rows], packing=packing, multiple=multiple, fill_to=fill_to, fill_multiple=fill_multiple
    )
    input_T, label_T = np.zeros(sum(widths), dtype=np.int64), np.full(sum(widths), IGNORE, dtype=np.int64)
    start = 0
    for row, prompt_length, width in zip(rows, prompt_lengths, widths, strict=False):  # further widths are padding
        end = start + len(row) - 1
        input_T[start:end] = row[:-1]
        label_T[start + prompt_length - 1 : end] = row[prompt_length:]
        start += width
    shape = (1 if packing else len(widths), -1)
    counts = torch.from_numpy(sequences.response_lengths_B[indices].astype(np.int64))
    return MicroBatch(
        indices=indices,
        input_BS=torch.from_numpy(input_T).view(shape),
        position_BS=torch.cat([torch.arange(width) for width in widths]).view(shape),
        label_BS=torch.from_numpy(label_T).view(shape),
        sequence_R=torch.repeat_interleave(torch.arange(len(indices)), counts),
        lengths=tuple(widths if packing else widths[:1]),
        packed=packing,
    )


def by_sequence(micro_batches: Sequence[MicroBatch], found: Sequence[Tensor]) -> dict[int, Tensor]:
    """Row of the batch -> a number for each of its response tokens. found: [R] of each micro-batch; nothing before the
    last pipeline stage, and then of no row."""
    rows: dict[int, Tensor] = {}
    for micro, value_R in zip(micro_batches, found, strict=bool(found)):
        lengths = torch.bincount(micro.sequence_R, minlength=len(micro.indices)).tolist()
        rows |= dict(zip(micro.indices, value_R.split(lengths), strict=True))
    return rows
