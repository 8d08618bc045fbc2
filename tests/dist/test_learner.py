"""The learner that trains is the one that is tested: its steps are those of transformers and torch.optim alone.

Real ranks run stage 2's `Learner` on a batch of two minibatches, packed (learner_worker.py); here the same two steps
are written out on one model. Compared are each minibatch's reduced gradients and norm; what both steps changed, with
Adam's eps at 1, where a step is proportional to the gradient, and at 1e-8; and the distance from the sampler. So are
steps with importance weights, by token and by sequence, and those of a batch with masked responses. Each fault that is
put into the learner from outside must be seen by the comparisons that can see it, and by no other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

from megatron_apo.data.rollouts import RolloutBatch
from tests.dist.learner_worker import (
    BETA2,
    FAULTS,
    IMPORTANCE_CAPS,
    IMPORTANCE_FAULTS,
    MASK_FAULTS,
    MASKED,
    MISMATCH,
    NUM_MINIBATCHES,
    SETTINGS,
    TEMPERATURE,
    VARIANT,
    batch,
    faults_of,
    values,
)
from tests.dist.ranks import start_ranks
from tests.dist.test_layouts import relative_difference
from tests.models import make_model

LAYOUTS = ["tp2-pp2", "dp2", "cp2"]
# Of the largest tensor, in the 2-norm.
GRADIENTS, CHANGE = 1e-5, {1.0: 1e-4, 1e-8: 1e-3}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learner")
    for seed, name in enumerate(("policy", "reference")):
        make_model(VARIANT, folder / name, seed=seed)
    return folder


@pytest.fixture(scope="module")
def measured(work: Path) -> Callable[[str], dict]:
    @cache
    def get(layout: str) -> dict:
        start_ranks("tests.dist.learner_worker", work, layout)
        return torch.load(work / f"{layout}.pt", weights_only=True)

    return get


def response_log_probs(model: torch.nn.Module, of: RolloutBatch, row: int) -> torch.Tensor:
    """log pi of each of a response's tokens under the temperature, by transformers."""
    tokens, response = torch.tensor(of.sequences.row(row)).long(), torch.tensor(of.sequences.response(row)).long()
    logits = model(tokens[None]).logits[0, len(tokens) - len(response) - 1 : -1] / TEMPERATURE
    return logits.log_softmax(-1).gather(1, response[:, None])[:, 0]


@pytest.fixture(scope="module")
def steps(work: Path) -> Callable[..., dict]:
    """`two_steps` from the test's weights."""
    models = {
        name: transformers.AutoModelForCausalLM.from_pretrained(work / name / VARIANT, dtype=torch.float32)
        for name in ("policy", "reference")
    }
    start = {name: parameter.detach().clone() for name, parameter in models["policy"].named_parameters()}

    def of(eps: float, importance: str = "none", masked: Sequence[int] = ()) -> dict:
        models["policy"].load_state_dict(start, strict=False)
        found = two_steps(models["policy"], models["reference"], eps, importance, masked)
        change = {name: parameter.detach() - start[name] for name, parameter in models["policy"].named_parameters()}
        return found | {"change": change}

    return of


@pytest.fixture(scope="module")
def expected(steps) -> dict[float, dict]:
    """{eps: {norms and gradients of each minibatch, what both steps changed, distance from the sampler}}"""
    return {eps: steps(eps) for eps in SETTINGS}


@pytest.fixture(scope="module")
def expected_weighted(steps) -> dict[str, dict[float, dict]]:
    """{level of the importance weights: the same, with eps 1 alone}"""
    return {level: {1.0: steps(1.0, level)} for level in IMPORTANCE_CAPS}


@pytest.fixture(scope="module")
def expected_masked(steps) -> dict[str, dict[float, dict]]:
    """{level of the importance weights: {eps: the same, of the batch without its masked responses}}"""
    return {
        "none": {eps: steps(eps, masked=MASKED) for eps in SETTINGS},
        "token": {1.0: steps(1.0, "token", masked=MASKED)},
    }


def two_steps(
    policy: torch.nn.Module, reference: torch.nn.Module, eps: float, importance: str, masked: Sequence[int]
) -> dict:
    """Equation 4 of the paper and Adam, without the masked responses."""
    whole, vstar = batch(), values()
    adam = torch.optim.AdamW(policy.parameters(), lr=SETTINGS[eps][0], betas=(0.9, 0.95), eps=eps, weight_decay=0.0)
    norms, gradients, differences, size = [], [], [], len(whole) // NUM_MINIBATCHES
    with torch.no_grad():
        references = [response_log_probs(reference, whole, row).sum() for row in range(len(whole))]
        for row in range(len(whole)):
            differences.append(response_log_probs(policy, whole, row) - torch.tensor(whole.log_probs([row])))
    for first in range(0, len(whole), size):
        losses = []
        for row in sorted({*range(first, first + size)} - {*masked}):
            log_prob_R = response_log_probs(policy, whole, row)
            error = BETA2 * (log_prob_R.sum() - references[row]) - (whole.reward_B[row] - vstar[whole.prompt_ids[row]])
            match importance:
                case "none":
                    losses.append(error**2)
                case "sequence":
                    losses.append(weights_of(importance, differences[row]) * error**2)
                case "token":  # of the same gradient: the residual is the whole response's, each token has its weight
                    weighted = (weights_of(importance, differences[row]) * log_prob_R).sum()
                    losses.append(2 * error.detach() * BETA2 * weighted)
        adam.zero_grad()
        torch.stack(losses).mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in policy.named_parameters()})
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients[-1].values()]).norm()))
        adam.step()
    # Of the mismatch, the one minibatch that is at the weights that sampled.
    found = {"norms": norms, "gradients": gradients, "mismatch": mismatch_of(differences[:size]), "importance": {}}
    if importance != "none":
        known = [difference for row, difference in enumerate(differences) if row not in masked]
        weight = torch.cat([weights_of(importance, difference).reshape(-1) for difference in known])
        capped = (weight == IMPORTANCE_CAPS[importance]).float()
        found["importance"] = {"mean": float(weight.mean()), "capped": float(capped.mean())}
    return found


def weights_of(importance: str, difference_R: torch.Tensor) -> torch.Tensor:
    """min(pi_old / pi_sampler, cap) of a response [] or of each of its tokens [R]; difference_R: of their logs."""
    ratio = (difference_R.sum() if importance == "sequence" else difference_R).exp()
    return ratio.clamp(max=IMPORTANCE_CAPS[importance])


def mismatch_of(differences: list[torch.Tensor]) -> dict[str, float]:
    """Of log pi - log pi_sampler of each response's tokens."""
    distance_R = torch.cat(differences).abs()
    ratio_B = torch.stack([difference.sum() for difference in differences]).exp()
    values = (distance_R.mean(), distance_R.max(), distance_R.exp().mean(), ratio_B.mean(), ratio_B.max())
    ess = ratio_B.sum().square() / ratio_B.square().sum() / len(ratio_B)
    return dict(zip(MISMATCH, map(float, (*values, ess)), strict=True))


def worst(ours: Tensors, theirs: Tensors) -> float:
    """Largest relative difference of a tensor, in the 2-norm."""
    assert ours.keys() == theirs.keys()
    return max(relative_difference(ours[name], theirs[name]) for name in theirs)


def differences(found: dict, expected: dict[float, dict]) -> dict[str, tuple[float, float]]:
    """{comparison: (worst relative difference, the tolerance)}."""
    ours, theirs = found[1.0], expected[1.0]
    assert len(ours["gradients"]) == len(theirs["gradients"]) == NUM_MINIBATCHES
    steps = [worst(*pair) for pair in zip(ours["gradients"], theirs["gradients"], strict=True)]
    norms = [*zip(ours["norms"], theirs["norms"], strict=True)]
    if 1e-8 in found:
        # Of the sharded optimizer, whose gradients no rank has whole, the first minibatch's: the second's is at weights
        # that Adam has moved by the rounding of small gradients.
        norms.append((found[1e-8]["norms"][0], expected[1e-8]["norms"][0]))
    return {
        "gradients": (max(steps), GRADIENTS),
        "norms": (max(abs(mine - other) / other for mine, other in norms), GRADIENTS),
        **{
            f"weights, eps {eps:g}": (worst(found[eps]["change"], expected[eps]["change"]), CHANGE[eps])
            for eps in found
        },
        "mismatch": (worst_number(ours["mismatch"], theirs["mismatch"]), GRADIENTS),
        "importance": (worst_number(ours["importance"], theirs["importance"]), GRADIENTS),
    }


def worst_number(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Largest relative difference."""
    assert ours.keys() == theirs.keys()
    return max((abs(ours[name] - theirs[name]) / theirs[name] for name in theirs), default=0.0)


def failing(found: dict, expected: dict[float, dict]) -> set[str]:
    return {name for name, (value, limit) in differences(found, expected).items() if not value <= limit}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_those_of_transformers_and_torch(layout: str, measured, expected) -> None:
    found = differences(measured(layout)["none"], expected)
    print(layout, {name: f"{value:.1e} of {limit:g}" for name, (value, limit) in found.items()})
    assert failing(measured(layout)["none"], expected) == set(), found


@pytest.mark.parametrize(("layout", "fault"), [(layout, fault) for layout in LAYOUTS for fault in faults_of(layout)])
def test_a_fault_in_the_learner_is_seen(layout: str, fault: str, measured, expected) -> None:
    found = differences(measured(layout)[fault], expected)
    assert failing(measured(layout)[fault], expected) == FAULTS[fault][1], found


@pytest.mark.parametrize("level", IMPORTANCE_CAPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weighted_steps_are_those_of_transformers_and_torch(layout, level, measured, expected_weighted) -> None:
    found = differences(measured(layout)["importance"][level]["none"], expected_weighted[level])
    assert failing(measured(layout)["importance"][level]["none"], expected_weighted[level]) == set(), found
    assert 0.2 < expected_weighted[level][1.0]["importance"]["capped"] < 0.8


@pytest.mark.parametrize("fault", IMPORTANCE_FAULTS)
@pytest.mark.parametrize("level", IMPORTANCE_CAPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fault_in_the_weights_is_seen(layout, level, fault, measured, expected_weighted) -> None:
    found = differences(measured(layout)["importance"][level][fault], expected_weighted[level])
    assert (
        failing(measured(layout)["importance"][level][fault], expected_weighted[level]) == IMPORTANCE_FAULTS[fault][1]
    ), found


@pytest.mark.parametrize(("name", "level"), [("none", "none"), ("importance", "token")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_with_masked_responses_are_those_without_them(layout, name, level, measured, expected_masked) -> None:
    """Their rewards are NaN; the mismatch is of all responses."""
    found = measured(layout)["masked"][name]
    assert failing(found, expected_masked[level]) == set(), differences(found, expected_masked[level])


@pytest.mark.parametrize("fault", MASK_FAULTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fault_in_the_masking_is_seen(layout, fault, measured, expected_masked) -> None:
    found = measured(layout)["masked"][fault]
    assert failing(found, expected_masked["none"]) == MASK_FAULTS[fault][1], differences(found, expected_masked["none"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_minibatch_that_is_masked_whole_takes_no_step_on_any_rank(layout: str, measured) -> None:
    """Neither momentum nor weight decay moves a weight."""
    half, whole = (measured(layout)["all masked"][name] for name in ("first", "all"))
    assert set(half["masked_steps"]) == {1} and half["steps"] == 1 and half["changed"]
    assert set(whole["masked_steps"]) == {2} and whole["steps"] == 0 and not whole["changed"]
    assert half["metrics"]["response/masked"] == 0.5 and whole["metrics"]["response/masked"] == 1
    rewards, vstar = batch().reward_B[7:], [values()[prompt_id] for prompt_id in batch().prompt_ids[7:]]
    assert half["metrics"]["reward/mean"] == pytest.approx(rewards.mean())
    assert half["metrics"]["advantage/mean"] == pytest.approx((rewards - vstar).mean())
    unknown = {"loss", "grad_norm", "grad_norm_reinforce", "reward/mean", "value/mean", "advantage/mean"}
    unknown |= {"advantage/second_moment"}
    assert {name for name, value in whole["metrics"].items() if value != value} == unknown
    assert not any(value != value for value in half["metrics"].values())


def test_the_steps_are_large_enough_to_be_compared(expected) -> None:
    """A change of a weight is a difference of two fp32 numbers, of which it has to be more than the rounding."""
    for eps, limit in CHANGE.items():
        sizes = [float(change.square().mean().sqrt()) for change in expected[eps]["change"].values()]
        # Weights are below 2, where fp32 numbers lie 1.2e-7 apart: rounding is 3.4e-8 in the root mean square.
        assert min(sizes) * limit > 3.4e-8, (eps, min(sizes))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_is_not_finite_is_skipped_counted_and_kept(layout: str, measured, work: Path) -> None:
    found = measured(layout)["skipped"]
    assert found["one minibatch learns"] and found["skipped"] == found["in a row"] == 1
    assert found["in a row after a good step"] == 0
    assert not found["bad minibatches change weights"]
    folder = work / layout / "rollouts" / "skipped"
    assert (
        "the gradient of policy was not finite; that is 3 optimizer steps in a row" in found["error"]
        and str(folder) in found["error"]
    )
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:06d}.parquet" for step in (1, 3, 4)]
    kept = RolloutBatch.read(folder / "step-000001.parquet")
    assert kept.sequences.token_ids_T.tolist() == batch().sequences.token_ids_T.tolist()
    assert [row for row, reward in enumerate(kept.reward_B) if reward != reward] == [len(kept) - 1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sampler_that_is_too_far_off_ends_the_run_before_the_optimizers_step(layout: str, measured, expected) -> None:
    """On all ranks, in the same words; the schedule's step is the optimizer's."""
    found = measured(layout)["stopped"]
    (line,) = set(found["errors"])
    mean = expected[1.0]["mismatch"]["mean"]
    assert (
        line.startswith(f"step 7: trainer and sampler differ by {mean:.3g} nats")
        and "mismatch.stop allows 0.02" in line
    )
    assert not found["weights changed"] and found["schedule"] == 0
