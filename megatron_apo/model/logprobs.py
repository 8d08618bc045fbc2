"""Log-probabilities of given tokens from hidden states, the vocabulary split over tensor-parallel ranks.

    log p(y_t) = z_t[y_t] - logsumexp(z_t),   z_t = (hidden_t @ W^T) / temperature

Logits exist for one chunk of tokens at a time, in fp32, and are computed again in the backward pass: memory is
chunk x vocabulary / TP instead of tokens x vocabulary x 3. Reductions over the vocabulary are complete before
anything downstream squares them.

Shapes: T tokens, C tokens of a chunk, H hidden, V this rank's vocabulary rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        target_T: Tensor,
        first_row: int,
        temperature: float,
        chunk: int,
        group,
    ) -> Tensor:
        log_prob_T = torch.empty(len(target_T), dtype=torch.float32, device=hidden_TH.device)
        max_T, log_sum_T = torch.empty_like(log_prob_T), torch.empty_like(log_prob_T)
        for start in range(0, len(target_T), chunk):
            rows = slice(start, start + chunk)
            logits_CV = _logits(hidden_TH[rows], weight_VH, temperature)
            local_C, own_C = _local_targets(target_T[rows], first_row, len(weight_VH))
            max_C = logits_CV.amax(dim=1)
            _all_reduce(max_C, dist.ReduceOp.MAX, group)
            logits_CV.sub_(max_C[:, None])
            target_logit_C = logits_CV.gather(1, local_C[:, None]).squeeze(1) * own_C
            sums_2C = torch.stack([logits_CV.exp_().sum(dim=1), target_logit_C])
            _all_reduce(sums_2C, dist.ReduceOp.SUM, group)
            max_T[rows] = max_C
            log_sum_T[rows] = sums_2C[0].log()
            log_prob_T[rows] = sums_2C[1] - log_sum_T[rows]
        # Maximum and log-sum stay apart: their sum would round at the logits' magnitude.
        ctx.save_for_backward(hidden_TH, weight_VH, target_T, max_T, log_sum_T)
        ctx.constants = (first_row, temperature, chunk, group)
        return log_prob_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_T,) = grads
        hidden_TH, weight_VH, target_T, max_T, log_sum_T = ctx.saved_tensors
        first_row, temperature, chunk, group = ctx.constants
        grad_hidden_TH = torch.empty_like(hidden_TH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        for start in range(0, len(target_T), chunk):
            rows = slice(start, start + chunk)
            # d log p / d z = onehot(y) - softmax(z)
            logits_CV = _logits(hidden_TH[rows], weight_VH, temperature)
            grad_logits_CV = logits_CV.sub_(max_T[rows, None]).sub_(log_sum_T[rows, None]).exp_().neg_()
            local_C, own_C = _local_targets(target_T[rows], first_row, len(weight_VH))
            grad_logits_CV.scatter_add_(1, local_C[:, None], own_C[:, None])
            grad_logits_CV.mul_(grad_T[rows, None] / temperature)
            grad_weight_VH.addmm_(grad_logits_CV.T, hidden_TH[rows].float())
            grad_hidden_TH[rows] = (grad_logits_CV @ weight_VH.float()).to(hidden_TH.dtype)
        _all_reduce(grad_hidden_TH, dist.ReduceOp.SUM, group)
        return grad_hidden_TH, grad_weight_VH.to(weight_VH.dtype), None, None, None, None, None


def vocab_parallel_log_probs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    *,
    first_row: int,
    temperature: float,
    chunk_tokens: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """fp32 log-probs [T] of `target_T`, equal on every rank of `group`.

    `weight_VH` holds rows `first_row ...` of the output layer, without vocabulary padding. `hidden_TH` is the same on
    every rank; its gradient is summed over the group here.
    """
    return _ChunkedLogProbs.apply(hidden_TH, weight_VH, target_T, first_row, temperature, chunk_tokens, group)


def _logits(hidden_CH: Tensor, weight_VH: Tensor, temperature: float) -> Tensor:
    logits_CV = (hidden_CH @ weight_VH.T).float()
    return logits_CV if temperature == 1.0 else logits_CV.div_(temperature)


def _local_targets(target_C: Tensor, first_row: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """(row within this shard, clamped; 1.0 where this shard owns the target)."""
    local_C = target_C - first_row
    own_C = ((local_C >= 0) & (local_C < num_rows)).float()
    return local_C.clamp(0, num_rows - 1), own_C


def _all_reduce(tensor: Tensor, op: Any, group: dist.ProcessGroup | None) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
