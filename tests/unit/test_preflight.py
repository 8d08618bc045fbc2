"""A recipe against a machine: every problem at once, each with its key; the GPUs are those that CUDA would show."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pynvml
import pytest

from megatron_apo import preflight
from megatron_apo.config import build_recipe
from megatron_apo.rollout.server import device_name
from megatron_apo.runtime import gpus
from megatron_apo.runtime.machine import Machine

HOPPER = (9, 0)
GIB = 2**30
CONFIG = {"model_type": "qwen3", "num_attention_heads": 4, "num_hidden_layers": 4, "hidden_size": 128}
CONFIG |= {"intermediate_size": 256, "vocab_size": 32, "num_key_value_heads": 2, "head_dim": 32}


def machine(gpus, **known):
    """A machine with these GPUs, of 80 GiB each."""
    return Machine(tuple(gpus), **{"gpu_memory_bytes": (80 * GIB,) * len(gpus), **known})


@pytest.fixture
def problems(tmp_path, monkeypatch):
    """problems(machine or its gpus, overrides of the recipe, changes of config.json) -> lines"""
    monkeypatch.setattr("megatron_apo.model.precision.has_transformer_engine", lambda: False)

    def check(where, *overrides, **changes):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 4096} | changes))
        recipe = build_recipe({}, [f"model.path={tmp_path}", "data.train=d.jsonl", "vstar.dir=v", *overrides])
        here = where if isinstance(where, Machine) else machine(where)
        return preflight.training_problems(recipe, {"model.path": tmp_path, "model.reference": tmp_path}, here)

    return check


def test_a_recipe_that_fits(problems):
    assert problems([]) == problems([HOPPER]) == problems([HOPPER] * 2, "parallel.tp=2") == []
    assert problems([], "parallel.tp=2", "parallel.dp=4") == []  # as many ranks on a CPU as one likes


def test_every_problem_is_named_at_once_and_once(problems):
    found = problems(
        [HOPPER],
        "model.dtype=bf16",
        "model.layers=te",
        "optimizer.moments=bf16",
        "parallel.pp=3",
        "train.recompute=selective",
        "train.recompute_modules=[moe]",
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
        "train.recompute_modules: moe",
    ]
    assert [line[: len(start)] for line, start in zip(found, starts, strict=True)] == starts
    assert all(line.endswith(" (model.path)") for line in found[3:])


def test_engines_elsewhere_ask_for_a_secret_an_address_and_no_gpu_here(problems, monkeypatch):
    monkeypatch.delenv("MEGATRON_APO_SECRET", raising=False)
    monkeypatch.setattr(
        preflight, "route", {"node0": "127.0.1.1", "10.0.0.1": "10.0.0.1", "localhost": "127.0.0.1"}.get
    )
    dedicated = ["rollout.placement=dedicated", "rollout.replicas=8", "rollout.tp=4"]
    without = problems([HOPPER], *dedicated, "rollout.driver=10.0.0.1:29600")
    assert len(without) == 1 and without[0].startswith("MEGATRON_APO_SECRET: not set; ")
    monkeypatch.setenv("MEGATRON_APO_SECRET", "long and random")
    assert problems([HOPPER], *dedicated, "rollout.driver=10.0.0.1:29600") == []
    assert problems([HOPPER], *dedicated, "rollout.driver=localhost:29600") == []
    monkeypatch.setenv("MEGATRON_APO_SECRET", "long and\nrandom\n")
    (line,) = problems([HOPPER], *dedicated, "rollout.driver=10.0.0.1:29600")
    assert (
        line.startswith("MEGATRON_APO_SECRET: has other than ASCII's printable characters; ") and "random\n" not in line
    )
    assert problems([HOPPER]) == [line]
    monkeypatch.setenv("MEGATRON_APO_SECRET", "long and random\n")  # as it comes of a file
    for host, said in (("node0", "node0 is 127.0.1.1 on this machine"), ("nowhere", "nowhere is not known here")):
        (line,) = problems([HOPPER], *dedicated, f"rollout.driver={host}:29600")
        assert line.startswith(f"rollout.driver: {said}")


def test_weights_that_share_memory_or_a_gpu(problems, monkeypatch):
    """`auto` is shared memory on one machine."""
    small = replace(machine([]), shared_bytes=1000)
    for transport in ("auto", "shm"):
        (line,) = problems(small, f"sync.transport={transport}")
        assert line.startswith("sync.dir: 3 buckets of weights take ")
    assert problems(small, "sync.transport=collective") == []
    (line,) = problems([HOPPER], "sync.transport=collective")
    assert line.startswith("sync.transport: collective, but colocated engines share GPUs")
    assert problems([HOPPER], "sync.transport=ipc") == []
    two = machine([HOPPER], ranks_here=1, num_nodes=2)
    assert problems(two, "parallel.dp=2", "rollout.replicas=2") == []
    (line,) = problems(two, "parallel.dp=2", "rollout.replicas=2", "sync.transport=shm")
    assert line.startswith("sync.transport: shm, but engines are on other machines")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    (line,) = problems([HOPPER], "sync.transport=ipc")
    assert line.startswith("PYTORCH_CUDA_ALLOC_CONF: expandable_segments:True, ") and problems([HOPPER]) == []
    assert problems(two, "parallel.dp=2", "rollout.replicas=2") == [line], "auto is ipc there"


def test_a_rank_does_not_count_the_gpus(problems):
    (line,) = problems([HOPPER], "parallel.tp=2")
    assert "2 ranks, and here are 1 GPUs" in line
    assert problems(machine([HOPPER], ranks_here=1), "parallel.tp=2") == []


def test_stage_1_asks_for_what_its_engine_needs_alone(problems, tmp_path):
    problems([])
    overrides = ["parallel.tp=3", "model.dtype=bf16", "model.layers=te", "rollout.tp=3"]
    recipe = build_recipe({}, [f"model.path={tmp_path}", "data.train=d.jsonl", "vstar.dir=v", *overrides])
    assert preflight.sampling_problems(recipe, {"model.reference": tmp_path}, machine([HOPPER])) == [
        "rollout.tp: 3 workers, and here are 1 GPUs; use at most as many, or name more in CUDA_VISIBLE_DEVICES",
        "rollout.tp: 3 does not divide the model's 4 heads; use a divisor (model.reference)",
    ]


def test_an_engine_that_does_not_fit(problems):
    (line,) = problems([HOPPER] * 2, "rollout.tp=4")
    assert line.startswith("rollout.tp: 4 workers, and here are 2 GPUs;")
    (line,) = problems([], "rollout.tp=3")
    assert line == "rollout.tp: 3 does not divide the model's 4 heads; use a divisor (model.path)"


def test_each_replica_has_gpus_of_its_own(problems):
    assert problems([HOPPER] * 4, "rollout.tp=2", "rollout.replicas=2") == problems([], "rollout.replicas=9") == []
    nodes = machine([HOPPER] * 8, ranks_here=8, num_nodes=2)
    layout = ["parallel.tp=2", "parallel.dp=8", "rollout.tp=4"]
    assert problems(nodes, *layout, "rollout.replicas=4") == []
    (line,) = problems(nodes, *layout, "rollout.replicas=5")
    assert line.startswith(
        "rollout.replicas: 5 engines of rollout.tp=4 need 12 GPUs of a node, and each of 2 nodes has 8"
    )
    (line,) = problems([HOPPER] * 5, "rollout.tp=2", "rollout.replicas=3")
    assert line == (
        "rollout.replicas: 3 engines of rollout.tp=2 need 6 GPUs, and here are 5; use at most 2, or name more in "
        "CUDA_VISIBLE_DEVICES"
    )


@pytest.mark.parametrize(("tp", "fits"), [(1, True), (2, True), (4, False), (12, True), (3, True)])
def test_workers_share_kv_heads_evenly(problems, tp, fits):
    """12 heads in 6 groups: 4 workers would have one and a half each. 12 have half of one, which both hold."""
    found = problems([], f"rollout.tp={tp}", num_attention_heads=12, num_key_value_heads=6, hidden_size=384)
    line = "rollout.tp: 4 and the model's 6 KV heads do not divide; use one of [1, 2, 3, 6, 12] (model.path)"
    assert found == ([] if fits else [line])


QWEN_7B = {"model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944}
QWEN_7B |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "head_dim": 128}
WEIGHTS, STATE = 15.23, 12 / 2 * 15.23  # GB of bf16 weights; of fp32 main weights and moments


@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        (["rollout.dtype=bfloat16", "rollout.kv_cache_gib=65"], None),
        (["rollout.dtype=bfloat16", "rollout.kv_cache_gib=66"], 65.81),
        (["rollout.dtype=bfloat16", "rollout.tp=2", "rollout.kv_cache_gib=72"], None),
        (["rollout.dtype=bfloat16", "rollout.tp=2", "rollout.kv_cache_gib=73"], 72.9),
        (["rollout.dtype=bfloat16", "rollout.quantization=fp8", "rollout.kv_cache_gib=72"], None),
        (["rollout.kv_cache_gib=52"], 51.63),
    ],
)
def test_an_engine_that_a_gpu_cannot_hold(problems, monkeypatch, overrides, most):
    monkeypatch.setattr(preflight, "engine_problems", lambda *_: [])
    here = machine([HOPPER] * 3, gpu_memory_bytes=(80 * GIB, 90 * GIB, 1))
    found = problems(here, *overrides, **QWEN_7B)
    assert len(found) == (most is not None)
    assert all(line.startswith("rollout.kv_cache_gib: ") and f"use less than {most}, or" in line for line in found)
    assert problems([], *overrides[-1:], **QWEN_7B) == []  # the host's memory is another matter


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        (["train.offload_while_sampling=true"], STATE),
        (["train.offload_while_sampling=true", "parallel.dp=2"], STATE),  # sharded
        (["train.offload_while_sampling=true", "parallel.dp=2", "optimizer.distributed=false"], 2 * STATE),
        (["train.offload_while_sampling=true", "model.dtype=fp32"], 8 / 2 * WEIGHTS),
        (["train.offload_while_sampling=true", "objective.name=ppo"], 2 * STATE),
        (
            [
                "train.offload_while_sampling=true",
                "parallel.dp=2",
                "objective.name=ppo",
                "objective.critic.optimizer.distributed=false",  # whole on either replica
            ],
            (1 + 2) * STATE,
        ),
        (["train.offload_while_sampling=true", "model.reference_mode=swap", "objective.name=rloo"], STATE),
        (["model.reference_mode=offload", "parallel.dp=2", "parallel.tp=2"], 2 * WEIGHTS),
        (["model.reference_mode=swap"], 2 * WEIGHTS),
        (["model.reference_mode=offload", "train.offload_while_sampling=true"], STATE + WEIGHTS),
        (["rollout.sleep_while_training=true", "rollout.dtype=bfloat16"], WEIGHTS),
        (["rollout.sleep_while_training=true", "rollout.dtype=bfloat16", "rollout.replicas=2"], 2 * WEIGHTS),
    ],
)
def test_what_waits_in_host_memory_fits_it(problems, monkeypatch, overrides, needed):
    monkeypatch.setattr(preflight, "sampling_problems", lambda *_: [])

    def with_room(share):
        return machine([HOPPER] * 4, available_bytes=int(needed * share * 1e9))

    assert problems(with_room(1.001), "model.dtype=bf16", *overrides, **QWEN_7B) == []
    (line,) = problems(with_room(0.999), "model.dtype=bf16", *overrides, **QWEN_7B)
    assert overrides[0].replace("=", ": ") in line and "would wait in this machine's memory" in line
    assert problems([], "model.dtype=bf16", *overrides, **QWEN_7B) == []


def test_a_critics_optimizer_is_asked_of_the_machine_too(problems, monkeypatch):
    monkeypatch.setattr(preflight, "sampling_problems", lambda *_: [])
    asked = ["model.dtype=bf16", "objective.name=ppo", "objective.critic.optimizer.moments=bf16"]
    (line,) = problems(machine([HOPPER]), *asked, **QWEN_7B)
    assert line.startswith("objective.critic.optimizer.moments: bf16 needs Transformer Engine")


def test_a_machine_holds_what_its_own_ranks_offload(problems, monkeypatch):
    monkeypatch.setattr(preflight, "sampling_problems", lambda *_: [])
    here = machine([HOPPER] * 2, available_bytes=int(1.5 * WEIGHTS * 1e9), ranks_here=1)
    asked = ["model.dtype=bf16", "model.reference_mode=offload", "parallel.dp=2"]
    assert problems(here, *asked, **QWEN_7B) == []
    (line,) = problems(replace(here, ranks_here=2), *asked, **QWEN_7B)
    assert line.startswith(
        "model.reference_mode: offload (30.46 GB) would wait in this machine's memory, of which 22.8"
    )


def test_a_folder_that_is_no_model(problems):
    (line,) = problems([], model_type="bert")
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


@pytest.mark.parametrize("key", ["train.streamed", "eval.overlapped"])
def test_engines_that_work_beside_the_ranks_have_gpus_of_their_own(problems, key: str):
    beside, dedicated = f"{key}=true", ["rollout.placement=dedicated", "rollout.driver=127.0.0.1:29600"]
    (line,) = problems([HOPPER], beside)
    assert line.startswith(f"{key}: true, but colocated engines have the ranks' GPUs")
    assert problems([], beside) == problems([HOPPER], beside, "train.replay=somewhere") == []
    assert not [line for line in problems([HOPPER], beside, *dedicated) if key in line]
