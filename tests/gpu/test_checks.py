"""The GPU checks run (small, on whatever is here), say so where they cannot, and notice what is wrong.

bash tests/run.sh tests/gpu
"""

from __future__ import annotations

import subprocess
import sys
from itertools import chain, repeat
from pathlib import Path

import pytest
import torch

from tests.gpu import common, parity, report

ROOT = Path(__file__).parents[2]
TINY = {
    "parity": [],
    "step-1.5B": ["--shape", "1.5B"],
    "step-7B": ["--shape", "7B"],
    "placement": [],
    "logprob_head": [],
}


def run(check: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", f"tests.gpu.{check.partition('-')[0]}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("check", TINY)
def test_check_runs(check):
    done = run(check, *TINY[check], "--tiny")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
@pytest.mark.parametrize("check", [*TINY, "fp8_speed", "engine"])
def test_without_a_gpu_one_line_says_so(check):
    done = run(check, *TINY.get(check, []))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (77, "", 1)
    assert done.stderr.startswith("tests/gpu: needs a GPU: ")


def test_an_option_that_a_check_does_not_know_is_not_taken_for_a_missing_gpu():
    assert run("parity", "--nonsense").returncode == 2


@pytest.mark.parametrize("kind", parity.BITS)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_limits_notice_a_gradient_of_twice_the_size(kind, family):
    """And other weights: of two independent gradients the difference has sqrt(2) of either's norm."""
    spec = common.spec_of(parity.COMMON | {"model_type": family} | parity.FAMILIES[family])
    assert parity.limits(kind, spec, num_tokens=1000)["gradient"] < 1


@pytest.mark.parametrize("kind", parity.BITS)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_limits_notice_a_gradient_of_half_the_size(kind, family):
    spec = common.spec_of(parity.COMMON | {"model_type": family} | parity.FAMILIES[family])
    gradients = {"a": torch.randn(1000), "b": torch.randn(1000)}
    truth = common.Measured(torch.zeros(1), gradients, 0.0, 0.0, [])
    half = common.Measured(torch.zeros(1), {name: tensor / 2 for name, tensor in gradients.items()}, 0.0, 0.0, [])
    assert common.errors(truth, truth).scale < 1e-6
    assert parity.limits(kind, spec, num_tokens=1000)["scale"] < common.errors(half, truth).scale


def test_gradients_are_compared_before_they_are_clipped():
    spec = common.spec_of(parity.COMMON | {"model_type": "qwen3"} | parity.FAMILIES["qwen3"])
    with common.job() as topology, pytest.raises(AssertionError):
        common.measure(common.recipe_of(), spec, topology, common.random_batch(spec, [(1, 1)]))


def test_other_weights_are_noticed(monkeypatch):
    """The bf16 model gets other weights than the fp32 one: every figure of its rows is beyond the limit."""
    usual, verdict = common.RandomWeights, report.Verdict()
    seeds = chain([0, 0], repeat(1))  # two models in fp32, then the others
    monkeypatch.setattr(common, "RandomWeights", lambda spec, device: usual(spec, device, next(seeds)))
    spec = common.spec_of(parity.COMMON | {"model_type": "qwen3"} | parity.FAMILIES["qwen3"])
    with common.job() as topology:
        parity.compare("qwen3", spec, [(3, 20), (20, 3)], topology, verdict)
    with pytest.raises(SystemExit, match=r"qwen3 bf16 local packed: mean .*\n.*bias .*\n.*gradient .*\n"):
        verdict.finish()
