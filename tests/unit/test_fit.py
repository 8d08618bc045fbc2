"""A recipe against a machine: every misfit at once, each with its key; the GPUs are those that CUDA would show."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pynvml
import pytest

from megatron_apo import fit
from megatron_apo.config import build_recipe
from megatron_apo.model import gpus
from megatron_apo.rollout.server import device_name

HOPPER = (9, 0)
GIB = 2**30
CONFIG = {"model_type": "qwen3", "num_attention_heads": 4, "num_hidden_layers": 4, "hidden_size": 128}
CONFIG |= {"intermediate_size": 256, "vocab_size": 32, "num_key_value_heads": 2, "head_dim": 32}


@pytest.fixture
def misfits(tmp_path, monkeypatch):
    """misfits(gpus, overrides of the recipe, changes of config.json) -> lines"""
    monkeypatch.setattr("megatron_apo.model.precision.has_transformer_engine", lambda: False)
    monkeypatch.delenv("RANK", raising=False)

    def check(machine, *overrides, **changes):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 4096} | changes))
        recipe = build_recipe({}, [f"model.path={tmp_path}", "data.train=d.jsonl", "vstar.dir=v", *overrides])
        return fit.misfits(recipe, {"model.path": tmp_path, "model.reference": tmp_path}, machine)

    return check


def test_a_recipe_that_fits(misfits):
    assert misfits([]) == misfits([HOPPER]) == misfits([HOPPER] * 2, "parallel.tp=2") == []
    assert misfits([], "parallel.tp=2", "parallel.dp=4") == []  # as many ranks on a CPU as one likes


def test_every_misfit_is_named_at_once_and_once(misfits):
    found = misfits(
        [HOPPER],
        "model.dtype=bf16",
        "model.layers=te",
        "optimizer.moments=bf16",
        "parallel.pp=3",
        "sampling.max_response_tokens=16384",
        "train.tokens_per_micro_batch=20000",
        "rollout.max_num_batched_tokens=20000",
        attention_bias=True,
    )
    starts = [
        "model.layers: te",
        "optimizer.moments: bf16",
        "parallel.dp: tp=1 x pp=3",
        "attention_bias",
        "data.max_prompt_tokens + sampling.max_response_tokens: 17408",
        "parallel.pp",
    ]
    assert [line[: len(start)] for line, start in zip(found, starts, strict=True)] == starts
    assert all(line.endswith(" (model.path)") for line in found[3:])


def test_a_rank_does_not_count_the_gpus(misfits, monkeypatch):
    (line,) = misfits([HOPPER], "parallel.tp=2")
    assert "2 ranks, and here are 1 GPUs" in line
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    assert misfits([HOPPER], "parallel.tp=2") == []


def test_stage_1_asks_for_what_its_engine_needs_alone(misfits, tmp_path):
    misfits([])
    overrides = ["parallel.tp=3", "model.dtype=bf16", "model.layers=te", "rollout.tp=3"]
    recipe = build_recipe({}, [f"model.path={tmp_path}", "data.train=d.jsonl", "vstar.dir=v", *overrides])
    assert fit.engine_misfits(recipe, {"model.reference": tmp_path}, [HOPPER]) == [
        "rollout.tp: 3 workers, and here are 1 GPUs; use at most as many, or name more in CUDA_VISIBLE_DEVICES",
        "rollout.tp: 3 does not divide the model's 4 heads; use a divisor (model.reference)",
    ]


def test_an_engine_that_does_not_fit(misfits):
    (line,) = misfits([HOPPER] * 2, "rollout.tp=4")
    assert line.startswith("rollout.tp: 4 workers, and here are 2 GPUs;")
    (line,) = misfits([], "rollout.tp=3")
    assert line == "rollout.tp: 3 does not divide the model's 4 heads; use a divisor (model.path)"


def test_a_folder_that_is_no_model(misfits):
    (line,) = misfits([], model_type="bert")
    assert "model_type 'bert' is not supported" in line and line.endswith(" (model.path)")


CAPABILITIES = {"GPU-aa11": (8, 0), "GPU-ab22": (9, 0), "GPU-cc33": (10, 0)}


@pytest.fixture
def nvml(monkeypatch):
    """A machine of three GPUs, of which the second has a MIG slice."""
    uuids = list(CAPABILITIES)

    def by_uuid(name):
        if name != "MIG-1":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return name

    fake = SimpleNamespace(
        NVMLError=pynvml.NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(uuids),
        nvmlDeviceGetHandleByIndex=lambda index: uuids[index],
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetDeviceHandleFromMigDeviceHandle=lambda slice_: "GPU-ab22",
        nvmlDeviceGetUUID=lambda handle: handle,
        nvmlDeviceGetCudaComputeCapability=lambda handle: list(CAPABILITIES[handle]),
        nvmlDeviceGetName=lambda handle: f"name of {handle}",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=GIB * (80 + uuids.index(handle))),
    )
    monkeypatch.setattr(gpus, "pynvml", fake)
    monkeypatch.setattr(gpus, "_torch_has_cuda", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, [(8, 0), (9, 0), (10, 0)]),
        ("", []),
        ("2,0", [(10, 0), (8, 0)]),
        ("1, -1, 2", [(9, 0)]),
        ("0,7,1", [(8, 0)]),
        ("GPU-cc", [(10, 0)]),
        ("GPU-zz,0", []),
        ("MIG-1", [(9, 0)]),
        ("MIG-2", []),
        ("NoDevFiles", []),
    ],
)
def test_what_cuda_would_show(nvml, monkeypatch, visible, found):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus.visible_gpus() == found


def test_what_is_said_of_a_gpu_is_of_the_visible_one(nvml, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert device_name() == "name of GPU-cc33" and gpus.gpu_names()[1] == "name of GPU-aa11"
    assert gpus.gpu_memory_bytes() == [82 * GIB, 80 * GIB]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_name() == "CPU" and gpus.gpu_memory_bytes() == []


def test_no_gpu_without_a_driver_or_without_cuda_in_torch(nvml, monkeypatch):
    monkeypatch.setattr(gpus, "_torch_has_cuda", lambda: False)
    assert gpus.visible_gpus() == [] and len(gpus.drivers_gpus()) == 3
    monkeypatch.setattr(gpus, "_torch_has_cuda", lambda: True)

    def absent():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    nvml.nvmlInit = absent
    assert gpus.visible_gpus() == []


def test_torch_says_whether_it_was_built_with_cuda():
    import torch

    assert gpus._torch_has_cuda() == (torch.version.cuda is not None)
