"""A sync over the network when a transfer breaks off: who is left out, who is sent to anew, and when that ends. The
engines are HTTP servers without a model, which read from real gloo groups; tests/e2e/test_weight_faults.py has the same
with vLLM."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_apo.rollout.engine import State
from megatron_apo.rollout.fleet import Fleet
from megatron_apo.rollout.weight_sync import SyncError, WeightSync
from tests.engines import LIMIT_S, Server, engines_of
from tests.weights import TensorSource

NUM_BUCKETS = 6
UPDATE = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
MakeSynced = Callable[[int, float], tuple[Fleet, list[Server], WeightSync]]


@pytest.fixture
def make_synced(tmp_path: Path) -> Iterator[MakeSynced]:
    """make_synced(number of engines, sync.timeout_s) -> a fleet that holds version 2, its servers, and the sync."""
    made: list[Fleet] = []

    def make(number: int, timeout_s: float) -> tuple[Fleet, list[Server], WeightSync]:
        servers = [Server(tmp_path / f"engine{index}") for index in range(number)]
        fleet = Fleet(engines_of(servers), window=3)
        made.append(fleet)
        weights = {f"t{index}": torch.full((16,), float(index)) for index in range(NUM_BUCKETS)}
        sync = WeightSync(TensorSource(weights, 64), fleet.engines, transport="collective", timeout_s=timeout_s)
        fleet.start()
        fleet.connect(sync.init_info)
        sync.sync(2)
        for server in servers:
            server.events.clear()
        return fleet, servers, sync

    yield make
    for fleet in made:
        fleet.stop()


@pytest.fixture
def over() -> Iterator[threading.Event]:
    """Set at the test's end; what waits for it is silent until then."""
    event = threading.Event()
    yield event
    event.set()


def states(fleet: Fleet) -> list[tuple[State, int | None]]:
    return [(engine.state, engine.version) for engine in fleet.engines]


def updates(server: Server) -> list[str]:
    return [event for event in server.events if event in UPDATE]


def test_a_silent_engine_is_left_out_and_the_others_are_sent_to_anew(
    make_synced: MakeSynced, over: threading.Event
) -> None:
    fleet, servers, sync = make_synced(3, 3.0)
    servers[1].before_update = lambda where: over.wait(LIMIT_S)
    start = time.monotonic()
    sync.sync(3)
    assert time.monotonic() - start < 2 * 3.0
    over.set()
    assert states(fleet) == [(State.SERVING, 3), (State.DOWN, None), (State.SERVING, 3)]
    (why,) = fleet.failures(State.DOWN)
    assert "did not come within 2 s" in why and "(sync.timeout_s" in why
    assert servers[1].events.count("/start_weight_update") == 1, "it is not asked again"
    for server in (servers[0], servers[2]):
        assert server.version == "3" and updates(server) == 2 * UPDATE, "also the first is ended"
        assert server.events[-2:] == ["/collective_rpc", "/resume"]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("after", [2, NUM_BUCKETS], ids=["under way", "sent"])
def test_a_transfer_that_broke_off_for_one_is_made_anew_once(number: int, after: int, make_synced: MakeSynced) -> None:
    """Under way it broke off for all; when all was sent, the others have it and are not given it again."""
    fleet, servers, sync = make_synced(number, 10.0)
    last, others = servers[-1], servers[:-1]
    last.worker.after, last.worker.num_breaks = after, 1
    sync.sync(3)
    assert states(fleet) == [(State.SERVING, 3)] * number
    assert [server.version for server in servers] == ["3"] * number
    assert updates(last) == 2 * UPDATE
    assert all(updates(server) == (2 if after == 2 else 1) * UPDATE for server in others)
    for server in servers:
        server.events.clear()
    last.worker.num_breaks = 2
    with pytest.raises(SyncError, match="^the weights could not be sent, twice: "):
        sync.sync(4)
    assert fleet.engines[-1].state is State.STARTED and "/resume" not in last.events, "it stays paused"
    for engine, server in zip(fleet.engines[:-1], others, strict=True):
        expected = (State.STARTED, False) if after == 2 else (State.SERVING, True)
        assert (engine.state, "/resume" in server.events) == expected
    sync.sync(5)
    assert states(fleet) == [(State.SERVING, 5)] * number


def test_an_engine_that_cannot_come_is_left_out_at_once(make_synced: MakeSynced) -> None:
    """Nobody else would hear of that; it says so itself, and the others do not wait until sync.timeout_s."""
    fleet, servers, sync = make_synced(2, 15.0)
    servers[0].worker.num_breaks, servers[0].worker.is_alone = 1, True
    start = time.monotonic()
    sync.sync(3)
    assert time.monotonic() - start < 5
    assert states(fleet) == [(State.DOWN, None), (State.SERVING, 3)]
    assert fleet.failures(State.DOWN) == ["the network is gone"]


def test_an_engine_that_refuses_an_update_ends_it_at_once_for_the_others(make_synced: MakeSynced) -> None:
    fleet, servers, sync = make_synced(2, 15.0)
    servers[0].faults["/update_weights"] = 500
    start = time.monotonic()
    sync.sync(3)
    assert time.monotonic() - start < 5, "nobody waits for one that has said that it failed"
    assert states(fleet) == [(State.UNUSABLE, None), (State.SERVING, 3)]
    assert servers[1].version == "3"


def test_an_engine_that_is_silent_after_the_transfer_is_left_out_in_time(
    make_synced: MakeSynced, over: threading.Event
) -> None:
    fleet, servers, sync = make_synced(2, 2.0)
    servers[1].worker.held_weights = lambda: over.wait(LIMIT_S)
    start = time.monotonic()
    sync.sync(3)
    assert time.monotonic() - start < LIMIT_S / 2
    assert states(fleet) == [(State.SERVING, 3), (State.DOWN, None)]
    assert fleet.failures(State.DOWN) == ["the rollout server has not answered in 2 s of an update (sync.timeout_s=2)"]


def test_what_any_worker_says_broke_off_is_sent_anew(make_synced: MakeSynced) -> None:
    fleet, servers, sync = make_synced(1, 10.0)
    first = servers[0].worker.held_weights()["results"][0]
    servers[0].worker.held_weights = lambda: {"results": [first, {"broken": "the cable is out", "alone": False}]}
    with pytest.raises(SyncError, match="^the weights could not be sent, twice: engine 0: the cable is out$"):
        sync.sync(3)
    assert updates(servers[0]) == 2 * UPDATE and "/resume" not in servers[0].events
