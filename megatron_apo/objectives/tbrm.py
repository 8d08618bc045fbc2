"""TBRM: the Bellman residual of a whole response, squared, with the model's logits as Q (arXiv 2505.15311, equation 4).

    loss(x, y) = ( logit(x, y_1) + sum_{t>=2} log pi(y_t) - sum_{t>=1} log pi_ref(y_t) - r / beta )^2

Q(s, a) = logit(s, a) is the soft Q function of the rewards r / beta + log pi_ref, with the value V(s) = log sum_a
exp Q(s, a) and the policy exp(Q - V) = pi. The residuals Q_t - (r_t / beta + log pi_ref,t) - V_{t+1} of a response
telescope, V after the last token being 0: what is left is Q_1, and Q_t - V_t = log pi(y_t) of the other tokens. No
baseline is needed: it is in the level of the first token's logits, which a log-prob does not have. The residual is 0
for all y where pi = pi_ref exp(r / beta) / Z and V(x) = log Z, whoever sampled them.

The first logit is the model's own, before any temperature; log-probs are at the sampling temperature, as everywhere
here. The paper samples at 1, where these belong together. At T they do not: Q would be logit / T, and where the
residual is 0 the first token alone is drawn from the optimal policy to the power 1 / T.

A first logit is no log-prob, so that importance weights would reach but a part of the gradient, which is REINFORCE's at
no scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_apo.objectives.base import (
    OBJECTIVES,
    LossTerm,
    Micro,
    Objective,
    Prepared,
    Samples,
    Stats,
    averaged,
    first_tokens,
)


@dataclass(frozen=True)
class TBRM(Objective):
    """beta: weight of the KL to the reference against the reward; the paper's is the default."""

    beta: float = 2e-3
    samples_per_prompt: int = 1

    loss_log_probs = frozenset({"reference"})
    needs_first_logit = True
    importance_levels = ()
    targets_by = "sequence"
    sequence_targets = ("reward",)
    told = frozenset({"bellman/first_logit", "bellman/residual"})

    def prepare(self, samples: Samples) -> Prepared:
        """reward = r / beta."""
        return Prepared({"reward": samples.reward_K / self.beta})

    def loss(self, micro: Micro, prepared: Prepared) -> LossTerm:
        assert micro.first_logit_B is not None
        others_R = torch.where(first_tokens(micro.sequence_R), 0, micro.value_R)
        log_ratio_B = micro.first_logit_B.float() + micro.sums(others_R - micro.fixed["reference"])
        residual_B = log_ratio_B - micro.of_sequences(prepared.per_sequence["reward"])
        total = residual_B.square().sum()
        sums = {
            "loss": total.detach(),
            **averaged("bellman/first_logit", micro.first_logit_B),
            **averaged("bellman/residual", residual_B),
        }
        return LossTerm(total, len(micro.places), Stats(sums))


OBJECTIVES["tbrm"] = TBRM
