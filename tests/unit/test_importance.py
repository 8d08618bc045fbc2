"""Truncated importance weights against the formula written out, and what they do to a gradient."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_apo.config import RecipeError, build_recipe
from megatron_apo.objectives import APO, SFT, TBRM, Micro, Prepared
from megatron_apo.objectives.importance import importance_weights, weight_gradient

CAP = 1.2
# Three responses of 3, 1 and 2 tokens. log pi_old - log pi_sampler, and of each response the sum: .1, .4, -1.
LOG_RATIO_R = torch.tensor([0.5, -0.6, 0.2, 0.4, -0.7, -0.3])
OLD_R = torch.tensor([-1.0, -2.0, -0.5, -3.0, -0.1, -4.0])
SEQUENCE_R = torch.tensor([0, 0, 0, 1, 2, 2])
E = math.exp
WEIGHTS = {
    "token": [CAP, E(-0.6), CAP, CAP, E(-0.7), E(-0.3)],
    "sequence": [E(0.1)] * 3 + [CAP] + [E(-1.0)] * 2,
}
ADVANTAGE_B, BETA2 = torch.tensor([0.75, -0.5, 0.1]), 0.1


def weights(level, log_ratio_R=LOG_RATIO_R, cap=CAP):
    return importance_weights(level, cap, OLD_R, OLD_R - log_ratio_R, SEQUENCE_R, 3)


@pytest.mark.parametrize(("level", "units", "capped"), [("token", 6, 3), ("sequence", 3, 1)])
def test_weights_by_hand(level, units, capped):
    weight_R, stats = weights(level)
    assert weight_R.tolist() == pytest.approx(WEIGHTS[level])
    own = WEIGHTS[level] if level == "token" else [E(0.1), CAP, E(-1.0)]
    sums = {name: float(value) for name, value in stats.sums.items()}
    assert sums == pytest.approx({"importance": sum(own), "importance_capped": capped, "importance_units": units})


def test_trainer_and_sampler_alike_weigh_one():
    for level in WEIGHTS:
        weight_R, stats = weights(level, torch.zeros(6))
        assert weight_R.tolist() == [1.0] * 6 and not stats.sums["importance_capped"]


def test_a_ratio_beyond_fp32_is_cut_and_one_that_is_no_number_stays_none():
    far = torch.tensor([300.0, 0.0, 0.0, -300.0, math.nan, 0.0])
    weight_R, stats = weights("token", far)
    assert weight_R[[0, 3]].tolist() == [pytest.approx(CAP), 0.0] and stats.sums["importance_capped"] == 1
    assert math.isnan(weight_R[4]) and weights("sequence", far)[0].isnan().tolist() == [False] * 4 + [True] * 2


def test_log_probs_keep_their_bits_and_their_gradient_is_weighted():
    log_prob_R = torch.randn(6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weighted_R = weight_gradient(log_prob_R, torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0, 4.0]))
    assert torch.equal(weighted_R, log_prob_R)
    weighted_R.sum().backward()
    assert log_prob_R.grad.tolist() == [0.0, 0.5, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("level", WEIGHTS)
def test_the_gradient_is_that_of_the_formula(level):
    """sequence: of w(y) x the squared error, by autograd. token: 2 b2 x the response's residual x w_t."""
    reference_R = OLD_R + 0.3 * torch.arange(6)
    ours = OLD_R.clone().requires_grad_()
    weight_R, _ = weights(level)
    micro = Micro(weight_gradient(ours, weight_R), [0, 1, 2], SEQUENCE_R, {"reference": reference_R})
    term = APO(beta2=BETA2).loss(micro, Prepared({"advantage": ADVANTAGE_B}))
    term.total.backward()

    theirs, lengths = OLD_R.clone().requires_grad_(), (3, 1, 2)
    rows = [part.sum() for part in (theirs - reference_R).split(lengths)]
    errors = [BETA2 * log_ratio - advantage for log_ratio, advantage in zip(rows, ADVANTAGE_B, strict=True)]
    if level == "sequence":
        by_hand = [E(0.1), CAP, E(-1.0)]
        sum(weight * error**2 for weight, error in zip(by_hand, errors, strict=True)).backward()
        expected = theirs.grad
    else:
        residual_R = torch.cat([error.detach().expand(size) for error, size in zip(errors, lengths, strict=True)])
        expected = 2 * BETA2 * residual_R * torch.tensor(WEIGHTS["token"])
    torch.testing.assert_close(ours.grad, expected)
    assert float(term.stats.sums["loss"]) == pytest.approx(sum(float(error.detach()) ** 2 for error in errors))


def test_token_weights_of_a_sampler_that_is_off_undo_it_in_expectation():
    """One token of three kinds, drawn from another distribution: the weighted gradient's mean is the on-policy one."""
    policy = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    sampler = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    residual = torch.tensor([-0.4, 0.3, 0.9], dtype=torch.float64)
    none = torch.zeros(1, dtype=torch.int64)

    def mean_gradient(drawn_from, level):
        total = torch.zeros(3, dtype=torch.float64)
        for token in range(3):
            score = -policy + torch.eye(3, dtype=torch.float64)[token]  # of the logits
            weight = 1.0
            if level:
                weight = importance_weights(level, 2.0, policy[[token]].log(), sampler[[token]].log(), none, 1)[0]
            total += drawn_from[token] * weight * residual[token] * score
        return total

    on_policy = mean_gradient(policy, None)
    assert (mean_gradient(sampler, None) - on_policy).abs().max() > 0.01
    for level in WEIGHTS:  # no ratio is above the cap: the largest is 5/3
        torch.testing.assert_close(mean_gradient(sampler, level), on_policy, rtol=1e-6, atol=1e-9)


def test_objectives_say_at_which_levels_they_are_weighted():
    assert APO.importance_levels == ("token", "sequence") and SFT.importance_levels == TBRM.importance_levels == ()


def test_a_cap_is_for_weights_and_positive():
    tree = {"model": {"path": "m"}, "data": {"train": "t"}, "vstar": {"dir": "v"}}
    recipe = build_recipe(tree)
    assert (recipe.train.importance, recipe.train.importance_cap) == ("none", 2.0)
    with pytest.raises(RecipeError, match="train.importance_cap: 3.0 is for train.importance=token or sequence"):
        build_recipe(tree, ["train.importance_cap=3"])
    with pytest.raises(RecipeError, match="train.importance_cap: 0 is not allowed"):
        build_recipe(tree, ["train.importance=token", "train.importance_cap=0"])
    with pytest.raises(
        RecipeError, match="train.importance: 'prompt' is not allowed; use 'none', 'token' or 'sequence'"
    ):
        build_recipe(tree, ["train.importance=prompt"])
    build_recipe(tree, ["train.importance=sequence", "train.importance_cap=3"])
