"""REINFORCE with a baseline, of whose sources (values/baselines.py) most do not depend on the response (Williams 1992).

    loss(x, y) = - w(y) A        gradient: - w(y) A grad log pi(y)
    A = r - kl_coefficient * log( pi_old(y) / pi_ref(y) ) - baseline(x)
    w(y) = pi(y) / pi_old(y)     of the whole response; 1 in the first minibatch, whose weights are those that sampled

In expectation over y ~ pi_old the gradient is that of -( E_pi r - kl_coefficient KL(pi || pi_ref) ) at pi = pi_old.
With V* as the baseline and b2 as the coefficient it is A*-PO's, divided by 2 b2.

In later minibatches w keeps the gradient of the expected reward unbiased, while the KL stays pi_old's. Nothing bounds
w, whose variance grows with the response's length: minibatches: 1 is the method, and of more PPO takes better care.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megatron_apo.objectives.base import (
    ADVANTAGE,
    OBJECTIVES,
    LogProbs,
    LossTerm,
    Micro,
    Objective,
    Prepared,
    Samples,
    Stats,
    TargetsBy,
    advantage_metrics,
    averaged,
)
from megatron_apo.objectives.kl import token_kl


@dataclass(frozen=True)
class REINFORCE(Objective):
    """kl_coefficient: of the KL in the reward; 0 needs no reference."""

    kl_coefficient: float = 0.0
    samples_per_prompt: int = 1

    loss_log_probs = frozenset({"old_policy"})
    takes_baseline = True
    importance_levels = ("token", "sequence")
    targets_by: ClassVar[TargetsBy] = "sequence"
    sequence_targets = ("advantage",)
    reinforce_scale = 1.0

    @property
    def target_log_probs(self) -> frozenset[LogProbs]:
        return frozenset({"old_policy", "reference"} if self.kl_coefficient else ())

    @property
    def told(self) -> frozenset[str]:
        kl = {"kl/in_reward"} if self.kl_coefficient else ()
        return ADVANTAGE.union({"value/mean", "ratio/mean"}, kl)

    def baseline(self, samples: Samples, reward_K: Tensor) -> Tensor:
        """[K] for these rewards, KL included."""
        assert samples.value_K is not None
        return samples.value_K

    def prepare(self, samples: Samples) -> Prepared:
        reward_K, metrics = samples.reward_K, {}
        if self.kl_coefficient:
            kl_K = samples.shared_sums(token_kl(samples))
            reward_K, metrics = reward_K - self.kl_coefficient * kl_K, {"kl/in_reward": float(kl_K.mean())}
        baseline_K = self.baseline(samples, reward_K)
        advantage_K = reward_K - baseline_K
        metrics = {**metrics, **advantage_metrics(advantage_K, baseline_K)}
        return Prepared({"advantage": advantage_K}, metrics=metrics)

    def loss(self, micro: Micro, prepared: Prepared) -> LossTerm:
        ratio_B = micro.sums(micro.value_R - micro.fixed["old_policy"]).exp()
        total = -(ratio_B * micro.of_sequences(prepared.per_sequence["advantage"])).sum()
        sums = {"loss": total.detach(), **averaged("ratio/mean", ratio_B)}
        return LossTerm(total, len(micro.places), Stats(sums))


OBJECTIVES["reinforce"] = REINFORCE
