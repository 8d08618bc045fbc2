"""Weights into a running vLLM server, against transformers; and every way it can go wrong said by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import xxhash
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_apo.config import RolloutConfig
from megatron_apo.rollout.client import GenerateRequest, RolloutClient, Sampling
from megatron_apo.rollout.engine import Address, Engine
from megatron_apo.rollout.proof import prove
from megatron_apo.rollout.server import ServerDied, VLLMServer
from megatron_apo.rollout.weight_sync import SyncError, UpdateFailed, WeightSync
from megatron_apo.weights.hf_io import HFReader
from tests.e2e.conftest import (
    EOS,
    MAX_MODEL_LEN,
    VOCABULARY,
    ModelSource,
    Rollouts,
    StartServer,
    assert_all_gone,
    log_probs,
    tiny_model,
    traces,
)
from tests.weights import TensorSource

SEQUENCES = [[2 + (11 * row + 5 * i * i) % (VOCABULARY - 2) for i in range(20 + row)] for row in range(4)]
SAMPLING = Sampling(max_tokens=4, stop_token_ids=(EOS,))
ROOT = Path(__file__).parents[2]


def references(model: PreTrainedModel) -> list[list[float]]:
    return [log_probs(model, sequence) for sequence in SEQUENCES]


def digests(model: PreTrainedModel) -> dict[str, str]:
    values = model.named_parameters()
    return {name: xxhash.xxh3_128_hexdigest(value.detach().numpy().tobytes()) for name, value in values}


def prove_two_updates(rollouts: Rollouts, transport: str = "shm") -> WeightSync:
    old, before = rollouts.model(seed=0), set(rollouts.server.payload_dir.iterdir())  # of cases before this one
    for version, seed in [(1, 11), (2, 12)]:
        new = rollouts.model(seed)
        sync = rollouts.sync(new, transport)
        report = sync.sync(version)
        assert report.digests == digests(new)
        assert report.num_bytes == sum(4 * value.numel() for value in new.parameters())
        assert prove(sync, SEQUENCES, references(new), expected_digests=digests(new)).max <= 1e-4
        worst = max(
            abs(ours - theirs)
            for row, other in zip(rollouts.client.score(SEQUENCES), references(old), strict=True)
            for ours, theirs in zip(row, other, strict=True)
        )
        assert worst > 0.1, "the case cannot tell new weights from old ones"
        old = new
        (completion,) = rollouts.client.generate([GenerateRequest(SEQUENCES[0], seed=1)], SAMPLING)
        assert completion.weight_version == rollouts.client.weight_version() == str(version)
        shared = {rollouts.server.payload_dir / "buckets"} if transport == "shm" else set()
        assert set(rollouts.server.payload_dir.iterdir()) == before | shared
    return sync


@pytest.mark.parametrize("transport", ["collective", "ipc", "shm"])
def test_tied(rollouts: Rollouts, transport: str) -> None:
    prove_two_updates(rollouts, transport)


# Starts a server as a trainer does, and says what its client must know.
TRAINER = f"""
import json, sys
from pathlib import Path
from megatron_apo.config import RolloutConfig
from megatron_apo.rollout.server import VLLMServer

folder = Path(sys.argv[1])
config = RolloutConfig(tp=2, kv_cache_gib=0.1)
log = folder / "vllm.log"
server = VLLMServer(config, folder / "model", log_path=log, seed=0, max_model_len={MAX_MODEL_LEN})
server.start()
print(json.dumps([server.url, server.token, server.pids(), str(server.payload_dir)]), flush=True)
sys.stdin.read()
"""


def test_untied_with_qkv_bias_over_two_workers_whose_trainer_is_killed(tmp_path: Path) -> None:
    tiny_model("qwen2", tied=False, seed=0).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", TRAINER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as trainer:
        try:
            url, token, pids, folder = json.loads(trainer.stdout.readline())
            engine = Engine(Address(url, token, Path(folder)), timeout_s=120)
            engine.start()
            with engine.client as client:
                rollouts = Rollouts(engine, "qwen2", tied=False)
                sync = prove_two_updates(rollouts)
                assert len(pids) >= 5, "guard, API server, engine core, two workers"
                everything = traces(pids)
                client.pause()  # so that the request below waits
                threading.Timer(1.0, trainer.kill).start()
                with pytest.raises(ServerDied):
                    client.generate([GenerateRequest(SEQUENCES[0], seed=1)], SAMPLING)
                assert_all_gone(everything)
                with pytest.raises(ServerDied):
                    client.health()
                with pytest.raises(ServerDied):
                    sync.sync(version=3)
        finally:
            trainer.kill()


@pytest.mark.full
@pytest.mark.parametrize(("family", "tied", "tp"), [("qwen3", True, 2), ("qwen3", False, 1), ("qwen3", False, 2)])
def test_the_other_layouts(start_server: StartServer, family: str, tied: bool, tp: int) -> None:
    rollouts = start_server(family, tied, tp)
    prove_two_updates(rollouts)
    everything = traces(rollouts.server.pids())
    rollouts.server.stop()
    assert_all_gone(everything)


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.full)])
def test_experts_are_packed_in_every_update(tp: int, tmp_path: Path) -> None:
    """vLLM's CPU engine alone packs them once, and then computes with plain values as if they were packed."""
    config = Qwen3MoeConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 128, "num_experts": 8},
        **{"num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},  # 48: vLLM pads it
        **{"max_position_embeddings": 128, "tie_word_embeddings": False, "initializer_range": 0.1},
    )
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Qwen3MoeForCausalLM(config).eval())
        models[-1].save_pretrained(tmp_path / str(seed))
    server = VLLMServer(
        RolloutConfig(tp=tp, kv_cache_gib=0.1),
        tmp_path / "0",
        log_path=tmp_path / "vllm.log",
        seed=0,
        max_model_len=MAX_MODEL_LEN,
        load_format="dummy",
    )
    engine = Engine(server, timeout_s=120)
    try:
        engine.start()
        readers = [HFReader(tmp_path / str(seed)) for seed in range(2)]
        sources = [TensorSource({name: reader.get(name) for name in reader.names()}) for reader in readers]
        sync = WeightSync(sources[0], [engine])
        engine.connect(sync.init_info)
        for version in (0, 1, 0):
            sync.source = sources[version]
            sync.sync(version)
            assert prove(sync, SEQUENCES, references(models[version])).max <= 1e-4
    finally:
        engine.stop()


STALE = "model.layers.1.mlp.down_proj.weight"


def stale_source(model: PreTrainedModel, old: PreTrainedModel) -> ModelSource:
    """Sends one tensor as it was before."""
    source = ModelSource(model)
    source.tensors[STALE] = dict(old.named_parameters())[STALE].detach()
    return source


@pytest.mark.parametrize("knows_digests", [True, False])
def test_a_stale_tensor_is_named_and_the_server_serves_nothing(rollouts: Rollouts, knows_digests: bool) -> None:
    old, new = rollouts.model(seed=21), rollouts.model(seed=22)
    sync = rollouts.sync(old)
    sync.sync(version=1)
    assert prove(sync, SEQUENCES, references(old)).max <= 1e-4
    sync.source = stale_source(new, old)
    sync.sync(version=2)
    with pytest.raises(SyncError, match=rf"position \d+, token \d+: vLLM .*; stale: {STALE}$"):
        prove(sync, SEQUENCES, references(new), expected_digests=digests(new) if knows_digests else None)
    assert rollouts.client.is_paused()
    recover(rollouts)


def test_what_vllm_computes_otherwise_shows_in_the_probe(rollouts: Rollouts) -> None:
    """It holds what was sent, and its log-probs are others: as where a setting of the model is not the trainer's."""
    new = rollouts.model(seed=31)
    sync = rollouts.sync(new)
    sync.sync(version=1)
    theirs = references(rollouts.model(seed=32))
    with pytest.raises(SyncError, match="it holds the weights that were sent, and computes otherwise"):
        prove(sync, SEQUENCES, theirs, expected_digests=digests(new))
    recover(rollouts)


def test_tensors_that_do_not_fit_the_servers_model_are_named(rollouts: Rollouts) -> None:
    """vLLM alone would go on with uninitialized memory or old weights."""
    good = dict(ModelSource(rollouts.model(seed=51)).tensors)
    left_out = {name: value for name, value in good.items() if name != "model.layers.0.self_attn.k_proj.weight"}
    half = good | {STALE: good[STALE][:, :96].clone()}
    cases = {
        r"model.layers.0.self_attn.qkv_proj.weight \(24576 of its 32768 elements are filled\)": (left_out, SyncError),
        r"model.extra.weight: vLLM could not load it": (good | {"model.extra.weight": torch.ones(3)}, UpdateFailed),
        rf"{STALE}: vLLM could not load it": (half, UpdateFailed),
    }
    try:
        for message, (tensors, error) in cases.items():
            sync = rollouts.sync_of(TensorSource(tensors))
            with pytest.raises(error, match=message):
                sync.sync(version=1)
            with RolloutClient(rollouts.server.url, rollouts.server.token) as client:  # an engine that failed has none
                assert client.is_paused()
            assert [path.name for path in rollouts.server.payload_dir.iterdir()] == ["buckets"]
            rollouts.engine.stop()  # after a failed update nothing but a restart is right
            rollouts.engine.start()
        rollouts.client.pause()
        die_in_flight(rollouts)
    finally:
        rollouts.server.stop()


def die_in_flight(rollouts: Rollouts) -> None:
    """The engine core is killed while a request waits for it."""
    (engine,) = [pid for pid in rollouts.server.pids() if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text()]
    everything = traces(rollouts.server.pids())
    threading.Timer(1.0, os.kill, (engine, signal.SIGKILL)).start()
    with pytest.raises(ServerDied, match="engine is dead|does not answer"):
        rollouts.client.generate([GenerateRequest(SEQUENCES[0], seed=1)], SAMPLING)
    assert_all_gone(everything)
    assert not rollouts.server.alive()


def recover(rollouts: Rollouts) -> None:
    """A complete sync makes the server good again."""
    model = rollouts.model(seed=0)
    sync = rollouts.sync(model)
    sync.sync(version=0)
    assert prove(sync, SEQUENCES, references(model)).max <= 1e-4
