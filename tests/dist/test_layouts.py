"""Every layout computes the same thing: log-probs against transformers; gradients, norm and update against one rank.

One rank set per layout measures everything (worker.py); the tests below compare. Gradients are compared before the
optimizer, which would hide a scaled or a wrong one; `test_comparison_notices` breaks them on purpose.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.dist.ranks import ONE_RANK, start_ranks, variants_of
from tests.dist.worker import (
    BETA2,
    CASES,
    EVERY_CASE,
    HALF,
    MUTATIONS,
    NUM_MINIBATCHES,
    TEMPERATURE,
    anchors,
    batch,
)
from tests.models import VARIANTS, as_saved, hf_log_probs, make_model

# ep ranks share the experts within cp x dp
LAYOUTS = ["tp1", "dp2", "tp2-pp2", "pp2-dp2-ep2", "pp2-vpp2", "cp2", "pp2-vpp2-cp2-ep2"]
FULL_LAYOUTS = [
    "tp2",
    "pp2",
    "tp4",
    "pp4",
    "tp2-dp2",
    "pp2-dp2",
    "dp2-ep2",
    "dp4-ep2",
    "dp4-ep4",
    "cp4",
    "tp2-cp2",
    "cp2-dp2-ep4",
    "tp2-pp2-vpp2",
    "pp2-vpp2-dp2",
]
ALL_LAYOUTS = LAYOUTS + [pytest.param(layout, marks=pytest.mark.full) for layout in FULL_LAYOUTS]
OTHER_LAYOUTS = ALL_LAYOUTS[1:]


def run_ranks(work: Path, layout: str) -> dict:
    """Measure a layout with real ranks; returns what rank 0 saved."""
    start_ranks("tests.dist.worker", work, layout, *variants_of(layout))
    return torch.load(work / f"{layout}.pt", weights_only=True)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    for name in VARIANTS:
        make_model(name, folder / "models")
    return folder


@pytest.fixture(scope="module")
def measured(work: Path):
    cache: dict[str, dict] = {}

    def get(layout: str) -> dict:
        if layout not in cache:
            cache[layout] = run_ranks(work, layout)
        return cache[layout]

    return get


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """|ours - theirs| / |theirs| in the 2-norm."""
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))


def worst_gradient(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    assert ours.keys() == theirs.keys()
    return max((relative_difference(ours[name], theirs[name]), name) for name in theirs)


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_log_probs_equal_transformers(layout, measured, work):
    prompts, responses, _ = batch()
    for name, results in measured(layout).items():
        expected = hf_log_probs(work / "models" / name, prompts, responses, TEMPERATURE)
        for case, found in results["log_probs"].items():
            assert sorted(found) == list(range(len(expected)))
            worst = max(float((found[i] - expected[i]).abs().max()) for i in found)
            assert worst <= 1e-5, f"{name} {case}: {worst}"


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_export_is_bitwise_the_checkpoint(layout, measured, work):
    for name, results in measured(layout).items():
        original = load_file(work / "models" / name / "model.safetensors")
        exported = results["export"]
        assert exported.keys() == original.keys(), name
        assert all(torch.equal(exported[key], original[key]) for key in original), name


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_gradients_and_update_equal_one_rank(layout, measured):
    for name, results in measured(layout).items():
        reference = measured(ONE_RANK)[name]["cases"]["packed"]
        for case, found in results["cases"].items():
            if case not in MUTATIONS:
                check_case(found, reference, f"{name} {case}")


def test_micro_batches_and_packing_change_nothing(measured):
    for name in EVERY_CASE:
        cases = measured(ONE_RANK)[name]["cases"]
        for case in CASES:
            check_case(cases[case], cases["packed"], f"{name} {case}")


def test_gradients_equal_transformers(measured, work):
    """One rank's gradients are those of the formula on transformers' model: mean over sequences of (b2 s - A)^2."""
    prompts, responses, advantage = batch()
    for name in VARIANTS:
        model = hf_model(work / "models" / name)
        loss = hf_loss(model, prompts, responses, advantage)
        loss.backward()
        expected = as_saved({key: parameter.grad for key, parameter in model.named_parameters()})
        case = measured(ONE_RANK)[name]["cases"]["packed"]
        difference, tensor = worst_gradient(case["gradients"], expected)
        assert difference <= 1e-5, f"{name}: gradient of {tensor} differs by {difference}"
        assert case["loss"] / len(prompts) == pytest.approx(float(loss), rel=1e-5), name
        norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
        assert case["norm"] == pytest.approx(float(norm), rel=1e-5), name


def hf_model(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def hf_loss(model: torch.nn.Module, prompts, responses, advantage) -> torch.Tensor:
    losses = []
    for prompt, response, anchor, target in zip(prompts, responses, anchors(responses), advantage, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        log_prob = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
        losses.append((BETA2 * (log_prob - sum(anchor)) - target).square())
    return torch.stack(losses).mean()


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].float().flatten() for name in sorted(tensors)])


def check_case(found: dict, reference: dict, label: str) -> None:
    assert found["loss"] == pytest.approx(reference["loss"], rel=1e-5), label
    assert found["norm"] == pytest.approx(reference["norm"], rel=1e-5), label
    if found["gradients"] is not None:
        difference, tensor = worst_gradient(found["gradients"], reference["gradients"])
        assert difference <= 1e-5, f"{label}: gradient of {tensor} differs by {difference}"
    difference, tensor = worst_gradient(found["change"], reference["change"])
    assert difference <= 1e-3, f"{label}: update of {tensor} differs by {difference}"


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_minibatches_are_exact_in_every_layout(layout, measured):
    """Two optimizer steps on one batch, each normalized by its own global count."""
    for name, results in measured(layout).items():
        if name in EVERY_CASE:
            found, reference = results["minibatches"], measured(ONE_RANK)[name]["minibatches"]
            assert found["losses"] == pytest.approx(reference["losses"], rel=1e-5), name
            assert found["norms"] == pytest.approx(reference["norms"], rel=1e-5), name
            difference, tensor = worst_gradient(found["change"], reference["change"])
            assert difference <= 1e-3, f"{name}: update of {tensor} differs by {difference}"


def test_minibatches_equal_the_formula(measured, work):
    """Means over each half of the batch, and two steps of torch's Adam on transformers' model."""
    prompts, responses, advantage = batch()
    model = hf_model(work / "models" / "qwen3-tied")
    start = {key: value.detach().clone() for key, value in model.named_parameters()}
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    size, losses, norms = len(prompts) // NUM_MINIBATCHES, [], []
    for first in range(0, len(prompts), size):
        rows = slice(first, first + size)
        loss = hf_loss(model, prompts[rows], responses[rows], advantage[rows])
        adam.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)))
        adam.step()
        losses.append(float(loss) * size)
    found = measured(ONE_RANK)["qwen3-tied"]["minibatches"]
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    assert found["norms"] == pytest.approx(norms, rel=1e-5)
    expected = as_saved({key: value.detach() - start[key] for key, value in model.named_parameters()})
    difference, tensor = worst_gradient(found["change"], expected)
    assert difference <= 1e-3, f"update of {tensor} differs by {difference}"


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_bf16_is_within_its_error(layout, measured):
    """bf16 keeps 8 bits: log-probs and gradients stay that close to fp32's in every layout, and no closer."""
    for name in HALF:
        if name not in measured(layout):
            continue
        found, exact = measured(layout)[name]["bf16"], measured(ONE_RANK)[name]
        log_probs, expected = found["log_probs"], exact["log_probs"]["packed"]
        worst = max(float((log_probs[i] - expected[i]).abs().max()) for i in expected)
        assert 1e-4 < worst < 0.1, f"{name}: {worst}"
        gradients, expected = found["gradients"], exact["cases"]["packed"]["gradients"]
        difference = relative_difference(flat(gradients), flat(expected))
        assert 1e-4 < difference < 0.03, f"{name}: gradient differs by {difference}"


@pytest.mark.parametrize("fault", MUTATIONS)
def test_comparison_notices(fault, measured):
    """The comparison fails when the gradient is doubled or negated, or a micro-batch is dropped."""
    cases = measured(ONE_RANK)["qwen3-tied"]["cases"]
    with pytest.raises(AssertionError):
        check_case(cases[fault], cases["packed"], fault)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_is_not_finite_stops_the_run(layout, measured):
    """Every rank sees the NaN of one: rank 0 reports here, the NaN was on the last."""
    said = [found["nan"] for name, found in measured(layout).items() if name in EVERY_CASE]
    assert said and all("the gradient's norm is nan" in text for text in said)
