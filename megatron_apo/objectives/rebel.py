"""REBEL: regression of the difference of two log-ratios onto the difference of their rewards (arXiv 2404.16767).

    s_i = log pi(y_i|x) / pi_old(y_i|x)          pi_old: the iterate at the start of the step; summed over the response
    loss(x) = ( (s_1 - s_2) / eta - (r_1 - r_2) )^2

With n > 2 samples it is the mean over all pairs of the group. By d_i = s_i / eta - r_i that is

    2 / (n (n-1)) sum_{i<j} (d_i - d_j)^2  =  2 / (n-1) sum_i (d_i - mean d)^2  =  1/n sum_i term_i

    term_i = 2n / (n-1) (d_i - mean d)^2

The loss is the sum of these terms over `count` sequences, so that it is the mean over groups, each by its size. A group
of one has no pair and is 0.

The mean is taken as a constant. The gradient is that of the whole all the same, the deviations from a mean being 0 in
sum: d/dd_i = 4 / (n-1) (d_i - mean d). So a sequence needs of its group's others their present log-ratios alone, and a
group may lie in one micro-batch or in several, with the same gradient. At the step's start it is 4 / eta times that of
REINFORCE with the leave-one-out mean as its baseline. The others enter a sequence's gradient by that mean alone, which
does not depend on the sequence, so that an importance weight of its own is all that it needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_apo.objectives.base import (
    ADVANTAGE,
    OBJECTIVES,
    LossTerm,
    Micro,
    Objective,
    Prepared,
    Samples,
    Stats,
    advantage_metrics,
)
from megatron_apo.objectives.group import group_mean, group_size


@dataclass(frozen=True)
class REBEL(Objective):
    """eta: the step towards pi_old * exp(eta r), which has loss 0. The default is that of the authors' scripts."""

    eta: float = 1.0
    samples_per_prompt: int = 2

    loss_log_probs = frozenset({"old_policy"})
    couples = True
    importance_levels = ("token", "sequence")
    targets_by = "group"
    sequence_targets = ("advantage", "group", "weight")
    told = ADVANTAGE

    @property
    def reinforce_scale(self) -> float:
        return 4 / self.eta

    def prepare(self, samples: Samples) -> Prepared:
        """advantage = r - mean r, weight = 2n / (n-1)."""
        advantage_K = samples.reward_K - group_mean(samples.reward_K, samples.group_K)
        size_K = group_size(samples.group_K).float()
        weight_K = (2 * size_K / (size_K - 1)).where(size_K > 1, 0)
        targets = {"advantage": advantage_K, "group": samples.group_K, "weight": weight_K}
        return Prepared(targets, metrics=advantage_metrics(advantage_K))

    def loss(self, micro: Micro, prepared: Prepared) -> LossTerm:
        log_ratio_B = micro.sums(micro.value_R - micro.fixed["old_policy"])
        mean_K = group_mean(micro.joined(log_ratio_B.detach()), prepared.per_sequence["group"])
        advantage_B = micro.of_sequences(prepared.per_sequence["advantage"])
        residual_B = (log_ratio_B - micro.of_sequences(mean_K)) / self.eta - advantage_B
        total = (micro.of_sequences(prepared.per_sequence["weight"]) * residual_B.square()).sum()
        return LossTerm(total, len(micro.places), Stats({"loss": total.detach()}))


OBJECTIVES["rebel"] = REBEL
