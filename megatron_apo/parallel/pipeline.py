"""Forward and backward over Megatron-Core's pipeline schedules, for micro-batches that differ in length.

    forward_only(chunks, micro_batches)                 no gradient; outputs on the last stage
    forward_backward(chunks, micro_batches, loss)       gradients into main_grad, divided by the global count

    gradient = OpenGradient(chunks)                     the same in several calls
    forward_backward(chunks, micro_batches, loss, gradient) ..
    gradient.close()

An output is a number for each response token: the policy's log-prob of it, or the critic's value of the state before it
(`TokenModel`). All ranks of a replica call these together, with the same micro-batches. `chunks` are the rank's model
chunks (one, or `parallel.vpp`), wrapped for training or not. Context-parallel ranks each compute their positions of a
micro-batch; the outputs are whole on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from megatron_apo.data.batch import IGNORE, MicroBatch
from megatron_apo.model.attention import PackedLayout
from megatron_apo.model.context import ContextSplit, context_split
from megatron_apo.objectives.base import LossTerm, Stats

# loss(output_R with gradient, index of the micro-batch) -> LossTerm
MicroLoss = Callable[[Tensor, int], LossTerm]


class OpenGradient:
    """The gradient of several `forward_backward` calls: bit for bit that of one with their micro-batches in that order.

    Calls with it only add to main_grad and to the count; `close` reduces over the ranks and divides by the global
    count, once. Replicas may call any number of times, also never, and between calls anything may happen that leaves
    main_grad alone. Several calls take one chunk a rank, and no expert ranks, which have to call equally often; and
    any number takes gradients that are not reduced as they come (overlap_grad_reduce).
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]):
        self._chunks = list(chunks)
        self._count = torch.zeros([], dtype=torch.int, device=next(chunks[0].parameters()).device)

    @contextmanager
    def added_to(self) -> Iterator[None]:
        """Within: Megatron-Core's schedules leave their gradients open and add their counts to this one's."""
        config = get_model_config(self._chunks[0])
        finalize = config.finalize_model_grads_func

        def count(_: object, num_tokens: Tensor, **__: object) -> None:
            self._count += num_tokens

        config.finalize_model_grads_func = count
        try:
            yield
        finally:
            config.finalize_model_grads_func = finalize

    def close(self) -> None:
        """Collective."""
        get_model_config(self._chunks[0]).finalize_model_grads_func(self._chunks, self._count)


def forward_only(chunks: Sequence[torch.nn.Module], micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
    """Outputs [R] of each micro-batch's response tokens, on the last stage; an empty list on the others."""

    def step(iterator: Iterator[tuple[int, MicroBatch]], module: torch.nn.Module):
        _, micro = next(iterator)
        part, split = _forward(module, micro)

        def collect(output_BL: Tensor, non_loss_data: bool) -> Tensor:
            return _of_responses(output_BL, split, micro)

        return part, collect

    with torch.no_grad():
        return _schedule(step, chunks, micro_batches, forward_only=True, collect_non_loss_data=True)


def forward_backward(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    loss: MicroLoss,
    gradient: OpenGradient | None = None,
) -> list[Stats]:
    """Accumulate gradients of sum(total) / global sum(count). Returns the `Stats` of each micro-batch (last stage).

    gradient: to which they are added, in place of being reduced and divided.
    """
    counts_here = parallel_state.get_context_parallel_rank() == 0  # the ranks of one context have the same loss

    def step(iterator: Iterator[tuple[int, MicroBatch]], module: torch.nn.Module):
        index, micro = next(iterator)
        part, split = _forward(module, micro)

        def reduce(output_BL: Tensor):
            term = loss(_of_responses(output_BL, split, micro), index)
            sums = get_attr_wrapped_model(module, "sums")
            if split:
                for value in sums.values():
                    dist.all_reduce(value, group=split.group)
            count = torch.tensor(term.count * counts_here, dtype=torch.int, device=output_BL.device)
            return term.total, count, replace(term.stats, sums={**term.stats.sums, **sums})

        return part, reduce

    with gradient.added_to() if gradient else nullcontext():
        return _schedule(step, chunks, micro_batches, forward_only=False)


def _forward(module: torch.nn.Module, micro: MicroBatch) -> tuple[Tensor, ContextSplit | None]:
    """This rank's positions of the micro-batch through the chunk; the split is None where there is one context rank."""
    split = context_split(micro.lengths, parallel_state.get_context_parallel_group(), micro.input_BS.device)
    tensors = (micro.input_BS, micro.position_BS, micro.label_BS)
    if split:
        tensors = tuple(split.take(tensor, 1) for tensor in tensors)
    input_BL, position_BL, label_BL = tensors
    layout = PackedLayout.of(micro)
    return module(input_BL, position_BL, None, labels=label_BL, packed_seq_params=layout), split


def _of_responses(output_BL: Tensor, split: ContextSplit | None, micro: MicroBatch) -> Tensor:
    """[R], from all context-parallel ranks: the square in the loss is of a whole sequence's sum."""
    if split:
        output_BL = split.whole(output_BL.transpose(0, 1).contiguous(), shared_gradient=True).transpose(0, 1)
    return output_BL[micro.label_BS != IGNORE]


def _schedule(
    step: Callable, chunks: Sequence[torch.nn.Module], micro_batches: Sequence[MicroBatch], **options: bool
) -> list:
    if not micro_batches:
        return []
    iterators = [iter(enumerate(micro_batches)) for _ in chunks]
    if len(chunks) > 1:  # stages take what the first says for the shape of all, and would wait for the rest for good
        assert len({micro.input_BS.shape for micro in micro_batches}) == 1, "interleaved micro-batches differ in shape"
    results = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0].input_BS.shape[1],  # only a hint with one chunk: lengths are exchanged
        micro_batch_size=micro_batches[0].input_BS.shape[0],
        **options,
    )
    return list(results)
