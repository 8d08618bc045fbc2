"""Truncated importance weights: what the sampler drew too often counts less, what it drew too rarely more, up to a cap.

    token      w_t = min(pi_old(y_t) / pi_sampler(y_t), cap)
    sequence   w_t = min(pi_old(y) / pi_sampler(y), cap)      of the whole response, for each of its tokens

pi_old is the policy at the weights that sampled, as the trainer computes it, so that the weights undo what engine and
trainer compute differently, and nothing of what was learned since: that is the objective's own matter. They carry no
gradient. Source: the truncated importance sampling of "Your Efficient RL Framework Secretly Brings You Off-Policy RL
Training" (Yao et al. 2025), cap 2, by token; by sequence as in verl and TRL.

A weight multiplies what reaches its token's log-prob in the gradient of the loss. For a loss that is a sum of a term
for each sequence, `sequence` is the gradient of w(y) x that term: A*-PO's squared error, weighted. `token` is A*-PO's
gradient

    2 b2 (b2 log(pi/pi_ref) + V* - r) sum_t w_t grad log pi(y_t)

with the residual of the whole response as it is: the square is not taken apart. The loss's value, which is only told,
stays that of the unweighted loss, so that runs with and without weights can be compared.

Shapes: R response tokens of a micro-batch, B its sequences.
"""

from __future__ import annotations

from torch import Tensor

from megatron_apo.objectives.base import ImportanceLevel, Stats, sequence_sum


def importance_weights(
    level: ImportanceLevel, cap: float, old_R: Tensor, sampler_R: Tensor, sequence_R: Tensor, num_sequences: int
) -> tuple[Tensor, Stats]:
    """([R] weights, sums over the level's units of weights and of those that the cap cut).

    old_R, sampler_R: log-probs without gradient. A difference that is no number is no number here either.
    """
    log_ratio_R = old_R - sampler_R
    if level == "sequence":
        ratio = sequence_sum(log_ratio_R, sequence_R, num_sequences).exp()
    else:
        ratio = log_ratio_R.exp()
    weight = ratio.clamp(max=cap)
    one = weight.new_ones(())
    sums = {
        "importance": weight.sum(),
        "importance_capped": (ratio > cap).sum() * one,
        "importance_units": one * len(weight),
    }
    return weight[sequence_R] if level == "sequence" else weight, Stats(sums)


def weight_gradient(log_prob_R: Tensor, weight_R: Tensor) -> Tensor:
    """The same log-probs, whose gradient is multiplied by the weights on its way back."""
    fixed_R = log_prob_R.detach()
    return fixed_R + weight_R * (log_prob_R - fixed_R)  # the difference is 0
