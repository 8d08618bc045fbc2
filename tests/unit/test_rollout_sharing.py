"""Trainer and vLLM by turns: what a server is asked for and in which order, read off a server without an engine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
import torch.distributed as dist

from megatron_apo.config import build_recipe
from megatron_apo.data.prompts import LoadedPrompts, Prompt
from megatron_apo.rollout import fleet as fleet_file
from megatron_apo.rollout import rollouts as rollouts_file
from megatron_apo.rollout.engines import Engines
from megatron_apo.rollout.inputs import Inputs
from megatron_apo.rollout.rollouts import Rollouts
from megatron_apo.rollout.weight_sync import SyncError
from megatron_apo.runtime.topology import Topology
from tests.engines import Worker, until
from tests.weights import TensorSource

PROMPT = Prompt(prompt_id="p", text="1+2=", text_hash="h", token_ids=(5, 6), answer="3", row=0)
WEIGHT = torch.arange(6.0).reshape(2, 3)
MEETING = ["/init_weight_transfer_engine", "/get_world_size"]
UPDATE = ["/pause?mode=wait&clear_cache=true", "/start_weight_update", "/update_weights", "/finish_weight_update"]
UPDATE += ["/collective_rpc", "/resume"]
GENERATE = "/inference/v1/generate"


class Handler(BaseHTTPRequestHandler):
    """Answers as vLLM does, with a log-prob of 0 everywhere."""

    server: Any

    def do_GET(self) -> None:
        self.server.events.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        path = urlsplit(self.path).path
        answer: Any = {}
        status = 200
        if path == "/get_world_size":
            answer = {"world_size": 1}
        elif path == "/init_weight_transfer_engine":
            self.server.worker = Worker(body["init_info"])
        elif path == "/update_weights":
            self.server.worker.update(body["update_info"])
        elif path == "/collective_rpc":
            answer = self.server.worker.asked(body["method"])
        elif path == "/finish_weight_update":
            self.server.version = body["weight_version"]
        elif path == GENERATE and self.server.deaths:
            self.server.deaths -= 1
            status, answer = 503, {"error": "the engine is dead"}
        elif path == GENERATE and "prompt_logprobs" in body["sampling_params"]:
            answer = {"prompt_logprobs": [None, *({str(token): {"logprob": 0.0}} for token in body["token_ids"][1:])]}
        elif path == GENERATE:
            choice = {"index": 0, "token_ids": [7, 1], "finish_reason": "stop"}
            choice |= {"weight_versions": [{"version": self.server.version}]}
            answer = {"choices": [choice | {"logprobs": {"content": [{"logprob": 0.0}] * 2}}]}
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def http() -> Iterator[Any]:
    """The server; `events`: what happened. `stops`: how often it was stopped. `deaths`: generations to be answered as
    a dead engine's."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.events, server.version, server.deaths, server.stops = [], "default", 0, 0
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def one_rank() -> Topology:
    place = dict.fromkeys(("rank", "tp_rank", "pp_rank", "dp_rank"), 0) | dict.fromkeys(("world_size", "tp", "pp"), 1)
    groups = dict.fromkeys(("tp_group", "pp_group", "dp_group"))
    return Topology(**place, **groups, dp=1, device=torch.device("cpu"), host_group=dist.new_group())


def log_probs(value: float) -> Any:
    """The trainer's, of any tokens."""
    return lambda recipe, topology, policy, sequences: [[value] * (len(s) - 1) for s in sequences]


@pytest.fixture
def start(http: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes Rollouts of a recipe's overrides whose server is `http` and whose offloading is an event."""

    class Server(SimpleNamespace):
        pid = None
        token = ""
        cache_probe_tokens = 0
        can_start = True
        is_gone = False

        def start(self) -> None:
            self.url, self.payload_dir = f"http://127.0.0.1:{http.server_port}", tmp_path
            http.events.append("start")

        def stop(self) -> None:
            http.stops += 1

        def log_tail(self) -> str:
            return ""

    @contextmanager
    def offloaded() -> Iterator[None]:
        http.events.append("offloaded")
        try:
            yield
        finally:
            http.events.append("back")

    def make(*overrides: str, engines: Engines | None = None) -> Rollouts:
        paths = ["model.path=m", "data.train=t", "vstar.dir=v", "reward.name=arithmetic", "eval.samples=1"]
        inputs = Inputs(
            tokenizer=SimpleNamespace(decode=lambda ids, **_: "3"),  # type: ignore[arg-type]
            renderer=SimpleNamespace(asks_to_think=False),  # type: ignore[arg-type]
            training=None,  # type: ignore[arg-type]
            evaluation=LoadedPrompts([PROMPT], {}, ""),
            stop_token_ids=(1,),
        )
        recipe = build_recipe({}, [*paths, *overrides])
        return Rollouts(recipe, one_rank(), [], None, inputs, offloaded, engines=engines)  # type: ignore[arg-type]

    monkeypatch.setattr(fleet_file, "VLLMServer", lambda *_, **__: Server())
    monkeypatch.setattr(rollouts_file, "Gather", lambda *_, **__: TensorSource({"w": WEIGHT}))
    monkeypatch.setattr(rollouts_file, "policy_log_probs", log_probs(0.0))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield make
    dist.destroy_process_group()


def test_vllm_sleeps_whenever_the_trainers_memory_is_back(start: Any, http: Any) -> None:
    def happened() -> list[str]:
        events, http.events = http.events, []
        return events

    def turn(*work: str) -> list[str]:
        return ["offloaded", "/wake_up", *work, "/sleep?level=1", "back"]

    with start("rollout.sleep_while_training=true") as rollouts:
        assert happened() == ["offloaded", "start", "/sleep?level=1", "back", *MEETING]
        rollouts.sync(0)
        assert happened() == ["/wake_up?tags=weights", *UPDATE]
        assert rollouts.evaluate(0).num_prompts == 1
        assert happened() == turn(GENERATE, GENERATE)  # sampled, greedy
        assert rollouts.sample([PROMPT], 1).sequences.response(0).tolist() == [7, 1]
        assert happened() == turn(GENERATE)
        rollouts.prove()
        assert happened() == turn(*[GENERATE] * 8)  # probes


def test_without_sleep_nothing_is_asked_but_offloading_is_the_same(start: Any, http: Any) -> None:
    with start() as rollouts:
        rollouts.sync(0)
        rollouts.sample([PROMPT], 1)
        assert rollouts._sync._ranks.group is rollouts._topology.host_group  # its GPUs would wait in the default one
    assert sorted(http.events[:2]) == ["offloaded", "start"]  # beside each other, since no memory is shared
    assert http.events[2:] == ["back", *MEETING, *UPDATE, "offloaded", GENERATE, "back"]


@pytest.mark.parametrize("sleeps", [False, True])
def test_engines_start_beside_the_trainer_where_they_share_no_memory(sleeps: bool, start: Any, http: Any) -> None:
    """And are stopped where it fails before it asks them for anything."""
    recipe = start(f"rollout.sleep_while_training={str(sleeps).lower()}")._recipe
    with pytest.raises(RuntimeError, match="no model"), Engines(recipe, one_rank()) as engines:
        assert engines.shares_memory == sleeps
        if not sleeps:
            until(lambda: engines.fleet and engines.fleet.answering)
        before = http.stops
        raise RuntimeError("no model")
    assert http.events == ([] if sleeps else ["start"]) and http.stops == before + 1


def test_rollouts_take_engines_that_are_starting(start: Any, http: Any) -> None:
    """Each is started once, and lives as long as the engines' own context."""
    recipe = start()._recipe
    with Engines(recipe, one_rank()) as engines:
        with start(engines=engines) as rollouts:
            rollouts.sync(0)
            before = http.stops
        assert http.events.count("start") == 1 and http.stops == before
    assert http.stops == before + 1


def test_a_server_that_died_starts_again_where_there_is_room(start: Any, http: Any) -> None:
    with start("rollout.sleep_while_training=true") as rollouts:
        rollouts.sync(0)
        http.events, http.deaths = [], 1
        rollouts.sample([PROMPT], 1)
    assert http.events == [
        *("offloaded", "/wake_up", GENERATE, "back"),  # a dead server is not put to sleep
        *("offloaded", "start", "/sleep?level=1", "back", *MEETING),
        *("/wake_up?tags=weights", *UPDATE),
        *("offloaded", "/wake_up", *[GENERATE] * 8, "/sleep?level=1", "back"),  # the proof
        *("offloaded", "/wake_up", GENERATE, "/sleep?level=1", "back"),
    ]


def test_the_proof_is_held_to_its_precision(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts_file, "policy_log_probs", log_probs(-0.015))
    with start("model.dtype=bf16", "rollout.dtype=bfloat16") as rollouts:
        rollouts.sync(0)
        assert rollouts.prove() == pytest.approx(0.015)
    with start() as rollouts:
        rollouts.sync(0)
        with pytest.raises(SyncError, match=r"by 0\.015 \(allowed: 0\.0005\), 0\.015 in the mean \(5e-05\)"):
            rollouts.prove()
    with start("sync.probe_tolerance=1") as rollouts:  # the mean alone
        rollouts.sync(0)
        with pytest.raises(SyncError, match=r"by 0\.015 \(allowed: 1\), 0\.015 in the mean \(5e-05\)"):
            rollouts.prove()
