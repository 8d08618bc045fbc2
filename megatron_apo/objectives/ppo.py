"""PPO: the clipped surrogate with a critic's advantages (arXiv 1707.06347; for language models 1909.08593, 2203.02155).

    r_t = -kl_coefficient * log( pi_old(y_t) / pi_ref(y_t) ), and the response's reward beside it at the last token
    A_t, return_t = gae(r, V_old)
    loss_t       = -surrogate(pi / pi_old of token t, A_t)
    value_loss_t = max( (V - return)^2, (clip(V, V_old - value_clip, V_old + value_clip) - return)^2 ) / 2

Both are means over tokens. V_old is the critic before the step. Whitened, the A_t of the whole batch have mean 0 and
variance 1, after the returns were taken. Without bounds (`clip_low` and `clip_high` None), in the first minibatch, it
is advantage actor-critic: the gradient is that of -A_t log pi(y_t).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    averaged,
)
from megatron_apo.objectives.clipping import CLIPPED, clipped_surrogate
from megatron_apo.objectives.gae import gae
from megatron_apo.objectives.kl import token_kl

_VARIANCE_EPSILON = 1e-8


@dataclass(frozen=True)
class PPO(Objective):
    """clip_low, clip_high, dual_clip: as in clipping.py; value_clip: of the critic's change. None: no bound.
    kl_coefficient: of the KL in the reward; 0 needs no reference.
    """

    samples_per_prompt: int = 1
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    gamma: float = 1.0
    lam: float = 1.0
    whiten: bool = True
    kl_coefficient: float = 1e-3

    loss_log_probs = frozenset({"old_policy"})
    needs_critic = True
    unit = "token"
    importance_levels = ("token", "sequence")
    token_targets = ("advantage", "return", "value")

    @property
    def target_log_probs(self) -> frozenset[LogProbs]:
        return frozenset({"old_policy", "reference"} if self.kl_coefficient else ())

    @property
    def told(self) -> frozenset[str]:
        kl = {"kl/in_reward"} if self.kl_coefficient else ()
        return ADVANTAGE.union(CLIPPED, {"value/mean", "critic/explained_variance", "critic/clipped"}, kl)

    def prepare(self, samples: Samples) -> Prepared:
        """advantage, return, and value = V_old, each token's."""
        rewards = [torch.zeros_like(value_T) for value_T in samples.critic]
        metrics = {}
        if self.kl_coefficient:
            kl = token_kl(samples)
            rewards = [-self.kl_coefficient * kl_T for kl_T in kl]
            metrics["kl/in_reward"] = float(samples.shared_sums(kl).mean())
        for place, reward_T in zip(samples.own, rewards, strict=True):
            reward_T[-1] += samples.reward_K[place]
        pairs = [gae(*pair, self.gamma, self.lam) for pair in zip(rewards, samples.critic, strict=True)]
        advantages, returns = [advantage_T for advantage_T, _ in pairs], [return_T for _, return_T in pairs]
        mean, variance = _moments(samples, advantages)
        return_variance = _moments(samples, returns)[1]
        metrics |= {
            "advantage/mean": float(mean),
            "advantage/second_moment": float(mean.square() + variance),
            "value/mean": float(samples.token_mean(samples.critic)),
            "critic/explained_variance": float(1 - variance / return_variance) if return_variance else math.nan,
        }
        if self.whiten:
            scale = (variance + _VARIANCE_EPSILON).rsqrt()
            advantages = [((advantage_T - mean) * scale).float() for advantage_T in advantages]
        targets = {"advantage": advantages, "return": returns, "value": samples.critic}
        return Prepared(
            per_token={name: dict(zip(samples.own, values, strict=True)) for name, values in targets.items()},
            metrics=metrics,
        )

    def loss(self, micro: Micro, prepared: Prepared) -> LossTerm:
        surrogate_R, stats = clipped_surrogate(
            micro.value_R - micro.fixed["old_policy"],
            micro.of_tokens(prepared.per_token["advantage"]),
            self.clip_low,
            self.clip_high,
            self.dual_clip,
        )
        total = -surrogate_R.sum()
        return LossTerm(total, len(micro.value_R), Stats({"loss": total.detach(), **stats}))

    def value_loss(self, micro: Micro, prepared: Prepared) -> LossTerm:
        return_R, old_R = (micro.of_tokens(prepared.per_token[name]) for name in ("return", "value"))
        bound = math.inf if self.value_clip is None else self.value_clip
        clipped_R = old_R + (micro.value_R - old_R).clamp(-bound, bound)
        plain_R, bounded_R = (micro.value_R - return_R).square(), (clipped_R - return_R).square()
        total = torch.maximum(plain_R, bounded_R).sum() / 2
        sums = {"loss": total.detach(), **averaged("critic/clipped", bounded_R > plain_R)}
        return LossTerm(total, len(micro.value_R), Stats(sums))


def _moments(samples: Samples, values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(mean, variance), fp64 scalars, over all tokens of the batch."""
    mean = samples.token_mean(values)
    return mean, samples.token_mean([(value_T - mean).square() for value_T in values])


OBJECTIVES["ppo"] = PPO
