"""Forward and backward over Megatron-Core's pipeline schedules, for micro-batches that differ in length.

    forward_log_probs(model, micro_batches)             no gradient; log-probs on the last stage
    forward_backward(model, micro_batches, loss)        gradients into main_grad, divided by the global count

All ranks of a replica call these together, with the same micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_apo.data.batch import MicroBatch
from megatron_apo.model.build import IGNORE
from megatron_apo.objectives.base import LossTerm, Stats

# loss(log_prob_R with gradient, index of the micro-batch) -> LossTerm
MicroLoss = Callable[[Tensor, int], LossTerm]


def forward_log_probs(model: torch.nn.Module, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
    """Log-probs [R] of each micro-batch's response tokens, on the last stage; an empty list on the others."""

    def step(iterator: Iterator[tuple[int, MicroBatch]], module: torch.nn.Module):
        _, micro = next(iterator)

        def collect(log_prob_BS: Tensor, non_loss_data: bool) -> Tensor:
            return log_prob_BS[micro.label_BS != IGNORE]

        return _forward(module, micro), collect

    with torch.no_grad():
        return _schedule(step, model, micro_batches, forward_only=True, collect_non_loss_data=True)


def forward_backward(model: torch.nn.Module, micro_batches: Sequence[MicroBatch], loss: MicroLoss) -> list[Stats]:
    """Accumulate gradients of sum(total) / global sum(count). Returns the `Stats` of each micro-batch (last stage)."""

    def step(iterator: Iterator[tuple[int, MicroBatch]], module: torch.nn.Module):
        index, micro = next(iterator)

        def reduce(log_prob_BS: Tensor):
            term = loss(log_prob_BS[micro.label_BS != IGNORE], index)
            return term.total, torch.tensor(term.count, dtype=torch.int, device=log_prob_BS.device), term.stats

        return _forward(module, micro), reduce

    return _schedule(step, model, micro_batches, forward_only=False)


def _forward(module: torch.nn.Module, micro: MicroBatch) -> Tensor:
    return module(micro.input_BS, micro.position_BS, None, labels=micro.label_BS, packed_seq_params=micro.layout)


def _schedule(step: Callable, model: torch.nn.Module, micro_batches: Sequence[MicroBatch], **options: bool) -> list:
    results = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(enumerate(micro_batches)),
        model=[model],
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0].input_BS.shape[1],  # only a hint: lengths are exchanged between stages
        micro_batch_size=micro_batches[0].input_BS.shape[0],
        **options,
    )
    return list(results)
