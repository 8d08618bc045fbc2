"""Log-probs of a batch's tokens by others than the policy that learns: computed once, before the first optimizer step.

Shapes: R response tokens of a micro-batch. Before the last pipeline stage there are no log-probs, and lists are empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_apo.data.batch import MicroBatch
from megatron_apo.objectives.base import LogProbs


@dataclass(frozen=True)
class KnownLogProbs:
    """found: name -> [minibatch][micro-batch] log-probs [R] without gradient; None for a minibatch whose own forward
    pass gives them."""

    found: Mapping[LogProbs, Sequence[Sequence[Tensor] | None]]

    def of(self, minibatch: int, index: int, log_prob_R: Tensor) -> dict[LogProbs, Tensor]:
        """[R] each, of a micro-batch of which the policy's own forward pass gave `log_prob_R`."""
        parts = {name: values[minibatch] for name, values in self.found.items()}
        return {name: log_prob_R.detach() if part is None else part[index] for name, part in parts.items()}

    def whole(self, name: LogProbs, minibatch: int | None = None) -> list[Tensor]:
        """[R] of each micro-batch of all minibatches, or of one; all must have been computed."""
        minibatches = self.found[name] if minibatch is None else [self.found[name][minibatch]]
        found = []
        for part in minibatches:
            assert part is not None, f"log-probs of {name} were left to a forward pass"
            found += part
        return found


def by_minibatch(found: Iterable[Tensor], minibatches: Sequence[Sequence[MicroBatch]]) -> list[list[Tensor] | None]:
    """[minibatch][micro-batch], of one tensor after the other; all empty before the last stage, which has none."""
    found, count = list(found), sum(map(len, minibatches))
    assert len(found) in (0, count), f"{len(found)} micro-batches were computed, of {count}"
    each = iter(found or [torch.empty(0)] * count)
    return [[next(each) for _ in minibatch] for minibatch in minibatches]
