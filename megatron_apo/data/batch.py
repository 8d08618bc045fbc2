"""Micro-batches: sequences laid out for one forward of the model.

Shapes: B sequences, S padded length, T tokens of a packed micro-batch, R response tokens of a micro-batch
(concatenated in sequence order: the positions whose label is not `IGNORE`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_apo.data.packing import laid_out
from megatron_apo.model.attention import PackedLayout
from megatron_apo.model.build import IGNORE


@dataclass
class MicroBatch:
    """One forward of the model. Packed: B = 1 and `layout` says where sequences begin."""

    indices: list[int]  # which sequences of the batch these are
    input_BS: Tensor
    position_BS: Tensor
    label_BS: Tensor  # next token, IGNORE where it is not part of a response
    sequence_R: Tensor  # position in `indices` of each response token
    layout: PackedLayout | None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions of the sequences that lie one after the other in a row, padding included."""
        return self.layout.lengths if self.layout else (self.input_BS.shape[1],)

    def gather(self, values: Sequence[Sequence[float]]) -> Tensor:
        """[R] fp32: the per-response-token `values` of these sequences (indexed as the batch), concatenated."""
        flat = [x for index in self.indices for x in values[index]]
        return torch.tensor(flat, dtype=torch.float32, device=self.input_BS.device)

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`."""
        if device == self.input_BS.device:
            return self
        names = ("input_BS", "position_BS", "label_BS", "sequence_R")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **moved, layout=self.layout and self.layout.to(device))


def make_micro_batch(
    indices: list[int],
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    packing: bool,
    multiple: int = 1,
    fill_to: int = 0,
    fill_multiple: int = 1,
) -> MicroBatch:
    """Lay out the sequences `indices` of a batch. `prompts[i]` and `responses[i]` are token ids, neither empty.

    A sequence's last token is only a label, so sequence i has len(prompt) + len(response) - 1 positions, which
    `laid_out` rounds up and fills up. Padding comes after its sequence, where causality keeps it from every token
    before, and has no label: it is in no sum.
    """
    inputs, labels = [], []
    for index in indices:
        inputs.append([*prompts[index], *responses[index]][:-1])
        labels.append([IGNORE] * (len(prompts[index]) - 1) + list(responses[index]))
    widths = laid_out(
        list(map(len, inputs)), packing=packing, multiple=multiple, fill_to=fill_to, fill_multiple=fill_multiple
    )
    shape = (1 if packing else len(widths), -1)
    counts = torch.tensor([len(responses[index]) for index in indices])
    return MicroBatch(
        indices=indices,
        input_BS=_rows(inputs, widths, 0).view(shape),
        position_BS=torch.cat([torch.arange(width) for width in widths]).view(shape),
        label_BS=_rows(labels, widths, IGNORE).view(shape),
        sequence_R=torch.repeat_interleave(torch.arange(len(indices)), counts),
        layout=PackedLayout.from_lengths(widths) if packing else None,
    )


def _rows(rows: list[list[int]], widths: list[int], fill: int) -> Tensor:
    """`rows` one after the other, each filled up to its width; further widths have no row."""
    found, start = torch.full((sum(widths),), fill), 0
    for row, width in zip(rows, widths, strict=False):
        found[start : start + len(row)] = torch.tensor(row)
        start += width
    return found
