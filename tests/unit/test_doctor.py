"""The doctor: which layers a machine trains on and what it lacks, and a recipe held against it."""

from __future__ import annotations

import json

import pytest

from megatron_apo import doctor
from megatron_apo.config import load_recipe
from megatron_apo.preflight import training_problems
from megatron_apo.runtime.machine import Machine

HOPPER = (9, 0)


@pytest.fixture
def installed(monkeypatch):
    """Say whether Transformer Engine and Apex are there."""

    def say(te: bool, apex: bool) -> None:
        monkeypatch.setattr("megatron_apo.doctor.has_transformer_engine", lambda: te)
        monkeypatch.setattr("megatron_apo.model.precision.has_transformer_engine", lambda: te)
        monkeypatch.setattr("megatron_apo.doctor.has_fused_gradients", lambda: apex)

    return say


def features(capability) -> dict[str, str]:
    return {feature: here for feature, here, _ in doctor.feature_findings(capability)}


def test_what_is_lost_without_a_part(installed, monkeypatch):
    installed(te=True, apex=True)
    whole = features(HOPPER)
    assert whole["layers"].startswith("Transformer Engine's layers in bf16") and whole["FP8"] == "tensorwise, blockwise"
    assert (whole["sequence parallelism"], whole["context parallelism"]) == ("yes", "by Transformer Engine")
    assert whole["fused gradient accumulation"] == "in bf16" and whole["optimizer offload, bf16 moments"] == "yes"

    with monkeypatch.context() as old:
        old.setattr("megatron_apo.model.precision._te_version", lambda: (2, 12))
        assert features(HOPPER) == whole | {"optimizer offload, bf16 moments": "offload alone"}

    installed(te=True, apex=False)
    assert features(HOPPER) == whole | {"fused gradient accumulation": "no"}
    assert features((8, 0))["FP8"] == "no"

    installed(te=False, apex=True)
    lost = {"layers": "Megatron-Core's local layers", "FP8": "no", "sequence parallelism": "no"}
    lost |= {"context parallelism": "by gathering keys and values", "optimizer offload, bf16 moments": "no"}
    assert features(HOPPER) == whole | lost

    installed(te=True, apex=True)  # neither works without a GPU
    assert features(None) == whole | lost | {"device": "CPU, gloo", "fused gradient accumulation": "no"}


def test_what_is_installed_and_does_not_load(installed, monkeypatch):
    installed(te=False, apex=False)
    monkeypatch.setattr("megatron_apo.doctor.load_error", lambda package: None)
    names = ("transformer-engine", "apex (NVIDIA's)")
    assert [row[1] for row in doctor.package_findings() if row[0] in names] == ["missing", "missing"]
    monkeypatch.setattr("megatron_apo.doctor.load_error", lambda package: f"ImportError: {package}")
    rows = [row for row in doctor.package_findings() if row[0] in names]
    assert [row[:2] for row in rows] == [(name, "does not load") for name in names]
    assert rows[1][2] == "ImportError: fused_weight_gradient_mlp_cuda"


def test_a_recipe_that_needs_what_is_not_here(installed, tmp_path):
    config = {"model_type": "qwen3", "num_attention_heads": 4, "num_hidden_layers": 4, "hidden_size": 128}
    config |= {"intermediate_size": 264, "vocab_size": 32, "num_key_value_heads": 2, "head_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "t.jsonl").write_text("")
    overrides = [f"model.path={tmp_path}", f"data.train={tmp_path}/t.jsonl", "data.eval=null", "vstar.dir=v"]
    recipe = load_recipe("quickstart", [*overrides, "model.dtype=bf16", "model.fp8.recipe=mxfp8"])
    shape = "model.fp8: intermediate_size is 264 on a rank of parallel.tp=1, which 32 does not divide"
    installed(te=False, apex=False)
    found = training_problems(recipe, recipe.model.folders, Machine((HOPPER,) * 2, (80 * 2**30,) * 2))
    assert found[0].startswith("model.fp8: FP8 needs Transformer Engine on a GPU, and it is not installed here")
    assert found[1].startswith(shape) and found[1].endswith(" (model.path)")
    installed(te=True, apex=False)
    found = training_problems(recipe, recipe.model.folders, Machine((HOPPER,) * 2, (80 * 2**30,) * 2))
    assert found[0].startswith("model.fp8.recipe: mxfp8 needs Blackwell") and found[1].startswith(shape)
    assert training_problems(recipe, recipe.model.folders, Machine(((10, 0),) * 2, (80 * 2**30,) * 2))[0].startswith(
        shape
    )
