"""Log-probabilities of given tokens from hidden states, the vocabulary split over tensor-parallel ranks.

    log p(y_t) = z_t[y_t] - logsumexp(z_t),   z_t = (hidden_t @ W^T) / temperature
    H_t        = logsumexp(z_t) - sum_v p_t[v] z_t[v],   the policy's entropy, when asked for
    q_t        = temperature z_t[y_t],                   the raw logit, when asked for

Logits exist a tile at a time, in fp32, and are computed again in the backward pass: the memory taken is a tile's and,
in backward, an fp32 gradient of the hidden states, whatever the vocabulary. Sums and products of bf16 weights are fp32
too. Reductions over the vocabulary are complete before anything downstream squares them.

torch's `linear_cross_entropy` does not serve: its softmax ends at this rank's rows, and its logits are C x V.

Shapes: T tokens, C tokens of a tile, H hidden, V this rank's rows of the output layer, S rows of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SLAB_ROWS = 4096  # vocabulary rows of a tile: with 2048 tokens, 32 MiB of logits, which stay in a cache


class _TiledLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        target_T: Tensor,
        num_rows: int,
        first_row: int,
        temperature: float,
        chunk: int,
        group: dist.ProcessGroup | None,
        entropy: bool,
        logit: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        max_T = hidden_TH.new_full(target_T.shape, float("-inf"), dtype=torch.float32)
        target_logit_T, sum_T = torch.zeros_like(max_T), torch.zeros_like(max_T)
        weighted_T = torch.zeros_like(max_T) if entropy else None
        buffer = _tile_buffer(hidden_TH, chunk, num_rows)
        for slab in _slices(num_rows, SLAB_ROWS):
            weight_SH = _operand(weight_VH[slab])
            for rows in _slices(len(target_T), chunk):
                logits_CS = _logits(hidden_TH[rows], weight_SH, temperature, buffer)
                local_C, own_C = _local_targets(target_T[rows], first_row + slab.start, len(weight_SH))
                target_logit_T[rows] += logits_CS.gather(1, local_C[:, None]).squeeze(1) * own_C
                # Sums so far are of exp(z - maximum so far).
                max_C = torch.maximum(max_T[rows], logits_CS.amax(dim=1))
                shrink_C = (max_T[rows] - max_C).exp_()
                max_T[rows] = max_C
                if weighted_T is None:
                    exp_CS = logits_CS.sub_(max_C[:, None]).exp_()
                else:
                    exp_CS = (logits_CS - max_C[:, None]).exp_()
                    weighted_T[rows] = weighted_T[rows] * shrink_C + logits_CS.mul_(exp_CS).sum(dim=1)
                sum_T[rows] = sum_T[rows] * shrink_C + exp_CS.sum(dim=1)
        shard_max_T = max_T.clone()
        _all_reduce(max_T, dist.ReduceOp.MAX, group)
        shrink_T = (shard_max_T - max_T).exp_()
        parts = [target_logit_T, sum_T * shrink_T] + ([] if weighted_T is None else [weighted_T * shrink_T])
        sums_KT = torch.stack(parts)
        _all_reduce(sums_KT, dist.ReduceOp.SUM, group)
        # Maximum and log-sum stay apart: their sum would round at the logits' magnitude.
        log_sum_T = sums_KT[1].log()
        ctx.save_for_backward(hidden_TH, weight_VH, target_T, max_T, sums_KT[1])
        ctx.main_grad = getattr(weight_VH, "main_grad", None)
        ctx.constants = (num_rows, first_row, temperature, chunk, group)
        log_prob_T = sums_KT[0] - max_T - log_sum_T
        logit_T = sums_KT[0] * temperature if logit else None
        if weighted_T is None:
            return log_prob_T, None, logit_T
        entropy_T = max_T - sums_KT[2] / sums_KT[1] + log_sum_T
        ctx.mark_non_differentiable(entropy_T)
        return log_prob_T, entropy_T, logit_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, target_T, max_T, sum_T = ctx.saved_tensors
        num_rows, first_row, temperature, chunk, group = ctx.constants
        grad_T = grads[0] / temperature
        grad_target_T = grad_T if grads[2] is None else grad_T + grads[2]
        grad_hidden_TH = torch.zeros_like(hidden_TH, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad_weight_VH = None
        if ctx.needs_input_grad[1]:
            grad_weight_VH = torch.zeros_like(weight_VH) if ctx.main_grad is None else ctx.main_grad
        buffer = _tile_buffer(hidden_TH, chunk, num_rows)
        for slab in _slices(num_rows, SLAB_ROWS):
            weight_SH = _operand(weight_VH[slab])
            grad_SH = None if grad_weight_VH is None else grad_weight_VH[slab].float()  # fp32 as it is, else a copy
            for rows in _slices(len(target_T), chunk):
                # d log p / d z = onehot(y) - softmax(z), d q / d (temperature z) = onehot(y)
                logits_CS = _logits(hidden_TH[rows], weight_SH, temperature, buffer)
                grad_logits_CS = logits_CS.sub_(max_T[rows, None]).exp_().mul_(-(grad_T[rows] / sum_T[rows])[:, None])
                local_C, own_C = _local_targets(target_T[rows], first_row + slab.start, len(weight_SH))
                grad_logits_CS.scatter_add_(1, local_C[:, None], (own_C * grad_target_T[rows])[:, None])
                grad_logits_CS = grad_logits_CS.to(weight_SH.dtype)
                if grad_hidden_TH is not None:
                    _multiply(grad_logits_CS, weight_SH, out=grad_hidden_TH[rows], beta=1)
                if grad_SH is not None:
                    _multiply(grad_logits_CS.T, _operand(hidden_TH[rows]), out=grad_SH, beta=1)
            if grad_weight_VH is not None and grad_SH.dtype != grad_weight_VH.dtype:
                grad_weight_VH[slab] = grad_SH
        if grad_hidden_TH is not None:
            _all_reduce(grad_hidden_TH, dist.ReduceOp.SUM, group)
            grad_hidden_TH = grad_hidden_TH.to(hidden_TH.dtype)
        return grad_hidden_TH, grad_weight_VH if ctx.main_grad is None else None, *[None] * 8


def vocab_parallel_log_probs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    *,
    first_row: int,
    temperature: float,
    chunk_tokens: int,
    group: dist.ProcessGroup | None,
    num_rows: int | None = None,
    entropy: bool = False,
    logit: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(fp32 log-probs [T] of `target_T`, entropies [T] if `entropy`, raw logits [T] of `target_T` if `logit`), equal on
    every rank of `group`.

    `weight_VH` holds rows `first_row ...` of the output layer; those after the first `num_rows` (none: all are used)
    are vocabulary padding. `hidden_TH` is the same on every rank; its gradient is summed over the group here. Entropies
    are in nats, of the distribution under `temperature`, without gradient.

    The gradient of a parameter that has Megatron's `main_grad` is added there, without rounding to the parameter's type
    and without a buffer; autograd then gets none. DDP's `overlap_grad_reduce`, which waits for one, is not supported.
    """
    return _TiledLogProbs.apply(
        hidden_TH,
        weight_VH,
        target_T,
        len(weight_VH) if num_rows is None else num_rows,
        first_row,
        temperature,
        chunk_tokens,
        group,
        entropy,
        logit,
    )


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _tile_buffer(hidden_TH: Tensor, chunk: int, num_rows: int) -> Tensor:
    """Room for the largest tile, used for each: fresh memory costs a page fault every 4 KiB."""
    return hidden_TH.new_empty(min(chunk, len(hidden_TH)) * min(SLAB_ROWS, num_rows), dtype=torch.float32)


def _logits(hidden_CH: Tensor, weight_SH: Tensor, temperature: float, buffer: Tensor) -> Tensor:
    shape = len(hidden_CH), len(weight_SH)
    logits_CS = buffer[: shape[0] * shape[1]].view(shape)
    return _multiply(_operand(hidden_CH), weight_SH.T, out=logits_CS, alpha=1 / temperature)


def _operand(tensor: Tensor) -> Tensor:
    """What `_multiply` takes: on GPUs the tensor itself, elsewhere fp32."""
    return tensor if tensor.is_cuda else tensor.float()


def _multiply(left: Tensor, right: Tensor, *, out: Tensor, alpha: float = 1, beta: float = 0) -> Tensor:
    """out = beta out + alpha left @ right, summed and kept in fp32. Returns `out`."""
    if left.dtype == out.dtype:
        return out.addmm_(left, right, alpha=alpha, beta=beta)
    return torch.addmm(out, left, right, out_dtype=out.dtype, alpha=alpha, beta=beta, out=out)


def _local_targets(target_C: Tensor, first_row: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """(row within these, clamped; 1.0 where the target is one of these)."""
    local_C = target_C - first_row
    own_C = ((local_C >= 0) & (local_C < num_rows)).float()
    return local_C.clamp(0, num_rows - 1), own_C


def _all_reduce(tensor: Tensor, op: Any, group: dist.ProcessGroup | None) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
