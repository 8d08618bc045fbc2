"""Estimators of KL(pi || ref) from tokens that pi sampled, a number a token (J. Schulman, joschu.net/blog/kl-approx).

With r = ref(y_t) / pi(y_t):

    k1 = -log r              unbiased; of either sign
    k2 = (log r)^2 / 2       biased, small where pi is near ref; >= 0
    k3 = r - 1 - log r       unbiased; >= 0

That is their value. As a term of a loss, what counts is the gradient on tokens that pi sampled: that of k1 is 0 in
expectation, that of k2 is KL(pi || ref)'s, that of k3 is KL(ref || pi)'s. In the reward k1 is right: there its value
weighs grad log pi, which gives KL(pi || ref)'s gradient.

Shapes: R tokens; K sequences of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_apo.objectives.base import Samples


def k1(log_prob_R: Tensor, reference_R: Tensor) -> Tensor:
    """[R] nats"""
    return log_prob_R - reference_R


def k2(log_prob_R: Tensor, reference_R: Tensor) -> Tensor:
    """[R] nats"""
    return (log_prob_R - reference_R).square() / 2


def k3(log_prob_R: Tensor, reference_R: Tensor) -> Tensor:
    """[R] nats"""
    log_r_R = reference_R - log_prob_R
    return log_r_R.expm1() - log_r_R


KL_IN_LOSS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k2": k2, "k3": k3}


def token_kl(samples: Samples) -> list[Tensor]:
    """k1 of the policy that sampled to the reference, of each of `own`."""
    pairs = zip(samples.log_probs["old_policy"], samples.log_probs["reference"], strict=True)
    return [k1(old_R, reference_R) for old_R, reference_R in pairs]
