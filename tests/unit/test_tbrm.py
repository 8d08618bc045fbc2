"""TBRM: by hand, against the residuals of single tokens, and at the policy that has no residual."""

from __future__ import annotations

import pytest
import torch

from megatron_apo.objectives import TBRM
from tests.enumerated import Batch, assert_same, random_batch

# Responses of 3 tokens and of 1. -.7 + 1.5 is 0.8 for the others, -3.5 and -3 the reference's sums.
BATCH = Batch(
    torch.tensor([1.0, 0.5]),
    [torch.tensor([-9.0, -1.0, -0.5]), torch.tensor([-7.0])],
    reference=[torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-3.0])],
    first_logit_K=torch.tensor([2.0, -1.0]),
)


def test_by_hand():
    # 2 - 1.5 + 3.5 - 1 / .5 = 2 and -1 + 3 - .5 / .5 = 1; the first tokens' log-probs are in neither.
    term = BATCH.term(TBRM(beta=0.5))
    assert float(term.total) == pytest.approx(2**2 + 1) and term.count == 2
    told = {name: float(value) for name, value in term.stats.sums.items()}
    assert told == pytest.approx(
        {
            "loss": 5,
            "bellman/first_logit": 1,
            "bellman/first_logit/count": 2,
            "bellman/residual": 3,
            "bellman/residual/count": 2,
        }
    )
    assert TBRM() == TBRM(2e-3, 1)


def test_gradient_by_hand():
    BATCH.first_logit_K = torch.tensor([2.0, -1.0], requires_grad=True)
    assert torch.cat(BATCH.gradient(TBRM(beta=0.5))).tolist() == [0, 4, 4, 0]
    assert torch.autograd.grad(BATCH.term(TBRM(beta=0.5)).total, BATCH.first_logit_K)[0].tolist() == [4, 2]


def test_signs():
    """The first logit and the other tokens become likelier where the reward is above what they say."""
    batch = random_batch([1] * 6)
    batch.first_logit_K = batch.first_logit_K.float().requires_grad_()
    batch.reward_K = torch.tensor([100.0, -100.0] * 3)
    (by_logit,) = torch.autograd.grad(batch.term(TBRM(beta=1.0)).total, batch.first_logit_K)
    assert by_logit.sign().tolist() == [-1, 1] * 3
    for k, gradient in enumerate(batch.gradient(TBRM(beta=1.0))):
        assert (gradient[1:] * by_logit[k] > 0).all() and gradient[0] == 0


def test_micro_batches_add_up_in_any_order():
    batch = random_batch([1] * 6, seed=1)
    parts = [batch.gradient(TBRM(beta=0.7), places) for places in ([4, 0], [1, 5, 3], [2])]
    assert_same([sum(one) for one in zip(*parts, strict=True)], batch.gradient(TBRM(beta=0.7)))


class Tree:
    """First token out of 3, second out of 4, by their logits; all 12 responses. The reference is drawn too."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.reference = torch.randn(3, generator=generator, dtype=torch.float64).log_softmax(0)
        self.reference_after = torch.randn(3, 4, generator=generator, dtype=torch.float64).log_softmax(1)
        self.reward = torch.randn(3, 4, generator=generator, dtype=torch.float64)

    def batch(self, logits, logits_after, temperature=1.0):
        first, after = (logits / temperature).log_softmax(0), (logits_after / temperature).log_softmax(1)
        pairs = [(i, j) for i in range(3) for j in range(4)]
        return Batch(
            torch.stack([self.reward[pair] for pair in pairs]),
            [torch.stack([first[i], after[i, j]]) for i, j in pairs],
            reference=[torch.stack([self.reference[i], self.reference_after[i, j]]) for i, j in pairs],
            first_logit_K=torch.stack([logits[i] for i, _ in pairs]),
        )


def test_it_is_the_sum_of_the_tokens_bellman_residuals():
    """Q_t - r_t / beta - log pi_ref,t - V_{t+1}, with the reward anywhere on the way."""
    tree, beta = Tree(2), 0.3
    logits, logits_after = torch.randn(3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    total = 0.0
    for i in range(3):
        for j in range(4):
            early = 0.25 * tree.reward[i, j]  # what of the reward comes with the first token
            first = logits[i] - early / beta - tree.reference[i] - logits_after[i].logsumexp(0)
            second = logits_after[i, j] - (tree.reward[i, j] - early) / beta - tree.reference_after[i, j]
            total += float(first + second) ** 2
    assert float(tree.batch(logits, logits_after).term(TBRM(beta=beta)).total) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_no_residual_at_the_tilted_reference(temperature):
    tree, beta = Tree(3), 0.5
    tilted_after = tree.reference_after + tree.reward / beta  # unnormalized: what follows each first token
    logits = tree.reference + tilted_after.logsumexp(1)
    batch = tree.batch(logits, temperature * tilted_after, temperature)
    assert float(batch.term(TBRM(beta=beta)).total) == pytest.approx(0, abs=1e-9)
    assert max(float(one.abs().max()) for one in batch.gradient(TBRM(beta=beta))) < 1e-4
    optimum = (tree.reference[:, None] + tilted_after).flatten().softmax(0).view(3, 4)
    drawn = torch.stack(batch.log_prob).sum(1).exp().view(3, 4)
    after = drawn / drawn.sum(1, keepdim=True)
    torch.testing.assert_close(after, optimum / optimum.sum(1, keepdim=True))
    first = optimum.sum(1) ** (1 / temperature)  # at 1 that of the optimum
    torch.testing.assert_close(drawn.sum(1), first / first.sum())
