"""Every layout computes the same thing: log-probs against transformers; gradients, norm and update against one rank.

One rank set per layout measures everything (worker.py); the tests below compare. Gradients are compared before the
optimizer, which would hide a scaled or a wrong one; `test_comparison_notices` breaks them on purpose.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.dist.worker import BETA2, CASES, EVERY_CASE, MUTATIONS, TEMPERATURE, anchors, batch
from tests.models import EXPERTS, VARIANTS, as_saved, hf_log_probs, make_model

ROOT = Path(__file__).parents[2]
# (tp, pp, dp, ep); ep ranks share the experts within dp
ONE_RANK = (1, 1, 1, 1)
LAYOUTS = [ONE_RANK, (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (2, 2, 1, 1), (1, 2, 2, 2)]
FULL_LAYOUTS = [(4, 1, 1, 1), (1, 4, 1, 1), (2, 1, 2, 1), (1, 2, 2, 1), (1, 1, 2, 2), (1, 1, 4, 2), (1, 1, 4, 4)]
ALL_LAYOUTS = LAYOUTS + [pytest.param(*[layout], marks=pytest.mark.full) for layout in FULL_LAYOUTS]
OTHER_LAYOUTS = ALL_LAYOUTS[1:]


def variants_of(layout: tuple[int, ...]) -> list[str]:
    """The variants that this layout can hold: experts need one tensor rank, and dense models no expert ranks."""
    tp, _, _, ep = layout
    return [name for name in VARIANTS if (tp == 1 if name in EXPERTS else ep == 1)]


def run_ranks(work: Path, layout: tuple[int, ...]) -> dict:
    """Measure a layout with real ranks; returns what rank 0 saved."""
    start_ranks("tests.dist.worker", work, layout, *variants_of(layout))
    return torch.load(work / "tp{}pp{}dp{}ep{}.pt".format(*layout), weights_only=True)


def start_ranks(module: str, work: Path, layout: tuple[int, ...], *arguments: str) -> None:
    """Run `python -m MODULE WORK LAYOUT [ARGUMENTS]` as the layout's ranks; fails with the log of a rank that fails.

    layout: TP, PP and DP, whose product is the number of ranks, and what else the module reads.
    """
    world_size = layout[0] * layout[1] * layout[2]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-m", module, str(work), *map(str, layout), *arguments]
    logs = [open(work / f"rank{rank}.log", "w+") for rank in range(world_size)]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env=environment | {"RANK": str(rank)}, stdout=logs[rank], stderr=logs[rank])
        for rank in range(world_size)
    ]
    try:
        for rank, process in enumerate(ranks):
            if process.wait(timeout=300):
                logs[rank].seek(0)
                pytest.fail(f"rank {rank} of {layout} failed:\n{logs[rank].read()[-3000:]}")
    finally:
        for process, log in zip(ranks, logs, strict=True):
            process.kill()
            process.wait()
            log.close()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    for name in VARIANTS:
        make_model(name, folder / "models")
    return folder


@pytest.fixture(scope="module")
def measured(work: Path):
    cache: dict[tuple[int, ...], dict] = {}

    def get(layout: tuple[int, ...]) -> dict:
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
        model = transformers.AutoModelForCausalLM.from_pretrained(work / "models" / name, dtype=torch.float32)
        losses = []
        for prompt, response, anchor, target in zip(prompts, responses, anchors(responses), advantage, strict=True):
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
            log_prob = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
            losses.append((BETA2 * (log_prob - sum(anchor)) - target).square())
        loss = torch.stack(losses).mean()
        loss.backward()
        expected = as_saved({key: parameter.grad for key, parameter in model.named_parameters()})
        case = measured(ONE_RANK)[name]["cases"]["packed"]
        difference, tensor = worst_gradient(case["gradients"], expected)
        assert difference <= 1e-5, f"{name}: gradient of {tensor} differs by {difference}"
        assert case["loss"] / len(prompts) == pytest.approx(float(loss), rel=1e-5), name
        norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
        assert case["norm"] == pytest.approx(float(norm), rel=1e-5), name


def check_case(found: dict, reference: dict, label: str) -> None:
    assert found["loss"] == pytest.approx(reference["loss"], rel=1e-5), label
    assert found["norm"] == pytest.approx(reference["norm"], rel=1e-5), label
    if found["gradients"] is not None:
        difference, tensor = worst_gradient(found["gradients"], reference["gradients"])
        assert difference <= 1e-5, f"{label}: gradient of {tensor} differs by {difference}"
    difference, tensor = worst_gradient(found["change"], reference["change"])
    assert difference <= 1e-3, f"{label}: update of {tensor} differs by {difference}"


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
