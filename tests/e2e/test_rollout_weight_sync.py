"""Weights into a running vLLM server, against transformers; and every way it can go wrong said by name."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from megatron_apo.rollout.client import GenerateRequest, Sampling
from megatron_apo.rollout.engine import Address, Engine
from megatron_apo.rollout.proof import prove
from megatron_apo.rollout.server import ServerDied
from megatron_apo.rollout.weight_sync import SyncError, WeightSync
from tests.e2e.conftest import (
    EOS,
    MAX_MODEL_LEN,
    VOCABULARY,
    Meta,
    ModelSource,
    Rollouts,
    StartServer,
    assert_all_gone,
    log_probs,
    tiny_model,
    traces,
)

SEQUENCES = [[2 + (11 * row + 5 * i * i) % (VOCABULARY - 2) for i in range(20 + row)] for row in range(4)]
SAMPLING = Sampling(max_tokens=4, stop_token_ids=(EOS,))
ROOT = Path(__file__).parents[2]


def references(model: PreTrainedModel) -> list[list[float]]:
    return [log_probs(model, sequence) for sequence in SEQUENCES]


def checksums(model: PreTrainedModel) -> dict[str, str]:
    values = model.named_parameters()
    return {name: hashlib.sha256(value.detach().numpy().tobytes()).hexdigest() for name, value in values}


def prove_two_updates(rollouts: Rollouts) -> WeightSync:
    old = rollouts.model(seed=0)
    for version, seed in [(1, 11), (2, 12)]:
        new = rollouts.model(seed)
        sync = rollouts.sync(new)
        report = sync.sync(version)
        assert report.checksums == checksums(new)
        assert report.num_bytes == sum(4 * value.numel() for value in new.parameters())
        assert prove(sync, SEQUENCES, references(new), 1e-4, checksums(new)) <= 1e-4
        worst = max(
            abs(ours - theirs)
            for row, other in zip(rollouts.client.score(SEQUENCES), references(old), strict=True)
            for ours, theirs in zip(row, other, strict=True)
        )
        assert worst > 0.1, "the case cannot tell new weights from old ones"
        old = new
        (completion,) = rollouts.client.generate([GenerateRequest(SEQUENCES[0], seed=1)], SAMPLING)
        assert completion.weight_version == rollouts.client.weight_version() == str(version)
        assert list(rollouts.server.payload_dir.iterdir()) == []
    return sync


def test_tied(rollouts: Rollouts) -> None:
    prove_two_updates(rollouts)


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


STALE = "model.layers.1.mlp.down_proj.weight"


class StaleSource(ModelSource):
    """Sends one tensor as it was before."""

    def __init__(self, model: PreTrainedModel, old: PreTrainedModel):
        super().__init__(model)
        self.old = dict(old.named_parameters())

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in super().__iter__():
            yield name, self.old[name] if name == STALE else value


@pytest.mark.parametrize("knows_checksums", [True, False])
def test_a_stale_tensor_is_named_and_the_server_serves_nothing(rollouts: Rollouts, knows_checksums: bool) -> None:
    old, new = rollouts.model(seed=21), rollouts.model(seed=22)
    sync = rollouts.sync(old)
    sync.sync(version=1)
    assert prove(sync, SEQUENCES, references(old)) <= 1e-4
    sync.source = StaleSource(new, old)
    sync.sync(version=2)
    with pytest.raises(SyncError, match=rf"position \d+, token \d+: vLLM .*; stale: {STALE}$"):
        prove(sync, SEQUENCES, references(new), 1e-4, checksums(new) if knows_checksums else None)
    assert rollouts.client.is_paused()
    recover(rollouts)


def test_a_stale_copy_inside_vllm_shows_in_the_probe(rollouts: Rollouts) -> None:
    """Every checksum is right, the log-probs are not: what a tied head that was not repacked looks like."""
    new = rollouts.model(seed=31)
    sync = rollouts.sync(new)
    sync.sync(version=1)
    theirs = references(rollouts.model(seed=32))
    with pytest.raises(SyncError, match="no checksum is amiss"):
        prove(sync, SEQUENCES, theirs, 1e-4, checksums(new))
    recover(rollouts)


class BrokenSource(ModelSource):
    """Yields `items` in place of the model's tensors."""

    def __init__(self, model: PreTrainedModel, items: list[tuple[str, torch.Tensor]]):
        super().__init__(model)
        self.items = items

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.items


def test_a_source_that_breaks_its_word_is_named(rollouts: Rollouts) -> None:
    model = rollouts.model(seed=41)
    good = list(model.named_parameters())
    name, value = good[5]
    extra = ("model.extra.weight", value)
    cases = {
        rf"{name}.*where by its metadata {good[4][0]} is next": [*good[:4], *good[5:]],
        rf"left out {good[-1][0]}$": good[:-1],
        r"model.extra.weight: .*nothing is left": [*good, extra],
        rf"{good[4][0]}: .*where by its metadata {name} is next": [*good[:5], good[4], *good[5:]],
        rf"{name}: the source gave torch.bfloat16 .* declared torch.float32": [
            *good[:5], (name, value.bfloat16()), *good[6:],
        ],
        rf"{name}: the source gave torch.float32 \[1, .* declared": [*good[:5], (name, value[None]), *good[6:]],
    }  # fmt: skip
    for message, items in cases.items():
        sync = rollouts.sync_of(BrokenSource(model, items))
        with pytest.raises(SyncError, match=message):
            sync.sync(version=1)
        assert rollouts.client.is_paused()
        assert list(rollouts.server.payload_dir.iterdir()) == []
        recover(rollouts)


class DeclaredSource(ModelSource):
    """Declares and yields the same tensors, which are not what the server's model wants."""

    def __init__(self, items: list[tuple[str, torch.Tensor]]):
        self.items = items

    def metadata(self) -> list[Meta]:
        return [Meta(name, value.dtype, tuple(value.shape)) for name, value in self.items]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.items


def test_tensors_that_do_not_fit_the_servers_model_are_named(rollouts: Rollouts) -> None:
    """vLLM alone would go on with uninitialized memory or old weights. Each case leaves the server unusable."""
    good = list(rollouts.model(seed=51).named_parameters())
    names = [name for name, _ in good]
    cases = {
        "declares more than once: " + names[3]: [*good, good[3]],
        r"does not fill model.layers.0.self_attn.qkv_proj \(": [
            item for item in good if item[0] != "model.layers.0.self_attn.k_proj.weight"
        ],
    }
    try:
        for message, items in cases.items():
            sync = rollouts.sync_of(DeclaredSource(items))
            with pytest.raises(SyncError, match=message):
                sync.sync(version=1)
            assert rollouts.client.is_paused()
            assert list(rollouts.server.payload_dir.iterdir()) == []
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
    assert prove(sync, SEQUENCES, references(model)) <= 1e-4
