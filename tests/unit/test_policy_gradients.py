"""REINFORCE and the estimators of the KL: by hand, and in expectation over policies that are enumerated."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_apo.objectives import APO, REINFORCE
from megatron_apo.objectives.kl import KL_IN_LOSS, k1, k2, k3, token_kl
from tests.enumerated import Arms, Batch, TwoTokens, ascent, expected_gradient, log_prob_M, random_batch

POLICIES = pytest.mark.parametrize("policy", [Arms, TwoTokens])


def drawn(policy, seed):
    """(theta, theta of the reference, real-valued rewards [M])"""
    torch.manual_seed(seed)
    theta, theta_ref = torch.randn(2, *policy.shape, dtype=torch.float64)
    return theta, theta_ref, torch.randn(len(policy.tokens(theta)), dtype=torch.float64)


def test_reinforce_by_hand():
    old = [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5])]
    batch = Batch(
        torch.tensor([1.0, 0.25]),
        [old[0] + torch.tensor([0.3, -0.1]), old[1]],
        old_policy=old,
        reference=[old[0] - torch.tensor([0.5, 0.1]), old[1] + 0.2],
        value_K=torch.tensor([0.4, 0.5]),
    )
    # Advantages .6 and -.25; with KL .6 and -.2 at .5: .3 and -.15. Ratios e^.2 and 1.
    term = batch.term(REINFORCE())
    assert float(term.total) == pytest.approx(-0.6 * math.exp(0.2) + 0.25, rel=1e-5) and term.count == 2
    assert float(term.stats.sums["ratio/mean"]) == pytest.approx(math.exp(0.2) + 1, rel=1e-5)
    expected = [-0.3 * math.exp(0.2)] * 2 + [0.15]
    assert torch.cat(batch.gradient(REINFORCE(kl_coefficient=0.5))).tolist() == pytest.approx(expected, rel=1e-5)
    metrics = batch.prepared(REINFORCE(kl_coefficient=0.5)).metrics
    assert metrics == pytest.approx(
        {"kl/in_reward": 0.2, "advantage/mean": 0.075, "advantage/second_moment": 0.05625, "value/mean": 0.45}
    )


def test_signs():
    """What is better than its baseline becomes likelier."""
    batch = random_batch([1] * 8, seed=1, spread=0.0)
    for gradient, reward, value in zip(batch.gradient(REINFORCE()), batch.reward_K, batch.value_K, strict=True):
        torch.testing.assert_close(gradient.float(), (value - reward).float().expand(len(gradient)))


@POLICIES
@pytest.mark.parametrize("beta2", [1e-3, 0.2, 1.0])
def test_reinforce_with_a_kl_is_apo_up_to_two_b2(policy, beta2):
    theta, theta_ref, reward_M = drawn(policy, 2)
    value = float(beta2 * ((reward_M / beta2) + log_prob_M(policy, theta_ref)).logsumexp(0))  # V*
    reinforce, apo = (
        expected_gradient(objective, policy, theta, theta_ref, reward_M, value)
        for objective in (REINFORCE(kl_coefficient=beta2), APO(beta2=beta2))
    )
    torch.testing.assert_close(apo / (2 * beta2), reinforce, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(reinforce, -ascent(policy, theta, theta_ref, reward_M, beta2), rtol=1e-4, atol=2e-6)


@POLICIES
@pytest.mark.parametrize("value", [-1.0, 0.0, 2.0])
def test_any_baseline_leaves_the_expected_gradient_alone(policy, value):
    theta, theta_ref, reward_M = drawn(policy, 3)
    gradient = expected_gradient(REINFORCE(samples_per_prompt=2), policy, theta, theta_ref, reward_M, value)
    torch.testing.assert_close(gradient, -ascent(policy, theta, theta_ref, reward_M, 0.0), rtol=1e-4, atol=2e-6)


@POLICIES
def test_later_minibatches_have_the_gradient_of_the_present_policys_reward(policy):
    theta, theta_old, reward_M = drawn(policy, 4)
    gradient = expected_gradient(REINFORCE(), policy, theta, theta, reward_M, 0.3, theta_old=theta_old)
    torch.testing.assert_close(gradient, -ascent(policy, theta, theta, reward_M, 0.0), rtol=1e-4, atol=2e-6)


# KL


def test_estimators_by_hand():
    log_prob_R, reference_R = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])  # log r = -.5 and 1
    assert k1(log_prob_R, reference_R).tolist() == [0.5, -1]
    assert k2(log_prob_R, reference_R).tolist() == [0.125, 0.5]
    assert k3(log_prob_R, reference_R).tolist() == pytest.approx([math.exp(-0.5) + 0.5 - 1, math.e - 2])
    assert not any(one(log_prob_R, log_prob_R).any() for one in (k1, k2, k3))
    assert float(k3(torch.tensor(-1e-4), torch.tensor(0.0))) == pytest.approx(5e-9, rel=1e-3)  # no cancellation


def test_estimators_in_expectation():
    theta, theta_ref, _ = drawn(Arms, 5)
    theta.requires_grad_()
    log_pi_M, log_ref_M = log_prob_M(Arms, theta), log_prob_M(Arms, theta_ref)
    forward = (log_pi_M.exp() * (log_pi_M - log_ref_M)).sum()  # KL(pi || ref)
    reverse = (log_ref_M.exp() * (log_ref_M - log_pi_M)).sum()

    def sampled(estimator):
        return (log_pi_M.detach().exp() * estimator(log_pi_M, log_ref_M)).sum()

    def gradient(loss):
        return torch.autograd.grad(loss, theta, retain_graph=True)[0]

    for unbiased in (k1, k3):
        torch.testing.assert_close(sampled(unbiased), forward)
    torch.testing.assert_close(gradient(sampled(k1)), torch.zeros_like(theta))
    torch.testing.assert_close(gradient(sampled(k2)), gradient(forward))
    torch.testing.assert_close(gradient(sampled(k3)), gradient(reverse))
    assert not torch.allclose(gradient(forward), gradient(reverse), atol=0.01)
    assert KL_IN_LOSS == {"k2": k2, "k3": k3}


def test_the_kl_in_the_reward_is_the_old_policys_to_the_reference():
    batch = random_batch([2, 1])
    found = token_kl(batch.samples(REINFORCE(kl_coefficient=1.0)))
    for kl_R, old_R, reference_R in zip(found, batch.old_policy, batch.reference, strict=True):
        torch.testing.assert_close(kl_R, (old_R - reference_R).float())


def test_a_replica_that_has_some_of_the_sequences_knows_the_kl_of_all():
    batch, objective = random_batch([3, 2]), REINFORCE(kl_coefficient=0.5)
    whole = batch.prepared(objective)
    kl_K = batch.samples(objective).shared_sums(token_kl(batch.samples(objective)))
    given = []

    def share(values_O):
        given.append(values_O)
        return kl_K

    part = objective.prepare(batch.samples(objective, own=[3, 1], share=share))
    torch.testing.assert_close(given[0], kl_K[[3, 1]])
    assert torch.equal(part.per_sequence["advantage"], whole.per_sequence["advantage"])
    assert part.metrics == whole.metrics
