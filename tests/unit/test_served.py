"""A training's engines as stage 1's: what they are asked for is answered once, whatever becomes of one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.progress import Progress

from megatron_apo.rollout import filling as filling_file
from megatron_apo.rollout import served as served_file
from megatron_apo.rollout.engine import Engine, State
from megatron_apo.rollout.fleet import Fleet
from megatron_apo.rollout.offline import Sample, sample_of
from megatron_apo.rollout.served import ServedEngines, serving_reference
from megatron_apo.rollout.server import ServerDied, ServerError
from megatron_apo.runtime.ending import EndedEarly, Request
from tests.engines import GENERATE, SAMPLING, Server, engines_of, until

Begun = tuple[Fleet, list[Server]]


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[Begun]:
    """Two engines that are starting."""
    servers = [Server(tmp_path / f"engine{index}") for index in range(2)]
    with Fleet(engines_of(servers), 3) as fleet:
        fleet.begin_starts(fleet.engines)
        yield fleet, servers


def ask(engine: ServedEngines, keys: range) -> None:
    for key in keys:
        engine.add(key, [5, 6], SAMPLING, num_samples=2, seed=10 * key)


def answered(engine: ServedEngines) -> dict[object, list[Sample]]:
    found: dict[object, list[Sample]] = {}
    while engine.num_samples_open:
        for key, samples in engine.step():
            assert key not in found
            found[key] = samples
    return found


def expected(keys: range) -> dict[object, list[Sample]]:
    return {key: [Sample([10 * key + number, 1], "stop") for number in range(2)] for key in keys}


def test_samples_are_in_order_and_engines_share_the_work(begun: Begun) -> None:
    fleet, servers = begun
    with serving_reference(fleet) as engine:
        ask(engine, range(6))
        assert engine.num_samples_open == 12
        assert answered(engine) == expected(range(6))
        ask(engine, range(6, 8))
        assert answered(engine) == expected(range(6, 8))
    assert [len(server.asked) for server in servers] == [4, 4]
    assert fleet.in_state(State.STARTED) == fleet.engines and fleet.may_start


def test_prefix_caches_are_asked_so_that_a_sync_sees_whether_they_are_forgotten(
    begun: Begun, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, asked = begun[0], list[Engine]()
    monkeypatch.setattr(Engine, "cached_tokens", lambda engine: asked.append(engine))
    with serving_reference(fleet):
        assert not asked
    assert asked == fleet.engines


def test_what_a_dead_engine_was_asked_the_other_answers(begun: Begun, capsys: pytest.CaptureFixture[str]) -> None:
    fleet, servers = begun
    with serving_reference(fleet) as engine:
        servers[1].faults[GENERATE] = "die"
        ask(engine, range(6))
        assert answered(engine) == expected(range(6))
        assert fleet.engines[0].state is State.SERVING and fleet.engines[1].state is State.DOWN
    assert capsys.readouterr().out.count("rollout engine 1 died in stage 1") == 1
    assert fleet.engines[0].state is State.STARTED and fleet.engines[1].state is State.DOWN


def test_without_an_engine_it_ends(begun: Begun) -> None:
    fleet, servers = begun
    with serving_reference(fleet) as engine:
        for server in servers:
            server.faults[GENERATE] = "die"
        ask(engine, range(2))
        with pytest.raises(ServerDied):
            answered(engine)


def test_a_refused_request_ends_it(begun: Begun) -> None:
    fleet, servers = begun
    with serving_reference(fleet) as engine:
        servers[0].faults[GENERATE] = 400
        ask(engine, range(1))
        with pytest.raises(ServerError, match="it raised"):
            answered(engine)


def test_a_step_waits_no_longer_than_a_moment(begun: Begun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others ask whether this worker is alive."""
    monkeypatch.setattr(served_file, "_LOOK_EVERY_S", 0.05)
    fleet, servers = begun
    with serving_reference(fleet) as engine:
        servers[0].held = True
        ask(engine, range(1))
        until(lambda: servers[0].asked)
        assert engine.step() == [] and engine.num_samples_open == 2


def test_a_run_that_is_asked_to_end_as_engines_start_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request, begin = Request(), threading.Event()
    monkeypatch.setattr(served_file, "request", request)
    server = Server(tmp_path / "engine")
    server.start = begin.wait  # type: ignore[assignment]
    fleet = Fleet(engines_of([server]), 3)
    fleet.begin_starts(fleet.engines)
    request.ask("SIGUSR1")
    with pytest.raises(EndedEarly, match="as engines started .SIGUSR1"), serving_reference(fleet):
        pass
    begin.set()


def test_a_run_that_is_asked_to_end_samples_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request()
    monkeypatch.setattr(filling_file, "request", request)
    steps: list[int] = []

    def advance() -> None:
        steps.append(1)
        request.ask("SIGUSR1")

    sampler = SimpleNamespace(open=lambda index: None, is_busy=True, wants_more=False, num_done=0, advance=advance)
    job, claims = SimpleNamespace(title="", num_prompts=1), SimpleNamespace(alive=lambda: None)
    with pytest.raises(EndedEarly, match="shards are kept .SIGUSR1"):
        filling_file.sample_all(job, sampler, claims, 0, Progress(disable=True))  # type: ignore[arg-type]
    assert steps == [1]
    waiting, job.num_shards, job.written = SimpleNamespace(take=lambda: None), 2, list
    with pytest.raises(EndedEarly):
        filling_file._wait_for_shard(job, waiting)  # type: ignore[arg-type]


@pytest.mark.parametrize("reason", ["abort", None])
def test_only_what_ended_by_itself_or_at_the_cap_is_a_sample(reason: str | None) -> None:
    assert sample_of((1, 2), "length") == Sample([1, 2], "length")
    with pytest.raises(ServerError, match="is no sample"):
        sample_of([1], reason)
