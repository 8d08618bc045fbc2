"""A*-PO's loss by hand, its gradient by formula, what it does to policies small enough to enumerate; what every
objective declares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_apo.objectives import (
    APO,
    DAPO,
    GRPO,
    OBJECTIVES,
    PPO,
    REBEL,
    REINFORCE,
    RLOO,
    SFT,
    TBRM,
    Cost,
    DrGRPO,
    Micro,
    Prepared,
)
from megatron_apo.objectives.base import averaged
from tests.enumerated import Arms, Batch, TwoTokens, ascent, expected_gradient, log_prob_M, random_batch

# Two sequences of 3 and 1 tokens. Log-ratios: 0.5 - 0.2 + 0.1 = 0.4 and 0.3. Advantages: 1 - 0.25 and 0 - 0.5.
REFERENCE = [torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-3.0])]
LOG_PROB = [REFERENCE[0] + torch.tensor([0.5, -0.2, 0.1]), REFERENCE[1] + 0.3]
REWARD, VALUE = torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.5])


def batch(log_prob=LOG_PROB):
    return Batch(REWARD, log_prob, reference=REFERENCE, value_K=VALUE)


# (0.1 * 0.4 - 0.75)^2 + (0.1 * 0.3 + 0.5)^2 = 0.5041 + 0.2809
@pytest.mark.parametrize(("scale", "total"), [("paper", 0.785), ("unit", 0.785 / 0.2)])
def test_apo_by_hand(scale, total):
    term = batch().term(APO(beta2=0.1, loss_scale=scale))
    assert float(term.total) == pytest.approx(total, rel=1e-6)
    assert term.count == 2
    assert float(term.stats.sums["loss"]) == pytest.approx(total, rel=1e-6)
    assert not term.stats.sums["loss"].requires_grad


# 2 b2 (b2 s - A) for every token of a sequence: 0.2 * -0.71 and 0.2 * 0.53.
@pytest.mark.parametrize(("scale", "factor"), [("paper", 0.2), ("unit", 1.0)])
def test_apo_gradient(scale, factor):
    objective = APO(beta2=0.1, loss_scale=scale)
    expected = torch.tensor([-0.71, -0.71, -0.71, 0.53]) * factor
    torch.testing.assert_close(torch.cat(batch().gradient(objective)), expected, rtol=1e-6, atol=1e-7)
    assert objective.reinforce_scale == pytest.approx(factor)


def test_apo_tells_advantage_and_value():
    metrics = batch().prepared(APO()).metrics
    assert metrics == pytest.approx(
        {"advantage/mean": 0.125, "advantage/second_moment": (0.75**2 + 0.5**2) / 2, "value/mean": 0.375}
    )


def test_default_beta2_is_the_papers_and_the_first_loss_is_the_squared_advantage():
    term = batch(REFERENCE).term(APO())
    assert APO().beta2 == 1e-3 and APO().loss_scale == "paper" and APO().samples_per_prompt == 1
    assert float(term.total) == 0.75**2 + 0.5**2


def test_order_of_sequences_within_a_micro_batch():
    assert float(batch().term(APO(beta2=0.1), [1, 0]).total) == pytest.approx(0.785, rel=1e-6)
    assert float(batch().term(APO(beta2=0.1), [1]).total) == pytest.approx(0.2809, rel=1e-6)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=8), cut=st.integers(1, 7), seed=st.integers(0, 2**31 - 1)
)
def test_micro_batches_add_up(lengths, cut, seed):
    cut = min(cut, len(lengths) - 1)
    generator = torch.Generator().manual_seed(seed)
    log_prob, reference = torch.randn(2, sum(lengths), generator=generator)
    whole = Batch(
        torch.rand(len(lengths), generator=generator),
        log_prob.split(lengths),
        reference=reference.split(lengths),
        value_K=torch.rand(len(lengths), generator=generator),
    )

    def total(first, last):
        return whole.term(APO(beta2=0.3), range(first, last)).total

    torch.testing.assert_close(total(0, cut) + total(cut, len(lengths)), total(0, len(lengths)), rtol=1e-5, atol=1e-6)


def test_a_baseline_that_is_missing_is_an_error():
    for objective in (APO(), REINFORCE()):
        samples = random_batch([1, 1]).samples(SFT())
        with pytest.raises(AssertionError):
            objective.prepare(samples)


def test_a_micro_batch_picks_its_own():
    micro = Micro(torch.tensor([1.0, 2.0, 4.0]), [2, 0], torch.tensor([0, 0, 1]), others_K=torch.tensor([0.0, 7, 0]))
    assert micro.of_sequences(torch.tensor([10.0, 20.0, 30.0])).tolist() == [30, 10]
    tokens = {0: torch.tensor([1.0]), 1: torch.tensor([2.0, 3.0]), 2: torch.tensor([4.0, 5.0])}
    assert micro.of_tokens(tokens).tolist() == [4, 5, 1]
    assert (micro.sums(micro.value_R).tolist(), micro.means(micro.value_R).tolist()) == ([3, 4], [1.5, 4])
    assert micro.joined(torch.tensor([0.5, 0.25])).tolist() == [0.25, 7, 0.5]


def test_a_mean_is_told_by_a_sum_and_a_count():
    sums = averaged("clip/low", torch.tensor([True, False, True], requires_grad=False))
    assert {name: float(value) for name, value in sums.items()} == {"clip/low": 2, "clip/low/count": 3}


def test_sft_is_the_negative_log_prob_over_tokens():
    log_prob_R = torch.tensor([-1.0, -2.0, -3.5], requires_grad=True)
    term = SFT().loss(Micro(log_prob_R, [0, 1], torch.tensor([0, 0, 1])), Prepared())
    term.total.backward()
    assert (term.total.item(), term.count, SFT.unit) == (6.5, 3, "token")
    assert log_prob_R.grad.tolist() == [-1, -1, -1]


ALL = [
    APO(), APO(samples_per_prompt=4), GRPO(9), GRPO(9, kl_coefficient=0.0), DrGRPO(9), DAPO(9), REBEL(), REINFORCE(),
    REINFORCE(kl_coefficient=0.1), RLOO(), RLOO(kl_coefficient=0.1), PPO(), PPO(kl_coefficient=0.0), SFT(), TBRM(),
]  # fmt: skip


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_an_objective_reads_what_it_declares_and_makes_the_targets_that_it_names(objective):
    found = random_batch([3, 1, 2])
    prepared = found.prepared(objective)
    assert set(prepared.per_sequence) == set(objective.sequence_targets)
    assert set(prepared.per_token) == set(objective.token_targets)
    term = found.term(objective)
    losses = [term, *([objective.value_loss(found.micro(objective), prepared)] if objective.needs_critic else [])]
    averages = {name.removesuffix("/count") for loss in losses for name in loss.stats.sums if name.endswith("/count")}
    assert averages | prepared.metrics.keys() == objective.told
    assert term.count == (sum(map(len, found.leaves)) if objective.unit == "token" else 6)
    assert float(term.stats.sums["loss"]) == pytest.approx(float(term.total)) and term.total.requires_grad
    assert not any(value.requires_grad for value in term.stats.sums.values())
    assert OBJECTIVES[{DrGRPO: "dr_grpo"}.get(type(objective), type(objective).__name__.lower())] is type(objective)


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_a_batch_of_masked_responses_alone_has_targets_too(objective):
    nothing = torch.zeros(0)
    empty = Batch(nothing, [], value_K=nothing)
    prepared = empty.prepared(objective)
    assert all(len(values) == 0 for values in [*prepared.per_sequence.values(), *prepared.per_token.values()])


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_a_micro_batch_of_masked_responses_alone_has_no_loss(objective):
    prepared = random_batch([2, 1]).prepared(objective)
    value_R = torch.zeros(0, requires_grad=True)
    fixed = {name: torch.zeros(0) for name in objective.loss_log_probs}
    micro = Micro(value_R, [], torch.zeros(0, dtype=torch.int64), fixed, torch.zeros(0), torch.zeros(3))
    for loss in [objective.loss, *([objective.value_loss] if objective.needs_critic else [])]:
        term = loss(micro, prepared)
        assert (float(term.total.detach()), term.count) == (0, 0) and term.total.requires_grad


def test_a_gradient_has_a_scale_where_it_is_reinforces_but_for_a_factor():
    """Neither standard deviations, nor means over tokens, nor values of tokens, nor logits are a factor."""
    scaled = [APO(beta2=0.1), APO(loss_scale="unit"), REINFORCE(), RLOO(), REBEL(eta=0.5), DrGRPO(9)]
    assert [one.reinforce_scale for one in scaled] == pytest.approx([0.2, 1, 1, 1, 8, 1 / 9])
    others = [GRPO(9), GRPO(9, averaging="constant"), GRPO(9, divide_by_std=False), DAPO(9), PPO(), TBRM(), SFT()]
    others.append(DrGRPO(9, kl_coefficient=0.1))
    assert all(one.reinforce_scale is None for one in others)


# Of 3 minibatches: forwards (without gradient) and forward-backwards, in minibatches.
@pytest.mark.parametrize(
    ("objective", "cost"),
    [
        (APO(), Cost(1, {"reference": 3}, {"policy": 3}, ("reference",), ("advantage",))),
        (APO(samples_per_prompt=4), Cost(4, {"reference": 3}, {"policy": 3}, ("reference",), ("advantage",))),
        (SFT(), Cost(1, {}, {"policy": 3}, (), ())),
        (
            GRPO(9),
            Cost(8, {"reference": 3, "old_policy": 2}, {"policy": 3}, ("old_policy", "reference"), ("advantage",)),
        ),
        (DAPO(9), Cost(16, {"old_policy": 2}, {"policy": 3}, ("old_policy",), ("advantage",))),
        (
            REBEL(),
            Cost(2, {"old_policy": 2, "present": 2}, {"policy": 3}, ("old_policy",), ("advantage", "group", "weight")),
        ),
        (REINFORCE(), Cost(1, {"old_policy": 2}, {"policy": 3}, ("old_policy",), ("advantage",))),
        (
            RLOO(kl_coefficient=0.1),
            Cost(4, {"reference": 3, "old_policy": 3}, {"policy": 3}, ("old_policy", "reference"), ("advantage",)),
        ),
        (
            PPO(),
            Cost(
                1,
                {"reference": 3, "old_policy": 3, "critic": 3},
                {"policy": 3, "critic": 3},
                ("old_policy", "reference", "advantage", "return", "value"),
                (),
            ),
        ),
        (TBRM(), Cost(1, {"reference": 3}, {"policy": 3}, ("reference",), ("reward",))),
    ],
    ids=lambda one: type(one).__name__ if not isinstance(one, Cost) else "",
)
def test_declared_cost(objective, cost):
    assert objective.cost(3) == cost


def test_a_single_minibatch_takes_no_forward_of_the_old_policy():
    assert REBEL().cost(1).forwards == {} and GRPO(9).cost(1).forwards == {"reference": 1}
    assert RLOO(kl_coefficient=0.1).cost(1).forwards == {"reference": 1, "old_policy": 1}


# Policies over a few responses, all of which are enumerated.


@pytest.mark.parametrize("value", [-2.0, 0.0, 0.4, 3.0])
@pytest.mark.parametrize("beta2", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("policy", [Arms, TwoTokens])
def test_on_policy_gradient_is_the_regularized_rewards_for_any_value(policy, beta2, value):
    torch.manual_seed(3)
    theta, theta_ref = torch.randn(2, *policy.shape, dtype=torch.float64)
    reward_M = torch.rand(len(policy.tokens(theta)), dtype=torch.float64).float().double()
    up = ascent(policy, theta, theta_ref, reward_M, beta2)
    # The loss is in fp32, and `value` is what cancels.
    tolerance = {"rtol": 0, "atol": 1e-6 * float(up.abs().max()) * (1 + abs(value))}
    for scale, factor in (("paper", 2 * beta2), ("unit", 1.0)):
        objective = APO(beta2=beta2, loss_scale=scale)
        gradient = expected_gradient(objective, policy, theta, theta_ref, reward_M, value)
        torch.testing.assert_close(gradient / factor, -up, **tolerance)
        assert objective.reinforce_scale == pytest.approx(factor)


@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize("policy", [Arms, TwoTokens])
def test_apo_with_several_samples_a_prompt_has_the_same_expectation(policy, samples):
    torch.manual_seed(5)
    theta, theta_ref = torch.randn(2, *policy.shape, dtype=torch.float64)
    reward_M = torch.rand(len(policy.tokens(theta)), dtype=torch.float64)
    one, several = (
        expected_gradient(APO(beta2=0.1, samples_per_prompt=count), policy, theta, theta_ref, reward_M, value=0.4)
        for count in (1, samples)
    )
    torch.testing.assert_close(several, one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("policy", [Arms, TwoTokens])
def test_descent_ends_at_the_tilted_reference(policy):
    torch.manual_seed(4)
    theta_ref = torch.randn(*policy.shape, dtype=torch.float64) * 0.5
    theta, beta2 = theta_ref.clone(), 0.5
    reward_M = torch.rand(len(policy.tokens(theta)), dtype=torch.float64)
    objective = APO(beta2=beta2, loss_scale="unit")
    for _ in range(400):
        theta = theta - 4 * expected_gradient(objective, policy, theta, theta_ref, reward_M, value=0.3)
    optimum = (log_prob_M(policy, theta_ref) + reward_M / beta2).softmax(0)
    reached = log_prob_M(policy, theta).exp()
    torch.testing.assert_close(reached, optimum, rtol=0, atol=1e-4)
    assert float((reached - log_prob_M(policy, theta_ref).exp()).abs().max()) > 0.02
