"""A*-PO's loss by hand, its gradient by formula, and what it does to policies small enough to enumerate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_apo.config import ObjectiveConfig
from megatron_apo.objectives import APO, OBJECTIVES, SFT, MicroTargets, Prepared, Samples, build_objective

# Two sequences of 3 and 1 tokens. Log-ratios: 0.5 - 0.2 + 0.1 = 0.4 and 0.3. Advantages: 1 - 0.25 and 0 - 0.5.
ANCHOR_R = torch.tensor([-1.0, -2.0, -0.5, -3.0])
LOG_PROB_R = ANCHOR_R + torch.tensor([0.5, -0.2, 0.1, 0.3])
SEQUENCE_R = torch.tensor([0, 0, 0, 1])
SAMPLES = Samples(prompt_ids=["x", "y"], reward_B=torch.tensor([1.0, 0.0]), num_tokens_B=torch.tensor([3, 1]))
VALUES = {"y": 0.5, "x": 0.25, "unused": 9.0}


def loss_of(objective, log_prob_R=LOG_PROB_R):
    targets = objective.prepare(SAMPLES, VALUES).select([0, 1])
    return objective.loss(log_prob_R, ANCHOR_R, SEQUENCE_R, targets)


# (0.1 * 0.4 - 0.75)^2 + (0.1 * 0.3 + 0.5)^2 = 0.5041 + 0.2809
@pytest.mark.parametrize(("scale", "total"), [("paper", 0.785), ("unit", 0.785 / 0.2)])
def test_apo_by_hand(scale, total):
    term = loss_of(APO(beta2=0.1, loss_scale=scale))
    assert float(term.total) == pytest.approx(total, rel=1e-6)
    assert term.count == 2
    assert float(term.stats.sums["loss"]) == pytest.approx(total, rel=1e-6)
    assert not term.stats.sums["loss"].requires_grad


# 2 b2 (b2 s - A) for every token of a sequence: 0.2 * -0.71 and 0.2 * 0.53.
@pytest.mark.parametrize(("scale", "factor"), [("paper", 0.2), ("unit", 1.0)])
def test_apo_gradient(scale, factor):
    log_prob_R = LOG_PROB_R.clone().requires_grad_()
    objective = APO(beta2=0.1, loss_scale=scale)
    loss_of(objective, log_prob_R).total.backward()
    expected = torch.tensor([-0.71, -0.71, -0.71, 0.53]) * factor
    torch.testing.assert_close(log_prob_R.grad, expected, rtol=1e-6, atol=1e-7)
    assert objective.reinforce_scale == pytest.approx(factor)


def test_default_beta2_is_the_papers_and_the_first_loss_is_the_squared_advantage():
    term = loss_of(APO(), ANCHOR_R)
    assert APO().beta2 == 1e-3 and APO().loss_scale == "paper"
    assert float(term.total) == 0.75**2 + 0.5**2


def test_order_of_sequences_within_a_micro_batch():
    objective = APO(beta2=0.1)
    targets = objective.prepare(SAMPLES, VALUES).select([1, 0])
    term = objective.loss(LOG_PROB_R[[3, 0, 1, 2]], ANCHOR_R[[3, 0, 1, 2]], torch.tensor([0, 1, 1, 1]), targets)
    assert float(term.total) == pytest.approx(0.785, rel=1e-6)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=8), cut=st.integers(1, 7), seed=st.integers(0, 2**31 - 1)
)
def test_micro_batches_add_up(lengths, cut, seed):
    cut = min(cut, len(lengths) - 1)
    generator = torch.Generator().manual_seed(seed)
    log_prob, denominator = torch.randn(2, sum(lengths), generator=generator)
    objective = APO(beta2=0.3)
    prepared = Prepared({"advantage": torch.rand(len(lengths), generator=generator)}, {})

    def total(first, last):
        counts = torch.tensor(lengths[first:last])
        start, end = sum(lengths[:first]), sum(lengths[:last])
        sequence_R = torch.repeat_interleave(torch.arange(last - first), counts)
        return objective.loss(
            log_prob[start:end], denominator[start:end], sequence_R, prepared.select(range(first, last))
        ).total

    whole = total(0, len(lengths))
    torch.testing.assert_close(total(0, cut) + total(cut, len(lengths)), whole, rtol=1e-5, atol=1e-6)


def test_a_prompt_without_value_is_an_error():
    with pytest.raises(KeyError, match="'x'"):
        APO().prepare(SAMPLES, {"y": 0.5})


def test_select_keeps_order():
    prepared = Prepared(
        per_sequence={"a": torch.tensor([10.0, 20.0, 30.0])},
        per_token={"t": [torch.tensor([1.0]), torch.tensor([2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])]},
    )
    targets = prepared.select([2, 0])
    assert targets.per_sequence["a"].tolist() == [30, 10]
    assert targets.per_token["t"].tolist() == [4, 5, 6, 1]


def test_sft_is_the_negative_log_prob_over_tokens():
    log_prob_R = torch.tensor([-1.0, -2.0, -3.5], requires_grad=True)
    term = SFT().loss(log_prob_R, torch.zeros(3), torch.tensor([0, 0, 1]), MicroTargets({}, {}))
    term.total.backward()
    assert (term.total.item(), term.count, SFT.unit) == (6.5, 3, "token")
    assert log_prob_R.grad.tolist() == [-1, -1, -1]


def test_a_recipe_names_its_objective():
    config = ObjectiveConfig(beta2=0.02, loss_scale="unit")
    assert build_objective(config) == APO(beta2=0.02, loss_scale="unit")
    assert set(OBJECTIVES) == {"apo", "sft"}


# Policies over a few responses. `tokens(theta)` gives each response's token log-probs; all responses are enumerated.


class Arms:
    """One token out of six."""

    shape = (6,)

    @staticmethod
    def tokens(theta):
        return list(theta.log_softmax(0).unsqueeze(1))


class TwoTokens:
    """Up to two tokens out of {stop, a, b}; the second depends on the first."""

    shape = (3, 3)  # row 0: first token; rows 1, 2: second token after a, b

    @staticmethod
    def tokens(theta):
        log_p = theta.log_softmax(1)
        second = [torch.stack([log_p[0, i], log_p[i, j]]) for i in (1, 2) for j in range(3)]
        return [log_p[0, :1], *second]


def enumerated(policy, theta):
    """(all responses' token log-probs concatenated, which response each belongs to, log-prob of each response)"""
    pieces = policy.tokens(theta)
    sequence_R = torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor([len(p) for p in pieces]))
    return torch.cat(pieces), sequence_R, torch.stack([piece.sum() for piece in pieces])


def expected_gradient(objective, policy, theta, theta_ref, reward_B, value):
    """E over y ~ pi of the loss's gradient in theta, through `prepare` and `loss`."""
    theta = theta.detach().requires_grad_()
    log_prob_R, sequence_R, log_pi_B = enumerated(policy, theta)
    denominator_R = enumerated(policy, theta_ref)[0]
    samples = Samples(["p"] * len(reward_B), reward_B, torch.bincount(sequence_R))
    targets = objective.prepare(samples, {"p": value}).select(range(len(reward_B)))
    leaf = log_prob_R.detach().requires_grad_()
    (by_log_prob_R,) = torch.autograd.grad(objective.loss(leaf, denominator_R, sequence_R, targets).total, leaf)
    weight_R = log_pi_B.detach().exp()[sequence_R]
    return torch.autograd.grad((weight_R * by_log_prob_R * log_prob_R).sum(), theta)[0]


def objective_gradient(policy, theta, theta_ref, reward_B, beta2):
    """Gradient of J = E r - b2 KL(pi || pi_ref), float64."""
    theta = theta.detach().requires_grad_()
    log_pi_B, log_ref_B = enumerated(policy, theta)[2], enumerated(policy, theta_ref)[2]
    pi_B = log_pi_B.exp()
    return torch.autograd.grad((pi_B * reward_B).sum() - beta2 * (pi_B * (log_pi_B - log_ref_B)).sum(), theta)[0]


@pytest.mark.parametrize("value", [-2.0, 0.0, 0.4, 3.0])
@pytest.mark.parametrize("beta2", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("policy", [Arms, TwoTokens])
def test_on_policy_gradient_is_the_regularized_rewards_for_any_value(policy, beta2, value):
    torch.manual_seed(3)
    theta, theta_ref = torch.randn(2, *policy.shape, dtype=torch.float64)
    reward_B = torch.rand(len(policy.tokens(theta)), dtype=torch.float64).float().double()
    ascent = objective_gradient(policy, theta, theta_ref, reward_B, beta2)
    # The loss is in fp32, and `value` is what cancels.
    tolerance = {"rtol": 0, "atol": 1e-6 * float(ascent.abs().max()) * (1 + abs(value))}
    for scale, factor in (("paper", 2 * beta2), ("unit", 1.0)):
        objective = APO(beta2=beta2, loss_scale=scale)
        gradient = expected_gradient(objective, policy, theta, theta_ref, reward_B, value)
        torch.testing.assert_close(gradient / factor, -ascent, **tolerance)
        assert objective.reinforce_scale == pytest.approx(factor)


@pytest.mark.parametrize("policy", [Arms, TwoTokens])
def test_descent_ends_at_the_tilted_reference(policy):
    torch.manual_seed(4)
    theta_ref = torch.randn(*policy.shape, dtype=torch.float64) * 0.5
    theta, beta2 = theta_ref.clone(), 0.5
    reward_B = torch.rand(len(policy.tokens(theta)), dtype=torch.float64)
    objective = APO(beta2=beta2, loss_scale="unit")
    for _ in range(400):
        theta = theta - 4 * expected_gradient(objective, policy, theta, theta_ref, reward_B, value=0.3)
    optimum = (enumerated(policy, theta_ref)[2] + reward_B / beta2).softmax(0)
    reached = enumerated(policy, theta)[2].exp()
    torch.testing.assert_close(reached, optimum, rtol=0, atol=1e-4)
    assert float((reached - enumerated(policy, theta_ref)[2].exp()).abs().max()) > 0.02
