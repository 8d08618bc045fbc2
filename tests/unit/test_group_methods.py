"""Group statistics, GRPO with its variants, RLOO and REBEL: by hand, and against their formulas written out."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from statistics import mean, stdev

import pytest
import torch

from megatron_apo.objectives import DAPO, GRPO, REBEL, REINFORCE, RLOO, DrGRPO, LossTerm, Samples
from megatron_apo.objectives.group import group_mean, group_size, group_std, leave_one_out_mean
from tests.enumerated import Arms, Batch, TwoTokens, ascent, assert_same, expected_gradient, random_batch

GROUP_K, VALUES_K = torch.tensor([7, 3, 7, 3, 7, 1]), torch.tensor([1.0, 0.0, 2.0, 0.5, 6.0, 4.0])
CAP = 10


def members(batch, place):
    return [k for k, group in enumerate(batch.group_K.tolist()) if group == batch.group_K[place]]


def samples(rewards, groups, lengths=None):
    count = len(rewards)
    lengths_K = torch.tensor([1] * count if lengths is None else lengths)
    return Samples(torch.tensor(groups), torch.tensor(rewards), lengths_K)


def test_group_statistics_by_hand():
    assert group_size(GROUP_K).tolist() == [3, 2, 3, 2, 3, 1]
    assert group_mean(VALUES_K, GROUP_K).tolist() == [3, 0.25, 3, 0.25, 3, 4]
    assert leave_one_out_mean(VALUES_K, GROUP_K).tolist() == [4, 0.5, 3.5, 0, 1.5, 4]
    # (4 + 1 + 9) / 2 and (1/16 + 1/16) / 1
    expected = [math.sqrt(7), math.sqrt(0.125), math.sqrt(7), math.sqrt(0.125), math.sqrt(7), 0]
    assert group_std(VALUES_K, GROUP_K).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("size", [3, 7, 10])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1])
def test_equal_rewards_have_no_deviation_at_all(value, size):
    values_K, group_K = torch.full((size,), value), torch.zeros(size, dtype=torch.int64)
    assert (group_mean(values_K, group_K) == values_K).all() and not group_std(values_K, group_K).any()
    assert not GRPO(CAP).prepare(samples(values_K.tolist(), [0] * size)).per_sequence["advantage"].any()


def test_group_statistics_of_many_real_values():
    batch = random_batch([5, 1, 3, 2, 8])
    for k in range(19):
        own = [batch.reward_K[j].item() for j in members(batch, k)]
        others = [batch.reward_K[j].item() for j in members(batch, k) if j != k] or own
        assert group_mean(batch.reward_K, batch.group_K)[k] == pytest.approx(mean(own))
        assert leave_one_out_mean(batch.reward_K, batch.group_K)[k] == pytest.approx(mean(others))
        assert group_std(batch.reward_K, batch.group_K)[k] == pytest.approx(stdev(own) if len(own) > 1 else 0)


# GRPO


def grpo_advantages(objective, batch):
    """[K] floats"""
    found = []
    for k in range(len(batch.leaves)):
        own = [batch.reward_K[j].item() for j in members(batch, k)]
        deviation = stdev(own) if len(own) > 1 else 0
        found.append((batch.reward_K[k].item() - mean(own)) / (deviation + 1e-6 if objective.divide_by_std else 1))
    return found


def grpo_loss(objective, batch, leaves):
    """Token by token, in float64, as the papers write it."""
    total = torch.zeros((), dtype=torch.float64)
    low, high = (math.inf if bound is None else bound for bound in (objective.clip_low, objective.clip_high))
    for k, advantage in enumerate(grpo_advantages(objective, batch)):
        of_sequence = []
        for t, log_prob in enumerate(leaves[k]):
            ratio = (log_prob - batch.old_policy[k][t]).exp()
            surrogate = min(ratio * advantage, torch.clip(ratio, 1 - low, 1 + high) * advantage)
            if objective.dual_clip and advantage < 0:
                surrogate = max(surrogate, objective.dual_clip * advantage + 0 * ratio)
            log_r = batch.reference[k][t] - log_prob
            kl = log_r.exp() - log_r - 1 if objective.kl_estimator == "k3" else log_r**2 / 2
            of_sequence.append(-surrogate + objective.kl_coefficient * kl)
        match objective.averaging:
            case "sequence":
                total = total + sum(of_sequence) / len(of_sequence)
            case "constant":
                total = total + sum(of_sequence) / CAP
            case "token":
                total = total + sum(of_sequence)
    return total


GRPOS = [
    GRPO(CAP), GRPO(CAP, kl_estimator="k2", kl_coefficient=0.3), GRPO(CAP, clip_low=None, clip_high=None),
    GRPO(CAP, dual_clip=1.2), DrGRPO(CAP), DrGRPO(CAP, kl_coefficient=0.2), DAPO(CAP, overlong_buffer=0),
    GRPO(CAP, clip_low=0.1, clip_high=None, averaging="token"),
]  # fmt: skip


@pytest.mark.parametrize("objective", GRPOS, ids=lambda one: f"{type(one).__name__}{GRPOS.index(one)}")
@pytest.mark.parametrize("groups", [[4, 4], [1, 3, 2, 5]])
def test_grpo_is_its_formula(objective, groups):
    batch = random_batch(groups, seed=1)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in batch.leaves]
    expected = grpo_loss(objective, batch, leaves)
    term = batch.term(objective)
    assert float(term.total) == pytest.approx(float(expected), rel=1e-5)
    assert_same(batch.gradient(objective), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("objective", GRPOS, ids=lambda one: f"{type(one).__name__}{GRPOS.index(one)}")
def test_grpo_in_micro_batches_is_grpo(objective):
    batch = random_batch([3, 2, 1], seed=2)
    parts = [batch.gradient(objective, places) for places in ([4, 0], [1, 5, 3], [2])]
    assert_same([sum(one) for one in zip(*parts, strict=True)], batch.gradient(objective))


def test_grpo_by_hand():
    # Rewards 1, 0, 0, 0: mean 1/4, std 1/2, advantages 3/2 and -1/2. Ratios e^.5 (above 1.2) and e^-.5 (below .8).
    up, down = torch.tensor([-1.0, -1.0]), torch.tensor([-2.0])
    batch = Batch(
        torch.tensor([1.0, 0, 0, 0]),
        [up + torch.tensor([0.5, 0.0]), down - 0.5, down, down + 0.5],
        group_K=torch.zeros(4, dtype=torch.int64),
        old_policy=[up, down, down, down],
    )
    objective = GRPO(CAP, kl_coefficient=0.0)
    term = batch.term(objective)
    expected = -(1.5 * 1.2 + 1.5) / 2 + 0.5 * 0.8 + 0.5 + 0.5 * math.exp(0.5)
    assert float(term.total) == pytest.approx(expected, rel=1e-5) and term.count == 4
    gradient = torch.cat(batch.gradient(objective)).tolist()
    assert gradient == pytest.approx([0, -0.75, 0, 0.5, 0.5 * math.exp(0.5)], rel=1e-5)
    told = {name: float(value) for name, value in term.stats.sums.items() if "clip" in name}
    assert told == {
        "clip/low": 1, "clip/low/count": 5, "clip/high": 1, "clip/high/count": 5, "clip/dual": 0, "clip/dual/count": 5
    }  # fmt: skip
    dual = batch.term(replace(objective, dual_clip=1.5))
    assert float(dual.total) == pytest.approx(expected - 0.5 * math.exp(0.5) + 0.75, abs=1e-6)
    assert dual.stats.sums["clip/dual"] == 1
    assert batch.term(replace(objective, clip_low=None)).stats.sums["clip/low"] == 0
    assert batch.term(replace(objective, averaging="token")).count == 5


def test_the_papers_defaults():
    assert GRPO(CAP) == GRPO(CAP, 8, True, "sequence", 0.2, 0.2, None, 0.04, "k3", False, 10, 0, 1.0)
    assert DrGRPO(CAP) == DrGRPO(CAP, 8, False, "constant", 0.2, 0.2, None, 0.0, "k3", False, 10, 0, 1.0)
    assert DAPO(CAP) == DAPO(CAP, 16, True, "token", 0.2, 0.28, None, 0.0, "k3", True, 10, None, 1.0)
    assert (GRPO(CAP).unit, DrGRPO(CAP).unit, DAPO(CAP).unit) == ("sequence", "sequence", "token")
    assert GRPO(CAP).loss_log_probs == {"old_policy", "reference"} and DAPO(CAP).loss_log_probs == {"old_policy"}


def test_overlong_penalty_by_hand():
    objective = DAPO(20, overlong_buffer=8, overlong_penalty=0.5, divide_by_std=False)
    prepared = objective.prepare(samples([1.0] * 5, [0] * 5, [1, 12, 14, 19, 20]))
    penalty = [0, 0, 0.5 * 2 / 8, 0.5 * 7 / 8, 0.5]
    expected = [mean(penalty) - one for one in penalty]
    assert prepared.per_sequence["advantage"].tolist() == pytest.approx(expected, abs=1e-6)
    assert prepared.metrics["reward/length_penalty"] == pytest.approx(-mean(penalty))
    # A fifth of the cap: 4096 of 20480.
    paper = DAPO(20480, divide_by_std=False).prepare(samples([0.0] * 2, [0, 0], [16384, 18432]))
    assert paper.per_sequence["advantage"].tolist() == [0.25, -0.25]
    assert not GRPO(20).prepare(samples([1.0] * 2, [0, 0], [1, 20])).metrics["reward/length_penalty"]


def test_dynamic_sampling_leaves_out_groups_of_equal_rewards():
    assert [DAPO(CAP).learns_from(rewards) for rewards in ([0, 0], [1.0, 1.0, 1.0], [0, 1], [0.3, 0.3, 0.2])] == [
        False, False, True, True
    ]  # fmt: skip
    assert all(one.learns_from([1.0, 1.0]) for one in (GRPO(CAP), DAPO(CAP, dynamic_sampling=False), RLOO(), REBEL()))


def test_grpo_tells_what_groups_are_worth():
    metrics = GRPO(CAP).prepare(samples([1.0, 0, 1, 1, 5], [0, 0, 1, 1, 2])).metrics
    assert metrics["group/equal"] == pytest.approx(3 / 5) and metrics["advantage/mean"] == pytest.approx(0)
    assert metrics["group/std"] == pytest.approx(2 * math.sqrt(0.5) / 5)


@pytest.mark.parametrize("policy", [Arms, TwoTokens])
def test_dr_grpo_climbs_the_reward(policy):
    """In expectation over groups of three: (n-1)/n of E r's gradient, over the cap."""
    torch.manual_seed(6)
    theta = torch.randn(*policy.shape, dtype=torch.float64)
    reward_M = torch.randn(len(policy.tokens(theta)), dtype=torch.float64)
    objective = DrGRPO(CAP, samples_per_prompt=3)
    gradient = expected_gradient(objective, policy, theta, theta, reward_M)
    assert objective.reinforce_scale == 1 / CAP
    expected = -ascent(policy, theta, theta, reward_M, 0.0) * 2 / 3
    torch.testing.assert_close(gradient / objective.reinforce_scale, expected, rtol=1e-4, atol=1e-6)


# RLOO


def test_rloo_by_hand():
    prepared = RLOO().prepare(samples([1.0, 0, 0, 4, 2, 9], [0, 0, 0, 1, 1, 2]))
    assert prepared.per_sequence["advantage"].tolist() == [1, -0.5, -0.5, 2, -2, 0]
    assert prepared.metrics["value/mean"] == pytest.approx((0 + 0.5 + 0.5 + 2 + 4 + 9) / 6)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_rloo_is_grpo_without_std_up_to_the_size_of_a_group(size):
    """The sums over tokens being alike, at the weights that sampled."""
    batch = random_batch([size] * 3, seed=size, spread=0.0)
    grpo = GRPO(1, divide_by_std=False, averaging="constant", kl_coefficient=0.0)
    assert_same([one * size / (size - 1) for one in batch.gradient(grpo)], batch.gradient(RLOO()))


def test_rloo_with_kl_in_the_reward():
    batch, beta = random_batch([3, 2, 1], seed=3), 0.7
    kl = [(old - ref).sum().item() for old, ref in zip(batch.old_policy, batch.reference, strict=True)]
    reward = [r - beta * one for r, one in zip(batch.reward_K.tolist(), kl, strict=True)]
    prepared = batch.prepared(RLOO(kl_coefficient=beta))
    for k, advantage in enumerate(prepared.per_sequence["advantage"].tolist()):
        others = [reward[j] for j in members(batch, k) if j != k] or [reward[k]]
        assert advantage == pytest.approx(reward[k] - mean(others), abs=1e-5)
    assert prepared.metrics["kl/in_reward"] == pytest.approx(mean(kl), rel=1e-5)


@pytest.mark.parametrize("policy", [Arms, TwoTokens])
def test_rloo_climbs_the_regularized_reward(policy):
    torch.manual_seed(7)
    theta, theta_ref = torch.randn(2, *policy.shape, dtype=torch.float64)
    reward_M = torch.randn(len(policy.tokens(theta)), dtype=torch.float64)
    gradient = expected_gradient(RLOO(kl_coefficient=0.3, samples_per_prompt=2), policy, theta, theta_ref, reward_M)
    torch.testing.assert_close(gradient, -ascent(policy, theta, theta_ref, reward_M, 0.3), rtol=1e-4, atol=2e-6)


def test_rloo_is_reinforce_with_the_leave_one_out_mean():
    batch = random_batch([3, 2, 1], seed=4)
    batch.value_K = leave_one_out_mean(batch.reward_K, batch.group_K)
    assert_same(batch.gradient(RLOO()), batch.gradient(REINFORCE()))


# REBEL


def rebel_loss(eta, batch, leaves):
    """All pairs of each group, in float64; groups of n count n times, so that the mean over sequences is theirs."""
    total = torch.zeros((), dtype=torch.float64)
    log_ratio = [(leaf - old).sum() for leaf, old in zip(leaves, batch.old_policy, strict=True)]
    for group in batch.group_K.unique():
        own = [k for k in range(len(leaves)) if batch.group_K[k] == group]
        pairs = [
            ((log_ratio[i] - log_ratio[j]) / eta - (batch.reward_K[i] - batch.reward_K[j])) ** 2
            for i, j in combinations(own, 2)
        ]
        if pairs:
            total = total + len(own) * sum(pairs) / len(pairs)
    return total


@pytest.mark.parametrize("eta", [1.0, 0.25, 30.0])
@pytest.mark.parametrize("groups", [[2, 2, 2], [1, 2, 3, 5]])
def test_rebel_is_the_joint_formula_however_groups_are_split(groups, eta):
    batch = random_batch(groups, seed=5)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in batch.leaves]
    joint = rebel_loss(eta, batch, leaves)
    expected = torch.autograd.grad(joint, leaves, allow_unused=True, materialize_grads=True)
    count = len(leaves)
    everyone = list(range(count))
    for split in ([everyone], [[k] for k in everyone], [everyone[::2], everyone[1::2]]):
        terms: list[LossTerm] = [batch.term(REBEL(eta=eta), places) for places in split]
        assert sum(float(term.total) for term in terms) == pytest.approx(float(joint), rel=1e-5)
        assert sum(float(term.stats.sums["loss"]) for term in terms) == pytest.approx(float(joint), rel=1e-5)
        assert sum(term.count for term in terms) == count
        parts = [batch.gradient(REBEL(eta=eta), places) for places in split]
        scale = max(float(one.abs().max()) for one in expected)
        assert_same([sum(one) for one in zip(*parts, strict=True)], expected, atol=1e-6 * scale)


def test_rebel_by_hand():
    # s = .5 and -.3, eta = .5: (.8 / .5 - (1 - .25))^2 = .85^2, once for each of the two; the third is alone.
    old = [torch.tensor([-1.0, -1.0]), torch.tensor([-2.0]), torch.tensor([-3.0])]
    batch = Batch(
        torch.tensor([1.0, 0.25, 7.0]),
        [old[0] + torch.tensor([0.7, -0.2]), old[1] - 0.3, old[2] + 1],
        group_K=torch.tensor([4, 4, 0]),
        old_policy=old,
    )
    assert float(batch.term(REBEL(eta=0.5)).total) == pytest.approx(2 * 0.85**2, rel=1e-5)
    # 2 * 2 * .85 / .5 for both tokens of the first, minus that for the second.
    assert torch.cat(batch.gradient(REBEL(eta=0.5))).tolist() == pytest.approx([6.8, 6.8, -6.8, 0], rel=1e-5)


def test_rebel_begins_as_rloo():
    batch, objective = random_batch([2, 3, 4, 1], seed=6, spread=0.0), REBEL(eta=0.5)
    assert_same([one / objective.reinforce_scale for one in batch.gradient(objective)], batch.gradient(RLOO()))


@pytest.mark.parametrize("size", [2, 3])
def test_rebel_has_no_loss_at_the_tilted_policy(size):
    batch, eta = random_batch([size, size], seed=7), 0.6
    batch.log_prob = [old.clone() for old in batch.old_policy]
    for k, log_prob in enumerate(batch.log_prob):
        log_prob[0] += eta * (batch.reward_K[k] + batch.group_K[k])  # a group's level is free
    batch.__post_init__()
    assert float(batch.term(REBEL(eta=eta)).total) == pytest.approx(0, abs=1e-9)
    assert max(float(one.abs().max()) for one in batch.gradient(REBEL(eta=eta))) < 1e-4


GROUP_METHODS = [GRPO(CAP, kl_coefficient=0.0), DrGRPO(CAP), DAPO(CAP, overlong_buffer=0), RLOO(), REBEL()]


@pytest.mark.parametrize("objective", GROUP_METHODS, ids=lambda one: type(one).__name__)
def test_who_is_left_alone_in_a_group_counts_and_is_not_learned_from(objective):
    """As where all others are masked: there is nothing to compare it with."""
    batch = random_batch([1, 3, 1], seed=8)
    gradients = batch.gradient(objective)
    alone = [k for k in range(5) if len(members(batch, k)) == 1]
    assert len(alone) == 2 and not any(gradients[k].any() for k in alone)
    assert all(one.any() for k, one in enumerate(gradients) if k not in alone)
    tokens = sum(len(gradients[k]) for k in alone)
    assert batch.term(objective, alone).count == (tokens if objective.unit == "token" else 2)
