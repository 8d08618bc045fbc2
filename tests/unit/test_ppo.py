"""Clipping, generalized advantage estimation, and PPO: by hand, by their formulas written out, and by enumeration."""

from __future__ import annotations

import math
from statistics import fmean, pvariance

import pytest
import torch

from megatron_apo.objectives import PPO, REINFORCE, Micro, Prepared
from megatron_apo.objectives.clipping import clipped_surrogate
from megatron_apo.objectives.gae import gae
from tests.enumerated import Arms, Batch, TwoTokens, ascent, assert_same, expected_gradient, random_batch

PLAIN = {"whiten": False, "kl_coefficient": 0.0}
UNBOUNDED = {**PLAIN, "clip_low": None, "clip_high": None, "value_clip": None}

# Clipping


@pytest.mark.parametrize(
    ("ratio", "advantage", "surrogate", "has_gradient"),
    [
        (1.0, 2.0, 2.0, True),
        (1.25, 2.0, 2.5, True),
        (1.5, 2.0, 2 * 1.3, False),  # above 1 + high
        (0.5, 2.0, 1.0, True),  # too rare already: nothing holds it
        (0.5, -2.0, -2 * 0.9, False),  # below 1 - low
        (0.95, -2.0, -1.9, True),
        (1.5, -2.0, -3.0, True),
        (5.0, -2.0, -6.0, False),  # above the dual bound, 3
        (5.0, 2.0, 2 * 1.3, False),
        (1.5, 0.0, 0.0, False),
    ],
)
def test_surrogate_by_hand(ratio, advantage, surrogate, has_gradient):
    log_ratio_R = torch.tensor([math.log(ratio)], requires_grad=True)
    found_R, stats = clipped_surrogate(log_ratio_R, torch.tensor([advantage]), 0.1, 0.3, 3.0)
    found_R.sum().backward()
    assert found_R.tolist() == pytest.approx([surrogate])
    assert log_ratio_R.grad.tolist() == pytest.approx([ratio * advantage if has_gradient else 0])
    told = {name: bool(stats[f"clip/{name}"]) for name in ("low", "high", "dual")}
    assert told == {
        "low": advantage < 0 and ratio < 0.9,
        "high": advantage > 0 and ratio > 1.3,
        "dual": advantage < 0 and ratio > 3,
    }


def test_without_bounds_the_surrogate_is_the_ratio():
    log_ratio_R, advantage_R = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)) * 3
    surrogate_R, stats = clipped_surrogate(log_ratio_R, advantage_R, None, None)
    torch.testing.assert_close(surrogate_R, log_ratio_R.exp() * advantage_R)
    assert not any(value for name, value in stats.items() if not name.endswith("count"))
    assert stats["clip/low/count"] == 50


# Advantages


def test_gae_by_hand():
    # gamma .5, lambda .5: deltas 1 + 2 - 3 = 0, 0 + 1 - 4 = -3, 2 - 2 = 0; sums with .25.
    advantage_T, return_T = gae(torch.tensor([1.0, 0, 2]), torch.tensor([3.0, 4, 2]), 0.5, 0.5)
    assert advantage_T.tolist() == [-0.75, -3, 0]
    assert return_T.tolist() == [2.25, 1, 2]


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 100])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.7), (1.0, 0.95), (0.99, 0.0), (0.0, 1.0)])
def test_gae_is_the_recursion(length, gamma, lam):
    reward_T, value_T = torch.randn(2, length, generator=torch.Generator().manual_seed(length))
    advantage, following, expected = 0.0, 0.0, []
    for reward, value in zip(reversed(reward_T.tolist()), reversed(value_T.tolist()), strict=True):
        advantage = reward + gamma * following - value + gamma * lam * advantage
        following = value
        expected.append(advantage)
    advantage_T, return_T = gae(reward_T, value_T, gamma, lam)
    torch.testing.assert_close(advantage_T, torch.tensor(expected[::-1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(return_T, advantage_T + value_T)
    assert advantage_T.dtype == torch.float32


def test_limits_of_lambda():
    reward_T, value_T = torch.randn(2, 7, generator=torch.Generator().manual_seed(1))
    to_go_T = reward_T.flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(gae(reward_T, value_T, 1.0, 1.0)[0], to_go_T - value_T)
    following_T = torch.cat([value_T[1:], torch.zeros(1)])
    torch.testing.assert_close(gae(reward_T, value_T, 0.9, 0.0)[0], reward_T + 0.9 * following_T - value_T)


# PPO


def hand_batch():
    """Responses of 2 tokens and of 1, reward 1 and 0; log-ratios to the old policy .5, -.5 and .05."""
    old = [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5])]
    return Batch(
        torch.tensor([1.0, 0.0]),
        [old[0] + torch.tensor([0.5, -0.5]), old[1] + 0.05],
        old_policy=old,
        reference=[old[0] - torch.tensor([0.2, -0.4]), old[1] - 1],
        critic=[torch.tensor([0.25, 0.5]), torch.tensor([0.75])],
    )


def test_targets_by_hand():
    prepared = hand_batch().prepared(PPO(**PLAIN))
    # Rewards 0, 1 and 0; to go 1, 1 and 0.
    assert prepared.per_token["return"][0].tolist() == [1, 1] and prepared.per_token["return"][1].tolist() == [0]
    assert prepared.per_token["advantage"][0].tolist() == [0.75, 0.5]
    assert prepared.per_token["advantage"][1].tolist() == [-0.75]
    assert prepared.per_token["value"][0].tolist() == [0.25, 0.5]
    moment = (0.75**2 + 0.5**2 + 0.75**2) / 3
    assert prepared.metrics == pytest.approx(
        {
            "advantage/mean": 0.5 / 3,
            "advantage/second_moment": moment,
            "value/mean": 0.5,
            "critic/explained_variance": 1 - (moment - 0.25 / 9) / (2 / 9),
        }
    )


def test_the_kl_is_paid_token_by_token():
    prepared = hand_batch().prepared(PPO(whiten=False, kl_coefficient=0.5))
    # k1 is .2, -.4 and 1: rewards -.1, 1 + .2 and -.5.
    assert prepared.per_token["return"][0].tolist() == pytest.approx([1.1, 1.2])
    assert prepared.per_token["return"][1].tolist() == pytest.approx([-0.5])
    assert prepared.metrics["kl/in_reward"] == pytest.approx((0.2 - 0.4 + 1) / 2)
    discounted = hand_batch().prepared(PPO(whiten=False, kl_coefficient=0.5, gamma=0.5))
    assert discounted.per_token["return"][0].tolist() == pytest.approx([-0.1 + 0.5 * 1.2, 1.2])


def test_loss_by_hand():
    term = hand_batch().term(PPO(**PLAIN))
    # Ratios e^.5 above 1.2 with .75; e^-.5 with .5, which nothing holds; e^.05 with -.75.
    expected = -(1.2 * 0.75 + math.exp(-0.5) * 0.5 - math.exp(0.05) * 0.75)
    assert float(term.total) == pytest.approx(expected, rel=1e-5) and term.count == 3
    gradient = torch.cat(hand_batch().gradient(PPO(**PLAIN))).tolist()
    assert gradient == pytest.approx([0, -math.exp(-0.5) * 0.5, math.exp(0.05) * 0.75], rel=1e-5)
    assert {name: float(value) for name, value in term.stats.sums.items() if name != "loss"} == {
        "clip/low": 0, "clip/low/count": 3, "clip/high": 1, "clip/high/count": 3, "clip/dual": 0, "clip/dual/count": 3
    }  # fmt: skip


def test_whitened_advantages_have_mean_0_and_variance_1_over_all_tokens():
    batch = random_batch([1] * 9, seed=2)
    plain, white = (batch.prepared(PPO(whiten=whiten)) for whiten in (False, True))
    before, after = (torch.cat(list(one.per_token["advantage"].values())).tolist() for one in (plain, white))
    assert fmean(after) == pytest.approx(0, abs=1e-6) and pvariance(after) == pytest.approx(1, rel=1e-5)
    expected = [(one - fmean(before)) / math.sqrt(pvariance(before)) for one in before]
    assert after == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert white.metrics == plain.metrics
    for name in ("return", "value"):
        assert_same(white.per_token[name].values(), plain.per_token[name].values())


def test_equal_advantages_are_whitened_to_0():
    batch = Batch(torch.ones(2), [torch.zeros(1)] * 2, critic=[torch.zeros(1)] * 2)
    prepared = batch.prepared(PPO(kl_coefficient=0.0))
    assert torch.cat(list(prepared.per_token["advantage"].values())).tolist() == [0, 0]
    assert math.isnan(prepared.metrics["critic/explained_variance"])


def test_a_replica_that_has_some_of_the_sequences_whitens_as_one_that_has_all():
    """What each replica shares, in the order in which it asks, makes the sums of all."""
    batch, objective, places = random_batch([1] * 5, seed=3), PPO(kl_coefficient=0.2), [[3, 0], [1, 4, 2]]
    whole = batch.prepared(objective)
    asked = []

    def record(values_O):
        asked.append(values_O)
        return values_O

    objective.prepare(batch.samples(objective, share=record))
    for own in places:
        told = iter(asked)

        def share(values_O, told=told, own=own):
            sums_K = next(told)
            torch.testing.assert_close(values_O, sums_K[own])
            return sums_K

        part = objective.prepare(batch.samples(objective, own=own, share=share))
        assert next(told, None) is None
        assert part.metrics == whole.metrics
        for name in objective.token_targets:
            assert list(part.per_token[name]) == own
            assert_same(part.per_token[name].values(), [whole.per_token[name][k] for k in own])


def test_micro_batches_add_up():
    batch, objective = random_batch([1] * 6, seed=4), PPO(kl_coefficient=0.2)
    parts = [batch.gradient(objective, places) for places in ([4, 0], [1, 5, 3], [2])]
    assert_same([sum(one) for one in zip(*parts, strict=True)], batch.gradient(objective))


@pytest.mark.parametrize("objective", [PPO(**PLAIN), PPO(**UNBOUNDED)], ids=["clipped", "unbounded"])
def test_at_ratio_1_and_lambda_1_it_is_actor_critic(objective):
    """-(return - V_t) grad log pi(y_t), the return being the response's reward."""
    batch = random_batch([1] * 6, seed=5, spread=0.0)
    expected = [value - reward for value, reward in zip(batch.critic, batch.reward_K, strict=True)]
    assert_same(batch.gradient(objective), expected)


def test_with_a_critic_that_knows_the_prompt_alone_it_is_reinforce():
    batch = random_batch([1] * 6, seed=6, spread=0.0)
    batch.critic = [torch.full_like(one, value) for one, value in zip(batch.log_prob, batch.value_K, strict=True)]
    assert_same(batch.gradient(PPO(**UNBOUNDED)), batch.gradient(REINFORCE()))


@pytest.mark.parametrize("policy", [Arms, TwoTokens])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_on_policy_gradient_is_the_regularized_rewards_for_any_critic(policy, beta):
    torch.manual_seed(7)
    theta, theta_ref = torch.randn(2, *policy.shape, dtype=torch.float64)
    reward_M = torch.randn(len(policy.tokens(theta)), dtype=torch.float64)
    # A value of the prompt, and one after each first token.
    critic = [torch.tensor([0.7])] if policy is TwoTokens else [torch.tensor([-0.4])] * 6
    critic += [torch.tensor([0.7, after]) for after in (-1.0, 2.0) for _ in range(3)] if policy is TwoTokens else []
    objective = PPO(whiten=False, kl_coefficient=beta)
    gradient = expected_gradient(objective, policy, theta, theta_ref, reward_M, critic=critic)
    torch.testing.assert_close(gradient, -ascent(policy, theta, theta_ref, reward_M, beta), rtol=1e-4, atol=2e-6)


def test_signs():
    """A token that is better than the critic expected becomes likelier."""
    batch = random_batch([1] * 6, seed=8, spread=0.0)
    prepared = batch.prepared(PPO())
    for k, gradient in enumerate(batch.gradient(PPO())):
        assert torch.equal(gradient.sign().float(), -prepared.per_token["advantage"][k].sign())


# The critic


def value_loss(objective, value, of_return, old):
    """(term, gradient) of one token."""
    value_R = torch.tensor([value], requires_grad=True)
    targets = {"return": {0: torch.tensor([of_return])}, "value": {0: torch.tensor([old])}}
    term = objective.value_loss(Micro(value_R, [0], torch.tensor([0])), Prepared(per_token=targets))
    return term, torch.autograd.grad(term.total, value_R)[0].item()


@pytest.mark.parametrize(
    ("value", "of_return", "old", "loss", "slope"),
    [
        (0.1, 1.0, 0.0, 0.9**2 / 2, -0.9),
        (0.5, 1.0, 0.0, 0.8**2 / 2, 0.0),  # .2 is as far as it may go: no more to be had
        (-0.5, 1.0, 0.0, 1.5**2 / 2, -1.5),  # went the wrong way: it may come back
        (-0.5, -1.0, 0.0, 0.8**2 / 2, 0.0),
        (2.0, 1.0, 0.9, 1.0**2 / 2, 1.0),  # overshot
    ],
)
def test_clipped_value_loss_by_hand(value, of_return, old, loss, slope):
    term, found = value_loss(PPO(), value, of_return, old)
    assert float(term.total) == pytest.approx(loss) and found == pytest.approx(slope) and term.count == 1
    assert float(term.stats.sums["critic/clipped"]) == (slope == 0) and term.stats.sums["critic/clipped/count"] == 1
    plain, slope = value_loss(PPO(value_clip=None), value, of_return, old)
    assert float(plain.total) == pytest.approx((value - of_return) ** 2 / 2)
    assert slope == pytest.approx(value - of_return) and not plain.stats.sums["critic/clipped"]


def test_value_loss_takes_the_tokens_of_its_sequences():
    batch, objective = random_batch([1] * 4, seed=9), PPO(kl_coefficient=0.1, value_clip=None)
    prepared = batch.prepared(objective)
    values = [(one + 0.5).float().requires_grad_() for one in batch.critic]
    term = objective.value_loss(batch.micro(objective, [2, 0], values), prepared)
    found = torch.autograd.grad(term.total, [values[2], values[0]])
    assert_same(found, [(values[k] - prepared.per_token["return"][k]).detach() for k in (2, 0)])
    assert term.count == len(values[2]) + len(values[0])


def test_descent_ends_at_the_returns_mean():
    batch, objective = random_batch([1] * 5, seed=10), PPO(kl_coefficient=0.0)
    value = torch.zeros((), dtype=torch.float64)
    for _ in range(60):
        value.requires_grad_()
        batch.critic = [value.detach().expand(len(one)) for one in batch.log_prob]
        values = [value.float().expand(len(one)) for one in batch.log_prob]
        term = objective.value_loss(batch.micro(objective, values=values), batch.prepared(objective))
        value = (value - 0.2 * torch.autograd.grad(term.total, value)[0] / term.count).detach()
    lengths = torch.tensor([len(one) for one in batch.log_prob])
    assert float(value) == pytest.approx(float((batch.reward_K * lengths).sum() / lengths.sum()), abs=1e-4)


def test_the_defaults():
    assert PPO() == PPO(1, 0.2, 0.2, None, 0.2, 1.0, 1.0, True, 1e-3)
    assert PPO().target_log_probs == {"old_policy", "reference"} and not PPO(**PLAIN).target_log_probs
    assert PPO().loss_log_probs == {"old_policy"} and PPO().unit == "token"
