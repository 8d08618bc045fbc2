"""GRPO and its variants: the clipped surrogate, with an advantage from the group's own rewards.

    A_i = (r_i - mean r) / (std r + 1e-6)                               of the group, the same for all tokens
    loss_it = -surrogate(pi / pi_old of token t, A_i) + kl_coefficient * k3_t(pi || pi_ref)

    grpo      A as above; mean over a response's tokens, then over responses    arXiv 2402.03300, equations 3 and 4
    dr_grpo   A without std; sum over tokens / max_response_tokens, no KL       2503.20783
    dapo      mean over all tokens; clip .2/.28, dynamic sampling, no KL        2503.14476

The token mean is over the tokens of the optimizer's batch, where DAPO's equation 8 takes a group's. std has n - 1 in
its denominator. k3's gradient is that of KL(pi_ref || pi); `kl_estimator: k2` has KL(pi || pi_ref)'s (kl.py).

Dynamic sampling: a group whose rewards are all equal has no gradient, and another prompt is drawn in its place.
Over-long penalty, added to the reward (2503.14476, equation 13): 0 up to max_response_tokens - buffer, from there down
linearly to -overlong_penalty at max_response_tokens. Which groups are equal is asked of the rewards without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
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
    advantage_metrics,
    averaged,
)
from megatron_apo.objectives.clipping import CLIPPED, clipped_surrogate
from megatron_apo.objectives.group import group_mean, group_std
from megatron_apo.objectives.kl import KL_IN_LOSS

Averaging = Literal["sequence", "constant", "token"]

_STD_EPSILON = 1e-6


@dataclass(frozen=True)
class GRPO(Objective):
    """max_response_tokens: the length cap that responses were sampled with. clip_low, clip_high, dual_clip: as in
    clipping.py, None: no bound. overlong_buffer: tokens before the cap over which the penalty grows, 0: no penalty,
    None: a fifth of the cap, as DAPO's 4096 of 20480.
    """

    max_response_tokens: int
    samples_per_prompt: int = 8
    divide_by_std: bool = True
    averaging: Averaging = "sequence"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = None
    kl_coefficient: float = 0.04
    kl_estimator: Literal["k2", "k3"] = "k3"
    dynamic_sampling: bool = False
    max_draws: int = 10
    overlong_buffer: int | None = 0
    overlong_penalty: float = 1.0

    importance_levels = ("token", "sequence")
    targets_by = "group"
    sequence_targets = ("advantage",)

    @property
    def loss_log_probs(self) -> frozenset[LogProbs]:
        return frozenset({"old_policy", "reference"} if self.kl_coefficient else {"old_policy"})

    @property
    def unit(self) -> Literal["sequence", "token"]:
        return "token" if self.averaging == "token" else "sequence"

    @property
    def reinforce_scale(self) -> float | None:
        """Only the sum over tokens, without std and KL, is REINFORCE's gradient at another scale."""
        is_scaled = self.averaging == "constant" and not self.divide_by_std and not self.kl_coefficient
        return 1 / self.max_response_tokens if is_scaled else None

    @property
    def told(self) -> frozenset[str]:
        kl = {"kl/in_loss"} if self.kl_coefficient else ()
        return ADVANTAGE.union(CLIPPED, {"group/std", "group/equal", "reward/length_penalty"}, kl)

    def learns_from(self, reward_G: Sequence[float]) -> bool:
        return not self.dynamic_sampling or len(set(reward_G)) > 1

    def prepare(self, samples: Samples) -> Prepared:
        penalty_K = self._length_penalty(samples.num_tokens_K)
        reward_K, group_K = samples.reward_K + penalty_K, samples.group_K
        advantage_K, std_K = reward_K - group_mean(reward_K, group_K), group_std(reward_K, group_K)
        if self.divide_by_std:
            advantage_K = advantage_K / (std_K + _STD_EPSILON)
        metrics = {
            **advantage_metrics(advantage_K),
            "group/std": float(std_K.mean()),
            "group/equal": float((std_K == 0).float().mean()),  # share of the responses that nothing is learned from
            "reward/length_penalty": float(penalty_K.mean()),
        }
        return Prepared({"advantage": advantage_K}, metrics=metrics)

    def loss(self, micro: Micro, prepared: Prepared) -> LossTerm:
        advantage_B = micro.of_sequences(prepared.per_sequence["advantage"])
        surrogate_R, stats = clipped_surrogate(
            micro.value_R - micro.fixed["old_policy"],
            advantage_B[micro.sequence_R],
            self.clip_low,
            self.clip_high,
            self.dual_clip,
        )
        loss_R = -surrogate_R
        if self.kl_coefficient:
            kl_R = KL_IN_LOSS[self.kl_estimator](micro.value_R, micro.fixed["reference"])
            loss_R, stats = loss_R + self.kl_coefficient * kl_R, {**stats, **averaged("kl/in_loss", kl_R)}
        match self.averaging:
            case "sequence":
                total = micro.means(loss_R).sum()
            case "constant":
                total = loss_R.sum() / self.max_response_tokens
            case "token":
                total = loss_R.sum()
        count = len(micro.value_R) if self.unit == "token" else len(micro.places)
        return LossTerm(total, count, Stats({"loss": total.detach(), **stats}))

    def _length_penalty(self, num_tokens_K: Tensor) -> Tensor:
        """[K], from -overlong_penalty to 0."""
        cap = self.max_response_tokens
        buffer = cap // 5 if self.overlong_buffer is None else self.overlong_buffer
        if not buffer:
            return torch.zeros_like(num_tokens_K, dtype=torch.float32)
        return -self.overlong_penalty * ((num_tokens_K - (cap - buffer)) / buffer).clamp(0, 1)


@dataclass(frozen=True)
class DrGRPO(GRPO):
    """GRPO done right: neither a response's length nor its group's std weighs its gradient."""

    divide_by_std: bool = False
    averaging: Averaging = "constant"
    kl_coefficient: float = 0.0


@dataclass(frozen=True)
class DAPO(GRPO):
    """Clip-higher, token mean, dynamic sampling, over-long penalty."""

    samples_per_prompt: int = 16
    averaging: Averaging = "token"
    clip_high: float | None = 0.28
    kl_coefficient: float = 0.0
    dynamic_sampling: bool = True
    overlong_buffer: int | None = None


OBJECTIVES["grpo"] = GRPO
OBJECTIVES["dr_grpo"] = DrGRPO
OBJECTIVES["dapo"] = DAPO
