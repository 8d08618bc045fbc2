"""Hugging Face -> Megatron -> Hugging Face is bitwise the same, from any layout; mistakes are said before any work."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_apo.checkpoint import read_record
from megatron_apo.stages.convert import hf_to_megatron, megatron_to_hf
from megatron_apo.weights.hf_io import model_hash
from tests.dist.checkpoint_worker import recipe_of
from tests.dist.test_layouts import ROOT, start_ranks
from tests.models import VARIANTS, make_model

NAMES = ["qwen3-tied", "llama"]  # tied and untied
ALL_NAMES = NAMES + [pytest.param(name, marks=pytest.mark.full) for name in VARIANTS if name not in NAMES]
LAYOUTS = [(2, 1, 1), (1, 2, 1)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and two of them converted."""
    folder = tmp_path_factory.mktemp("convert")
    for name in VARIANTS:
        source = make_model(name, folder / "models")
        (source / "tokenizer.json").write_text('{"a tokenizer": 1}')
        if name in NAMES:
            hf_to_megatron(source, folder / "megatron" / name)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", ALL_NAMES)
def test_there_and_back_is_bitwise(name, work, tmp_path):
    source = work / "models" / name
    megatron = work / "megatron" / name
    if not megatron.exists():
        megatron = tmp_path / "megatron"
        hf_to_megatron(source, megatron)
    megatron_to_hf(megatron, tmp_path / "hf")
    assert_same(weights(tmp_path / "hf"), weights(source))
    assert read_record(megatron).model_hash == model_hash(source) == model_hash(tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == '{"a tokenizer": 1}'
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_loads_it(layout, work):
    start_ranks("tests.dist.convert_worker", work, layout)
    found = torch.load(work / "loaded-tp{}pp{}.pt".format(*layout), weights_only=True)
    assert sorted(found) == sorted(NAMES)
    for name in NAMES:
        assert_same(found[name], weights(work / "models" / name))


def test_a_training_checkpoint_becomes_a_model(work, tmp_path):
    (tmp_path / "vstar").mkdir()
    (tmp_path / "vstar" / "manifest.json").write_text("{}")
    shutil.copytree(work / "models" / "qwen3-tied", tmp_path / "models" / "qwen3-tied")
    start_ranks("tests.dist.checkpoint_worker", tmp_path, (2, 1, 1), "run:2:2:trained")
    trained = torch.load(tmp_path / "trained.pt", weights_only=True)["weights"]
    checkpoint = recipe_of(tmp_path, "run", 2).run.dir / "checkpoints" / "step-000002"
    megatron_to_hf(checkpoint, tmp_path / "hf")
    assert_same(weights(tmp_path / "hf"), trained)
    assert not torch.equal(trained["model.norm.weight"], weights(work / "models" / "qwen3-tied")["model.norm.weight"])


def test_dtypes(work, tmp_path):
    source = work / "models" / "llama"
    original = weights(source)
    hf_to_megatron(source, tmp_path / "bf16", "bf16")
    record = read_record(tmp_path / "bf16")
    assert (record.dtype, record.model_hash) == ("bf16", None)
    megatron_to_hf(tmp_path / "bf16", tmp_path / "hf")
    rounded = {name: tensor.bfloat16() for name, tensor in original.items()}
    assert_same(weights(tmp_path / "hf"), rounded)
    megatron_to_hf(tmp_path / "bf16", tmp_path / "wide", "fp32")
    assert_same(weights(tmp_path / "wide"), {name: tensor.float() for name, tensor in rounded.items()})
    hf_to_megatron(tmp_path / "hf", tmp_path / "kept")  # bf16 as it is
    assert read_record(tmp_path / "kept").model_hash == model_hash(tmp_path / "hf")


def test_a_dtype_that_must_be_chosen(work, tmp_path):
    source = tmp_path / "half"
    shutil.copytree(work / "models" / "llama", source)
    save_file({name: tensor.half() for name, tensor in weights(source).items()}, source / "model.safetensors")
    with pytest.raises(ValueError, match="tensors are F16; choose what to write with --dtype"):
        hf_to_megatron(source, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("command", "source", "says"),
    [
        ("hf-to-megatron", "nowhere", "model path nowhere: no config.json there"),
        ("hf-to-megatron", "mamba", "model_type 'mamba' is not supported; supported: llama"),
        ("megatron-to-hf", "mamba", "mamba: no checkpoint.json there"),
        ("hf-to-megatron --dtype fp8", "mamba", "fp8"),
    ],
)
def test_mistakes_are_one_line_before_any_work(command, source, says, tmp_path):
    (tmp_path / "mamba").mkdir()
    (tmp_path / "mamba" / "config.json").write_text('{"model_type": "mamba"}')
    convert = [sys.executable, "-m", "megatron_apo.cli", "convert", *command.split(), source, "out"]
    result = subprocess.run(convert, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode in (1, 2) and says in result.stderr and "Traceback" not in result.stderr
    if "--dtype" not in command:  # that is typer's own, in a box
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("convert", [hf_to_megatron, megatron_to_hf])
def test_an_output_folder_in_use_is_left_alone(convert, work, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    source = work / ("models" if convert is hf_to_megatron else "megatron") / "llama"
    with pytest.raises(ValueError, match=f"output folder: {tmp_path} is not empty"):
        convert(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_a_damaged_checkpoint_is_one_line(work, tmp_path):
    shutil.copytree(work / "megatron" / "llama", tmp_path / "damaged")
    data = next((tmp_path / "damaged").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match="damaged: the checkpoint could not be read: rank 0: ") as caught:
        megatron_to_hf(tmp_path / "damaged", tmp_path / "hf")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "hf").exists()


def test_the_scripts_are_the_commands(work, tmp_path):
    scripts = ROOT / "checkpoints_convert"
    source = work / "models" / "llama"
    for script, *paths in (("hf_to_megatron", source, "m"), ("megatron_to_hf", "m", "hf")):
        command = [sys.executable, str(scripts / f"{script}.py"), *map(str, paths)]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert (result.returncode, result.stderr) == (0, "")
    assert_same(weights(tmp_path / "hf"), weights(source))
