"""Micro-batches: sequences laid out for one forward of the model.

Shapes: B sequences, S padded length, T tokens of a packed micro-batch, R response tokens of a micro-batch
(concatenated in sequence order: the positions whose label is not `IGNORE`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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

    def gather(self, values: Sequence[Sequence[float]]) -> Tensor:
        """[R] fp32: the per-response-token `values` of these sequences (indexed as the batch), concatenated."""
        return torch.tensor([x for index in self.indices for x in values[index]], dtype=torch.float32)


def make_micro_batch(
    indices: list[int], prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], packing: bool
) -> MicroBatch:
    """Lay out the sequences `indices` of a batch. `prompts[i]` and `responses[i]` are token ids, neither empty.

    A sequence's last token is only a label, so sequence i takes len(prompt) + len(response) - 1 positions.
    """
    inputs, labels, lengths = [], [], []
    for index in indices:
        tokens = [*prompts[index], *responses[index]]
        inputs.append(tokens[:-1])
        labels.append([IGNORE] * (len(prompts[index]) - 1) + list(responses[index]))
        lengths.append(len(tokens) - 1)
    counts = torch.tensor([len(responses[index]) for index in indices])
    sequence_R = torch.repeat_interleave(torch.arange(len(indices)), counts)
    if packing:
        return MicroBatch(
            indices=indices,
            input_BS=torch.tensor([[token for row in inputs for token in row]]),
            position_BS=torch.cat([torch.arange(length) for length in lengths])[None],
            label_BS=torch.tensor([[label for row in labels for label in row]]),
            sequence_R=sequence_R,
            layout=PackedLayout.from_lengths(lengths),
        )
    width = max(lengths)
    return MicroBatch(
        indices=indices,
        input_BS=torch.tensor([row + [0] * (width - len(row)) for row in inputs]),
        position_BS=torch.arange(width).expand(len(indices), width),
        label_BS=torch.tensor([row + [IGNORE] * (width - len(row)) for row in labels]),
        sequence_R=sequence_R,
        layout=None,
    )
