"""What a vLLM server is started with, and what is refused before one is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest

from megatron_apo.config import ModelConfig, RolloutConfig, SyncConfig
from megatron_apo.rollout import server as server_file
from megatron_apo.rollout.server import (
    ServerError,
    VLLMServer,
    advertised_host,
    engine_environment,
    engine_options,
    engine_problems,
    served_length,
)
from megatron_apo.rollout.vllm_plugin import TOKEN_VARIABLE
from megatron_apo.runtime.job import SECRET

QWEN_7B = {
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
}
LONG = 17_408  # tokens; with the one that scoring generates 137 blocks of 128, and one is vLLM's own: 17,664 tokens


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    return tmp_path


@pytest.fixture(params=[False, True], ids=["cpu", "gpu"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(server_file, "_has_gpu", lambda _: request.param)
    return request.param


def command(model: Path, **options: object) -> list[str]:
    rollout = RolloutConfig(kv_cache_gib=2, max_num_batched_tokens=LONG + 1, **options)
    return VLLMServer(rollout, model, log_path=model / "log", seed=0, max_model_len=LONG)._command(1)


def test_the_command_says_what_the_machine_can(model: Path, gpu: bool) -> None:
    words = command(model)
    assert words[words.index("--load-format") + 1] == "auto"
    assert ("--gpu-memory-utilization" in words) is gpu
    assert ("--enable-chunked-prefill" in words) is gpu and ("--no-enable-chunked-prefill" in words) is not gpu
    assert "--no-enable-prefix-caching" in words and "--enable-sleep-mode" not in words
    assert "--enable-prefix-caching" in command(model, prefix_caching=True)
    if gpu:
        words = command(model, sleep_while_training=True, gpu_memory_utilization=0.3)
        assert "--enable-sleep-mode" in words
        assert words[words.index("--gpu-memory-utilization") + 1] == "0.3"


def test_what_needs_a_gpu_is_refused_without_one(gpu: bool) -> None:
    wanted = RolloutConfig(kv_cache_gib=2, sleep_while_training=True, quantization="fp8", kv_cache_dtype="fp8")
    expected = [
        f"rollout.{setting} needs a GPU, and this machine has none; leave it out"
        for setting in ("quantization: fp8", "kv_cache_dtype: fp8", "sleep_while_training: true")
    ]
    assert engine_problems(wanted) == ([] if gpu else expected)
    if gpu:
        assert engine_options(wanted)["quantization"] == engine_options(wanted)["kv_cache_dtype"] == "fp8"
    else:
        with pytest.raises(ValueError, match="sleep_while_training: true needs a GPU"):
            engine_options(wanted)


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({}, "127.0.0.1"),
        ({"host": "10.0.0.7"}, "10.0.0.7"),
        ({"host": "0.0.0.0"}, "127.0.0.1"),
        ({"host": "0.0.0.0", "advertise_host": "node7"}, "node7"),
        ({"host": "::"}, "[::1]"),
        ({"host": "::", "advertise_host": "fd00::7"}, "[fd00::7]"),
    ],
)
def test_an_engine_is_reached_by_an_address_that_it_need_not_bind(settings: dict, where: str) -> None:
    assert advertised_host(RolloutConfig(**settings)) == where


def test_a_server_on_all_interfaces_is_waited_for_where_it_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a vLLM, but what is started binds and answers as told. Its processes know their token and not the job's
    secret; neither is on a command line, which others can read."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    script = "import http.server as h, sys; h.test(h.SimpleHTTPRequestHandler, bind='0.0.0.0', port=int(sys.argv[1]))"
    (tmp_path / "health").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(SECRET, "the secret of the job")
    monkeypatch.setenv("RANK", "1")
    server = VLLMServer(
        RolloutConfig(host="0.0.0.0"), tmp_path, log_path=tmp_path / "log", seed=0, max_model_len=9, shm_dir=tmp_path
    )
    monkeypatch.setattr(server, "_command", lambda port: [sys.executable, "-c", script, str(port)])
    with server:
        assert server.url.startswith("http://127.0.0.1:")
        assert server.alive() and server.pid in server.pids()
        for process in map(psutil.Process, server.pids()):
            environment = process.environ()
            assert environment[TOKEN_VARIABLE] == server.token and "RANK" not in environment
            assert "the secret of the job" not in environment.values()
            assert not any(server.token in word or "the secret of" in word for word in process.cmdline())


def test_the_token_is_not_on_the_command_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "the secret of the job")
    server = VLLMServer(RolloutConfig(kv_cache_gib=2), model, log_path=model / "log", seed=0, max_model_len=9)
    server.token = "the token of the server"
    assert not any(word for word in server._command(1) if server.token in word or "the secret of" in word)


def test_replicas_have_cores_gpus_and_ports_of_their_own(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_file.os, "sched_getaffinity", lambda _: set(range(10, 18)))
    monkeypatch.setattr(server_file, "drivers_gpus", lambda: [(9, 0)] * 4)
    inherited = {"CUDA_VISIBLE_DEVICES": "7,5, 3,GPU-1,9"}  # CUDA ignores what follows a name that it does not know

    def environments(**settings: object) -> list[dict[str, str]]:
        rollout = RolloutConfig(replicas=2, **settings)
        return [engine_environment(inherited, rollout, replica) for replica in range(2)]

    if gpu:
        assert [one["CUDA_VISIBLE_DEVICES"] for one in environments(tp=2)] == ["7,5", "3,GPU-1"]
        assert [one["CUDA_VISIBLE_DEVICES"] for one in environments()] == ["7", "5"]
        assert engine_environment(inherited, RolloutConfig())["CUDA_VISIBLE_DEVICES"] == "7,5, 3,GPU-1,9"
        assert engine_environment({}, RolloutConfig(replicas=2), 1)["CUDA_VISIBLE_DEVICES"] == "1"
        with pytest.raises(ServerError, match="no GPUs are left for engine 1 of rollout.tp=3: 4 here"):
            environments(tp=3)
    else:
        assert [one["OMP_NUM_THREADS"] for one in environments()] == ["4", "4"]
        assert [one["OMP_NUM_THREADS"] for one in environments(threads=3)] == ["3", "3"]
        assert [one["VLLM_CPU_OMP_THREADS_BIND"] for one in environments(tp=2)] == ["10,11|12,13", "14,15|16,17"]
        alone = engine_environment(inherited, RolloutConfig(replicas=2))  # stage 1's engine
        assert alone["OMP_NUM_THREADS"] == "8"


def test_ports_of_replicas_follow_each_other(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[int] = []

    def note(host: str, port: int) -> int:
        wanted.append(port)
        raise ServerError("noted")

    monkeypatch.setattr(server_file, "_port", note)
    for settings in ({"port": 7000, "replicas": 3}, {"replicas": 3}):
        for replica in range(3):
            server = VLLMServer(
                RolloutConfig(**settings), model, log_path=model / "log", seed=0, max_model_len=9, replica=replica
            )
            with pytest.raises(ServerError, match="noted"):
                server.start()
    assert wanted == [7000, 7001, 7002, 0, 0, 0]


@pytest.mark.parametrize(
    ("rollout", "bytes_per_token", "least"),
    [  # keys and values x 28 layers x heads of one worker x 128 values x bytes
        ({}, 2 * 28 * 4 * 128 * 4, "1.89"),
        ({"dtype": "bfloat16"}, 2 * 28 * 4 * 128 * 2, "0.95"),
        ({"dtype": "bfloat16", "tp": 4}, 2 * 28 * 1 * 128 * 2, "0.24"),
        ({"dtype": "bfloat16", "tp": 8, "kv_cache_dtype": "fp8"}, 2 * 28 * 1 * 128 * 1, "0.12"),
    ],
    ids=["fp32", "bf16", "bf16 on four", "fp8, heads repeated"],
)
def test_a_cache_below_one_sequence_is_refused(model: Path, rollout: dict, bytes_per_token: int, least: str) -> None:
    gib = 17_664 * bytes_per_token / 2**30

    def cache(gib: float) -> RolloutConfig:
        return RolloutConfig(**rollout, kv_cache_gib=gib, max_num_batched_tokens=LONG + 1)

    for enough in (float(least), gib):
        assert served_length(cache(enough), model, LONG) == LONG + 1
    with pytest.raises(ValueError, match=rf"^rollout.kv_cache_gib: .* \({LONG}\); use at least {least}$"):
        served_length(cache(gib - 1e-6), model, LONG)


def test_a_step_below_one_sequence_is_refused_where_prefills_are_whole(model: Path, gpu: bool) -> None:
    short = RolloutConfig(kv_cache_gib=2, max_num_batched_tokens=LONG)  # scoring generates one token more
    if gpu:
        assert served_length(short, model, LONG) == LONG + 1
    else:
        with pytest.raises(ValueError, match=rf"^rollout.max_num_batched_tokens: {LONG} .* at least {LONG + 1}$"):
            served_length(short, model, LONG)


def test_a_sequence_beyond_the_models_positions_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="max_position_embeddings 32768"):
        served_length(RolloutConfig(), model, 40_000)


def test_the_proofs_tolerance_follows_the_precision() -> None:
    fp32, bf16 = ModelConfig(path="m"), ModelConfig(path="m", dtype="bf16")
    in_fp8 = ModelConfig(path="m", dtype="bf16", fp8={})
    by_precision = SyncConfig()
    assert by_precision.tolerance(fp32, RolloutConfig()) == (5e-5, 5e-4)
    for model, rollout in ((bf16, RolloutConfig()), (fp32, RolloutConfig(dtype="float16"))):
        assert by_precision.tolerance(model, rollout) == (0.02, 1.0)
    half = RolloutConfig(dtype="bfloat16")
    for model, rollout in (
        (in_fp8, half),
        (bf16, half.model_copy(update={"quantization": "fp8"})),
        (bf16, half.model_copy(update={"kv_cache_dtype": "fp8"})),
    ):
        assert by_precision.tolerance(model, rollout) == (0.1, 2.0)
    assert SyncConfig(probe_tolerance=0.05).tolerance(in_fp8, half) == (0.1, 0.05)
    assert SyncConfig(probe_tolerance_mean=0.05).tolerance(in_fp8, half) == (0.05, 2.0)
