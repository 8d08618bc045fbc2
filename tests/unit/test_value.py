"""A critic on one rank: what it holds, what it is loaded from, and where its values are."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_apo.config import ParallelConfig
from megatron_apo.data.batch import IGNORE, make_micro_batch
from megatron_apo.data.sequences import Sequences
from megatron_apo.model.hf_config import ModelConfigError, read_hf_config
from megatron_apo.model.precision import Precision
from megatron_apo.model.value import build_critic
from megatron_apo.parallel.groups import alone
from megatron_apo.weights.families import hf_tensors, model_entries
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.parameters import load_weights
from tests.models import make_model


def make_critic(variant: str, folder: Path) -> Path:
    """A language model's layers under a row that is drawn, as transformers saves them."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(make_model(variant, folder), num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder / "critic")
    return folder / "critic"


@pytest.mark.parametrize("variant", ["qwen3", "qwen3-tied", "llama-biases", "qwen3_moe"])
def test_a_critic_has_the_rows_of_transformers_classifier(variant: str, tmp_path: Path) -> None:
    folder = make_critic(variant, tmp_path)
    spec = read_hf_config(folder).as_critic()
    with alone() as topology, torch.device("meta"):
        (model,) = build_critic(spec, ParallelConfig(), topology, Precision("bf16"))
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert {entry.megatron for entry in model_entries(spec, pp=1)} == dict(model.named_parameters()).keys()
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert hf_tensors(spec) == saved and saved["score.weight"] == (1, spec.hidden_size)
    assert spec.num_weights == sum(prod(shape) for shape in saved.values() if len(shape) == 2)


def test_values_stand_at_the_labels_and_are_0_at_first(tmp_path: Path) -> None:
    """By a language model's weights; then by a head of its own. Padded, so that there is more than one row."""
    critic = make_critic("qwen3", tmp_path)
    spec = read_hf_config(critic).as_critic()
    sequences = Sequences.of([[1, 2, 3], [4]], [[5, 6], [7, 8, 9, 10]])
    micro = make_micro_batch([0, 1], sequences, packing=False, multiple=8)
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(critic)
    with alone() as topology:
        (model,) = build_critic(spec, ParallelConfig(), topology)
        reader = HFReader(tmp_path / "qwen3")
        reader.check(spec)
        load_weights([model], spec, topology, reader)
        value_BS = model(micro.input_BS, micro.position_BS, None, labels=micro.label_BS)
        assert value_BS.dtype == torch.float32 and not value_BS.any()
        (value_BS * torch.rand(value_BS.shape)).sum().backward()
        moved = {name for name, parameter in model.named_parameters() if parameter.grad.any()}
        assert moved == {"value_head"}
        load_weights([model], spec, topology, HFReader(critic))
        value_BS = model(micro.input_BS, micro.position_BS, None, labels=micro.label_BS)
    assert not value_BS[micro.label_BS == IGNORE].any() and value_BS[micro.label_BS != IGNORE].all()
    hidden = [whole.model(torch.tensor([tokens])).last_hidden_state[0] for tokens in ([1, 2, 3, 5], [4, 7, 8, 9])]
    expected = torch.cat([hidden[0][2:], hidden[1]]) @ whole.score.weight[0]
    torch.testing.assert_close(value_BS[micro.label_BS != IGNORE], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("score.weight", lambda row: torch.cat([row, row]), r"score.weight has shape \(2, 48\), expected \(1, 48\)"),
        ("model.norm.weight", lambda _: None, "missing tensor model.norm.weight"),
        ("classifier.weight", lambda _: torch.zeros(1, 48), "unknown tensor classifier.weight"),
    ],
)
def test_a_folder_that_is_no_critics_is_refused(name, change, said, tmp_path: Path) -> None:
    folder = make_critic("qwen3", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    changed = {name: change(tensors.get(name))}
    save_file(
        {key: value for key, value in (tensors | changed).items() if value is not None}, folder / "model.safetensors"
    )
    with pytest.raises(ModelConfigError, match=said):
        HFReader(folder).check(read_hf_config(folder).as_critic())


def test_a_critics_folder_is_no_policys(tmp_path: Path) -> None:
    folder = make_critic("qwen3", tmp_path)
    with pytest.raises(ModelConfigError, match="missing tensor lm_head.weight\n.*unknown tensor score.weight"):
        HFReader(folder).check(read_hf_config(folder))
    with alone() as topology, pytest.raises(AssertionError, match="as_critic"):
        build_critic(read_hf_config(folder), ParallelConfig(), topology)
