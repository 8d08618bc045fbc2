"""Hugging Face weights read into a Megatron model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_apo.config import ParallelConfig
from megatron_apo.model.build import build_model
from megatron_apo.model.hf_config import ModelConfigError, read_hf_config
from megatron_apo.parallel.groups import alone
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.parameters import load_weights
from megatron_apo.weights.stream import WeightStream
from tests.models import as_saved, make_model


def test_fused_experts_are_loaded_as_each_experts_own(tmp_path: Path) -> None:
    """What the Megatron model holds is what transformers reads of either folder."""
    import transformers

    apart, fused = make_model("qwen3_moe", tmp_path), tmp_path / "fused"
    transformers.AutoModelForCausalLM.from_pretrained(apart).save_pretrained(fused, save_original_format=False)
    expected = as_saved(transformers.AutoModelForCausalLM.from_pretrained(fused).state_dict())
    spec = read_hf_config(fused)
    with alone() as topology:
        for folder in (apart, fused):
            chunks = build_model(spec, ParallelConfig(), topology)
            load_weights(chunks, spec, topology, HFReader(folder))
            found = dict(WeightStream(chunks, spec, topology))
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.2.self_attn.k_proj.weight", "lm_head.weight"])
def test_weights_that_are_not_finite_are_not_loaded(name: str, value: float, tmp_path: Path) -> None:
    folder = make_model("qwen3", tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights[name][3, 5] = value
    save_file(weights, folder / "model.safetensors")
    spec = read_hf_config(folder)
    with alone() as topology:
        chunks = build_model(spec, ParallelConfig(), topology)
        with pytest.raises(ModelConfigError) as error:
            load_weights(chunks, spec, topology, HFReader(folder))
    assert str(error.value).startswith(f"{folder}: a tensor holds NaN or infinity ({name}); give ")
