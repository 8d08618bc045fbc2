"""What a vLLM server is started with, and what is refused before one is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_apo.config import ModelConfig, RolloutConfig, SyncConfig
from megatron_apo.rollout import server as server_file
from megatron_apo.rollout.server import VLLMServer, engine_options, engine_problems, served_length

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
    assert by_precision.tolerance(fp32, RolloutConfig()) == 1e-4
    for model, rollout in ((bf16, RolloutConfig()), (fp32, RolloutConfig(dtype="float16"))):
        assert by_precision.tolerance(model, rollout) == 1.0
    half = RolloutConfig(dtype="bfloat16")
    for model, rollout in (
        (in_fp8, half),
        (bf16, half.model_copy(update={"quantization": "fp8"})),
        (bf16, half.model_copy(update={"kv_cache_dtype": "fp8"})),
    ):
        assert by_precision.tolerance(model, rollout) == 2.0
    assert SyncConfig(probe_tolerance=0.05).tolerance(in_fp8, half) == 0.05
