"""Batches of responses as an objective sees them, and policies over so few responses that all of them are listed.

A batch gives an objective what it declares and nothing else. Shapes: K sequences of a batch, M responses that there
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from megatron_apo.objectives import LossTerm, Micro, Objective, Prepared, Samples


@dataclass
class Batch:
    """Log-probs are lists of K tensors, a number a token; `log_prob` are the policy's present ones."""

    reward_K: Tensor
    log_prob: Sequence[Tensor]
    group_K: Tensor | None = None
    old_policy: Sequence[Tensor] = ()
    reference: Sequence[Tensor] = ()
    critic: Sequence[Tensor] = ()
    value_K: Tensor | None = None
    first_logit_K: Tensor | None = None
    leaves: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.leaves = [one.detach().clone().requires_grad_() for one in self.log_prob]
        if self.group_K is None:
            self.group_K = torch.arange(len(self.leaves))

    def samples(self, objective: Objective, own: Sequence[int] | None = None, share=lambda values: values) -> Samples:
        own = range(len(self.leaves)) if own is None else own
        return Samples(
            group_K=self.group_K,
            reward_K=self.reward_K.float(),
            num_tokens_K=torch.tensor([len(one) for one in self.leaves]),
            value_K=self.value_K.float() if objective.takes_baseline else None,
            own=own,
            log_probs={
                name: [getattr(self, name)[k].detach().float() for k in own] for name in objective.target_log_probs
            },
            critic=[self.critic[k].detach().float() for k in own] if objective.needs_critic else (),
            share=share,
        )

    def micro(self, objective: Objective, places: Sequence[int] | None = None, values=None) -> Micro:
        """By default of all sequences in order, with the gradient in `leaves`. values: instead of log-probs."""
        places = range(len(self.leaves)) if places is None else places
        values = self.leaves if values is None else values
        lengths = torch.tensor([len(self.leaves[k]) for k in places])
        others_K = None
        if objective.couples:
            here = torch.tensor([k in places for k in range(len(self.leaves))])
            shared = torch.isin(self.group_K, self.group_K[here]) & ~here
            ratio = [(new - old).detach().sum() for new, old in zip(self.leaves, self.old_policy, strict=True)]
            others_K = torch.stack(ratio).float().where(shared, 0)
        return Micro(
            torch.cat([values[k].float() for k in places]),
            list(places),
            torch.repeat_interleave(torch.arange(len(places)), lengths),
            {
                name: torch.cat([getattr(self, name)[k].detach().float() for k in places])
                for name in objective.loss_log_probs
            },
            self.first_logit_K[list(places)] if objective.needs_first_logit else None,
            others_K,
        )

    def prepared(self, objective: Objective) -> Prepared:
        return objective.prepare(self.samples(objective))

    def term(self, objective: Objective, places: Sequence[int] | None = None) -> LossTerm:
        return objective.loss(self.micro(objective, places), self.prepared(objective))

    def gradient(self, objective: Objective, places: Sequence[int] | None = None) -> list[Tensor]:
        """Of the summed loss in each log-prob, [K] tensors."""
        found = torch.autograd.grad(self.term(objective, places).total, self.leaves, allow_unused=True)
        return [torch.zeros_like(leaf) if one is None else one for one, leaf in zip(found, self.leaves, strict=True)]


def random_batch(groups: Sequence[int], seed: int = 0, *, spread: float = 0.3) -> Batch:
    """Groups of these sizes, in an order of chance, with real-valued rewards. spread: deviation of a log-ratio."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    group_K = torch.repeat_interleave(torch.arange(len(groups)) * 3 + 2, torch.tensor(groups))
    group_K = group_K[torch.randperm(len(group_K), generator=generator)]
    count = len(group_K)
    lengths = torch.randint(1, 6, (count,), generator=generator).tolist()
    log_prob = [-normal(n).abs() for n in lengths]
    return Batch(
        reward_K=normal(count),
        log_prob=log_prob,
        group_K=group_K,
        old_policy=[one + spread * normal(len(one)) for one in log_prob],
        reference=[one + normal(len(one)) for one in log_prob],
        critic=[normal(n) for n in lengths],
        value_K=normal(count),
        first_logit_K=normal(count),
    )


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], atol: float = 2e-6) -> None:
    found_R, expected_R = (torch.cat(list(one)).double() for one in (found, expected))
    torch.testing.assert_close(found_R, expected_R, rtol=2e-5, atol=atol)


class Arms:
    """One token out of six."""

    shape = (6,)

    @staticmethod
    def tokens(theta: Tensor) -> list[Tensor]:
        """[M] log-probs of each response's tokens."""
        return list(theta.log_softmax(0).unsqueeze(1))


class TwoTokens:
    """Up to two tokens out of {stop, a, b}; the second depends on the first."""

    shape = (3, 3)  # row 0: first token; rows 1, 2: second token after a, b

    @staticmethod
    def tokens(theta: Tensor) -> list[Tensor]:
        log_p = theta.log_softmax(1)
        second = [torch.stack([log_p[0, i], log_p[i, j]]) for i in (1, 2) for j in range(3)]
        return [log_p[0, :1], *second]


def log_prob_M(policy, theta: Tensor) -> Tensor:
    """Of each response."""
    return torch.stack([piece.sum() for piece in policy.tokens(theta)])


def expected_gradient(
    objective: Objective, policy, theta, theta_ref, reward_M, value=0.0, *, theta_old=None, critic=()
) -> Tensor:
    """E of the gradient in theta of a sequence's loss, groups being drawn from theta_old (by default theta).

    Every group of `samples_per_prompt` responses that there is, is a group of one batch, and weighs its probability.
    critic: of each response, values before its tokens.
    """
    theta = theta.detach().requires_grad_()
    theta_old = theta.detach() if theta_old is None else theta_old
    size, count = objective.samples_per_prompt, len(reward_M)
    chosen = [k for group in product(range(count), repeat=size) for k in group]
    pieces, old, reference = policy.tokens(theta), policy.tokens(theta_old), policy.tokens(theta_ref)
    batch = Batch(
        reward_K=reward_M[chosen],
        log_prob=[pieces[k] for k in chosen],
        group_K=torch.arange(len(chosen)) // size,
        old_policy=[old[k] for k in chosen],
        reference=[reference[k] for k in chosen],
        critic=[critic[k] for k in chosen] if critic else (),
        value_K=torch.full((len(chosen),), value),
    )
    by_log_prob = batch.gradient(objective)
    log_old_M = log_prob_M(policy, theta_old)
    weight_K = log_old_M[chosen].view(-1, size).sum(1).exp().repeat_interleave(size) / size
    through = sum((weight * by * pieces[k]).sum() for weight, by, k in zip(weight_K, by_log_prob, chosen, strict=True))
    return torch.autograd.grad(through, theta)[0]


def ascent(policy, theta, theta_ref, reward_M, beta) -> Tensor:
    """Gradient of J = E r - beta KL(pi || pi_ref), float64."""
    theta = theta.detach().requires_grad_()
    log_pi_M, log_ref_M = log_prob_M(policy, theta), log_prob_M(policy, theta_ref)
    pi_M = log_pi_M.exp()
    return torch.autograd.grad((pi_M * reward_M).sum() - beta * (pi_M * (log_pi_M - log_ref_M)).sum(), theta)[0]
