"""Several engines: who is asked for what, and that nothing is lost or done twice when one dies. The counterparts are
HTTP servers without a model; test_main_job.py has the same with vLLM."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_apo.config import Difference
from megatron_apo.rollout.client import Completion, GenerateRequest, Sampling, generate_body
from megatron_apo.rollout.engine import Address, Engine, State
from megatron_apo.rollout.fleet import Fleet, RequestQueue
from megatron_apo.rollout.proof import prove
from megatron_apo.rollout.server import ServerDied, ServerError
from megatron_apo.rollout.weight_sync import SyncError, UpdateFailed, WeightSync, held_problem
from megatron_apo.weights.digest import digest
from tests.engines import GENERATE, LIMIT_S, Server, engines_of, requests, until
from tests.weights import TensorSource

MakeFleet = Callable[..., tuple[Fleet, list[Server]]]


WEIGHTS = {"w": torch.arange(6.0).reshape(2, 3), "v": torch.ones(3)}
WITHIN = Difference(mean=0.1, max=0.1)


def source() -> TensorSource:
    return TensorSource(dict(WEIGHTS), bucket_bytes=64)


@pytest.fixture
def make_fleet(tmp_path: Path) -> Iterator[MakeFleet]:
    """make_fleet(number of engines, window) -> (a fleet that serves, its servers)"""
    made: list[Fleet] = []

    def make(number: int, window: int = 3) -> tuple[Fleet, list[Server]]:
        servers = [Server(tmp_path / f"engine{index}") for index in range(number)]
        fleet = Fleet(engines_of(servers), window)
        made.append(fleet)
        fleet.start()
        fleet.connect(WeightSync(source()).init_info)
        for engine in fleet.engines:
            engine.holds(1)
        return fleet, servers

    yield make
    for fleet in made:
        fleet.stop()


class Asking:
    """`Fleet.generate` in a thread of its own."""

    def __init__(self, fleet: Fleet, queue: RequestQueue):
        self.told: list[int] = []
        self._done: Future[None] = Future()
        threading.Thread(target=self._run, args=(fleet, queue), daemon=True).start()

    def _run(self, fleet: Fleet, queue: RequestQueue) -> None:
        try:
            fleet.generate(queue, self._tell)
            self._done.set_result(None)
        except Exception as error:
            self._done.set_exception(error)

    def _tell(self, index: int, completion: Completion) -> None:
        assert completion.token_ids == [index, 1]
        self.told.append(index)

    def finish(self) -> None:
        self._done.result(LIMIT_S)


def hold(*servers: Server) -> None:
    for server in servers:
        server.held = True


def test_requests_go_in_order_to_who_has_least_to_do(make_fleet: MakeFleet) -> None:
    fleet, (first, second) = make_fleet(2)
    hold(first, second)
    queue = RequestQueue(requests(12))
    asking = Asking(fleet, queue)
    until(lambda: len(first.asked + second.asked) == 6)  # two windows of three
    assert (first.asked, second.asked) == ([0, 2, 4], [1, 3, 5])
    second.release(2)
    until(lambda: len(second.asked) == 5)
    assert (first.asked, second.asked[3:]) == ([0, 2, 4], [6, 7])  # the slower one gets no more than it can do
    for server in (first, second):
        server.release(12)
    asking.finish()
    assert sorted(asking.told) == list(range(12)) and queue.answered_by == {
        0: len(first.answered), 1: len(second.answered)
    }  # fmt: skip
    assert [one.token_ids[0] for one in queue.completions] == list(range(12))


def test_a_request_for_several_responses_takes_as_many_places(make_fleet: MakeFleet) -> None:
    fleet, (first, second) = make_fleet(2)  # windows of three
    hold(first, second)
    bodies = requests(10)
    for number, body in enumerate(bodies):
        body["sampling_params"] |= {"n": 2, "seed": 2 * number}
    queue = RequestQueue(bodies)
    asking = Asking(fleet, queue)
    until(lambda: len(first.asked + second.asked) == 4)
    assert (first.asked, second.asked) == ([0, 4], [2, 6])  # four responses each: the window was not full with two
    first.release(10)
    second.release(10)
    asking.finish()
    assert sorted(asking.told) == list(range(20)) and sum(queue.answered_by.values()) == 20
    assert [one.token_ids[0] for one in queue.completions] == list(range(20))


def test_a_request_says_how_many_responses_it_is_for() -> None:
    bodies = [generate_body(GenerateRequest([5], 7), Sampling(4, (1,)), number) for number in (1, 2, 3)]
    assert RequestQueue(bodies).sizes == [1, 2, 3]
    assert [body["sampling_params"].get("n", 1) for body in bodies] == [1, 2, 3]


@pytest.mark.parametrize("number", [1, 4])
def test_an_answer_of_another_number_of_responses_ends_the_call(number: int) -> None:
    queue = RequestQueue([{"sampling_params": {"n": 3}}])
    with pytest.raises(ServerError, match=f"a request for 3 responses was answered with {number}"):
        queue.answer(0, [Completion([1], [0.0], "stop", "0", 0.0)] * number, 0)


def test_one_engine_has_everything_in_flight_at_once(make_fleet: MakeFleet) -> None:
    fleet, (server,) = make_fleet(1, window=3)
    hold(server)
    asking = Asking(fleet, RequestQueue(requests(12)))
    until(lambda: len(server.asked) == 12)
    server.release(12)
    asking.finish()


def test_an_engines_death_costs_its_unfinished_requests_a_second_asking_and_nothing_else(
    make_fleet: MakeFleet, capfd: pytest.CaptureFixture[str]
) -> None:
    fleet, (first, second) = make_fleet(2)
    fleet.activity = "step 3"
    hold(first, second)
    queue = RequestQueue(requests(12))
    asking = Asking(fleet, queue)
    until(lambda: len(first.asked + second.asked) == 6)
    second.release(2)  # 1 and 3
    until(lambda: len(second.asked) == 5 and len(asking.told) == 2)
    unfinished = second.asked[2:]
    second.die()
    first.release(12)
    asking.finish()
    assert sorted(asking.told) == list(range(12)), "each response is told once"
    times = Counter(first.asked + second.asked)
    assert {seed for seed, count in times.items() if count > 1} == set(unfinished) == {5, 6, 7}
    assert set(times) == set(range(12)) and max(times.values()) == 2
    assert [one.token_ids[0] for one in queue.completions] == list(range(12))
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("rollout engine")]
    assert line.startswith("rollout engine 1 died in step 3 (") and line.endswith(
        "; the others are asked its unfinished requests, 3"
    )


def test_a_restarted_engine_is_asked_for_nothing_before_it_holds_proven_weights(make_fleet: MakeFleet) -> None:
    fleet, (first, second) = make_fleet(2)
    hold(first)
    second.faults["/inference/v1/generate"] = "die"
    asking = Asking(fleet, RequestQueue(requests(12)))
    until(lambda: second.num_starts == 2)  # while the other one still has all its requests to answer
    assert not first.answered
    before = list(second.asked)
    first.release(12)
    asking.finish()
    fleet.finish_starts()
    fleet.connect(WeightSync(source()).init_info)
    assert second.asked == before and fleet.engines[1].state is State.STARTED

    def sample() -> None:
        first.held = False
        Asking(fleet, RequestQueue(requests(6))).finish()

    sample()
    fleet.engines[1].holds(1)  # a sync gave it the weights
    assert fleet.engines[1].state is State.UNPROVEN
    sample()
    assert second.asked == before
    fleet.engines[1].is_proven()
    sample()
    assert second.asked != before


def test_when_none_is_left_what_was_answered_stays(make_fleet: MakeFleet, capfd: pytest.CaptureFixture[str]) -> None:
    fleet, servers = make_fleet(2)
    hold(*servers)
    queue = RequestQueue(requests(8))
    asking = Asking(fleet, queue)
    until(lambda: sum(len(server.asked) for server in servers) == 6)
    servers[0].release(2)
    until(lambda: len(asking.told) == 2)
    for server in servers:
        server.die()
    with pytest.raises(ServerDied):
        asking.finish()
    answered, before = set(asking.told), [len(server.asked) for server in servers]
    fleet.start()
    for server, engine in zip(servers, fleet.engines, strict=True):
        server.held = False
        engine.is_proven()
    again = Asking(fleet, queue)
    again.finish()
    assert sorted(again.told) == sorted(set(range(8)) - answered)
    asked_again = [seed for server, count in zip(servers, before, strict=True) for seed in server.asked[count:]]
    assert sorted(asked_again) == sorted(again.told)
    assert [one.token_ids[0] for one in queue.completions] == list(range(8))
    seconds = [one.seconds for one in queue.completions]
    assert min(seconds[index] for index in again.told) > max(seconds[index] for index in answered)  # of the step


def test_an_engine_that_runs_elsewhere_is_asked_and_not_restarted(tmp_path: Path) -> None:
    elsewhere, here = (Server(tmp_path / name) for name in ("elsewhere", "here"))
    elsewhere.start()
    address = Address(elsewhere.url, elsewhere.token, elsewhere.payload_dir)
    with Fleet([Engine(address, number=0), *engines_of([here])], window=3) as fleet:
        fleet.engines[1].number = 1
        fleet.start()
        weight_sync(fleet).sync(1)
        Asking(fleet, RequestQueue(requests(6))).finish()
        assert (len(elsewhere.answered), len(here.answered)) == (3, 3)
        elsewhere.die()
        Asking(fleet, RequestQueue(requests(6))).finish()
        fleet.start()
        assert [engine.state for engine in fleet.engines] == [State.DOWN, State.SERVING] and elsewhere.num_starts == 1
        assert fleet.pids() == {"vllm server 0": None, "vllm server 1": None}
    assert elsewhere.num_starts == here.num_starts == 1


def test_a_refused_request_ends_the_call(make_fleet: MakeFleet) -> None:
    fleet, (first, second) = make_fleet(2)
    hold(first, second)
    second.faults["/inference/v1/generate"] = 400
    asking = Asking(fleet, RequestQueue(requests(6)))
    with pytest.raises(ServerError, match="400: it raised"):
        asking.finish()
    assert asking.told == [] and fleet.serving == fleet.engines


# --- weights


def weight_sync(fleet: Fleet) -> WeightSync:
    """A sync that all of a fleet's engines were introduced to."""
    sync = WeightSync(source(), fleet.engines)
    fleet.connect(sync.init_info)
    return sync


def test_buckets_are_written_once_and_read_by_all_at_the_same_time(make_fleet: MakeFleet) -> None:
    fleet, servers = make_fleet(3)
    together, files = threading.Barrier(3), set()

    def look(where: dict[str, Any]) -> None:
        together.wait(LIMIT_S)  # breaks where an engine begins when another is done
        path = Path(where["folder"]).parent / "buckets"
        files.add((path, os.stat(path).st_ino, os.stat(path).st_nlink))

    for server in servers:
        server.before_update = look
    sync = weight_sync(fleet)
    report = sync.sync(4)
    assert len({path for path, _, _ in files}) == 3 and len({inode for _, inode, _ in files}) == 1
    assert {links for _, _, links in files} == {3}
    assert [server.version for server in servers] == ["4"] * 3
    assert report.digests == {name: digest(value) for name, value in WEIGHTS.items()}
    assert [engine.version for engine in fleet.engines] == [4] * 3
    before = set(files)
    sync.sync(5)
    assert files == before, "the memory is that of the first time"
    assert [[path.name for path in server.payload_dir.iterdir()] for server in servers] == [["buckets"]] * 3


@pytest.mark.parametrize("route", ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update"])
def test_an_engine_that_dies_in_a_sync_does_not_keep_the_others_from_the_weights(
    route: str, make_fleet: MakeFleet, capfd: pytest.CaptureFixture[str]
) -> None:
    fleet, servers = make_fleet(3)
    servers[0].faults[route] = "die"  # the one whose folder the payload may have been written in
    weight_sync(fleet).sync(4)
    assert [engine.state for engine in fleet.engines] == [State.DOWN, State.SERVING, State.SERVING]
    assert [server.version for server in servers[1:]] == ["4"] * 2
    fleet.attend_to_lost()
    assert "rollout engine 0 died in the start (" in capfd.readouterr().out
    fleet.finish_starts()
    assert servers[0].num_starts == 2 and fleet.numbers(State.STARTED) == [0]


def test_each_engines_workers_say_what_they_hold(make_fleet: MakeFleet) -> None:
    fleet, servers = make_fleet(2)
    sync = weight_sync(fleet)
    sync.sync(3)
    held = [digest(value) for value in WEIGHTS.values()]
    cases = [
        ({"held": [held[0], digest(torch.zeros(3))]}, r"hold the weights that were sent: v \(it has other values\)$"),
        ({"held": held, "wrong": {"lm_head": "stale"}}, r"sent: lm_head \(stale\)$"),
        ({"held": held, "unheld": [1]}, r"sent: v \(no parameter of vLLM's model has it\)$"),
        ({"error": "KeyError: 'x'"}, r"worker 0 cannot say what its model holds: KeyError: 'x'$"),
    ]
    for report, message in cases:
        servers[1].worker.held_weights = lambda report=report: {"results": [{"wrong": {}} | report]}
        with pytest.raises(SyncError, match=message) as caught:
            sync.sync(4)
        assert not isinstance(caught.value, UpdateFailed)
        assert servers[0].events[-1] == "/resume" and servers[1].events[-1] == "/collective_rpc", "it stays paused"
    servers[1].worker.held_weights = lambda: {"results": []}
    with pytest.raises(SyncError, match="0 of vLLM's 1 workers say"):
        sync.sync(4)
    sync.source.tensors = {"w": WEIGHTS["w"] + 1, "v": WEIGHTS["v"]}
    servers[1].worker.held_weights = lambda: {"results": [{"wrong": {}, "held": held}]}
    with pytest.raises(SyncError, match=r"sent: w \(it holds what the sync before sent\)$"):
        sync.sync(5)


def test_a_tensor_is_to_be_held_by_some_worker_and_each_holds_what_was_sent() -> None:
    sent = {"a": "1", "b": "2"}
    lacks_a, lacks_b = ({"wrong": {}, "held": ["1", "2"], "unheld": [number]} for number in range(2))
    assert held_problem(sent, {}, [lacks_a, lacks_b], 2) is None
    assert "b (no parameter of vLLM's model has it)" in str(held_problem(sent, {}, [lacks_b, lacks_b], 2))
    stale = held_problem(sent, {}, [lacks_a, lacks_b | {"held": ["1", "3"]}], 2)
    assert stale == "vLLM's worker 1 does not hold the weights that were sent: b (it has other values)"


def test_an_engine_that_answers_without_reading_is_unusable(make_fleet: MakeFleet) -> None:
    fleet, servers = make_fleet(1)
    many = TensorSource({f"t{number}": torch.ones(16) for number in range(6)}, bucket_bytes=64)
    sync = WeightSync(many, fleet.engines)
    fleet.connect(sync.init_info)
    servers[0].worker.update = lambda update_info: None
    with pytest.raises(UpdateFailed, match=r"vLLM was done before it had read t\d$"):
        sync.sync(4)
    assert fleet.numbers(State.UNUSABLE) == [0]


def test_an_update_that_raised_leaves_the_engine_unusable(make_fleet: MakeFleet) -> None:
    fleet, (first, second) = make_fleet(2)
    second.faults["/update_weights"] = 500
    sync = weight_sync(fleet)
    sync.sync(4)
    assert (
        fleet.numbers(State.UNUSABLE) == [1]
        and "/update_weights with 500: it raised" in fleet.failures(State.UNUSABLE)[0]
    )
    num_events = len(second.events)
    sync.sync(5)
    fleet.ask(lambda client: client.wake_up())
    Asking(fleet, RequestQueue(requests(6))).finish()
    assert len(second.events) == num_events and second.events[-1] == "/update_weights", "it is never asked again"
    first.faults["/update_weights"] = 500
    with pytest.raises(UpdateFailed, match="500: it raised"):
        sync.sync(6)


def test_a_proof_is_of_every_engine_and_says_which_weights(make_fleet: MakeFleet) -> None:
    fleet, (first, second) = make_fleet(2)
    sync = weight_sync(fleet)
    sync.sync(4)
    first.score, second.score = -0.1, -0.2
    assert prove(sync, [[5, 6, 7]], [[-0.15, -0.15]], WITHIN) == pytest.approx((0.05, 0.05))
    first.score = -0.5
    with pytest.raises(SyncError, match=r"by 0\.35 \(allowed: 0\.1\), 0\.35 in the mean \(0\.1\)"):
        prove(sync, [[5, 6, 7]], [[-0.15, -0.15]], WITHIN)
    assert first.events[-1].startswith("/pause")
    first.score, second.score = -0.15, -0.5
    with pytest.raises(SyncError, match=r"by 0\.35"):
        prove(sync, [[5, 6, 7]], [[-0.15, -0.15]], WITHIN)
    second.score = -0.15
    with pytest.raises(SyncError, match="stale: v$"):
        prove(sync, [[5, 6, 7]], [[-0.15, -0.15]], WITHIN, report_with(sync, v="other"))
    first.faults["/inference/v1/generate"] = "die"
    assert prove(sync, [[5, 6, 7]], [[-0.15, -0.15]], WITHIN) == (0.0, 0.0)  # of the one that is left
    second.faults["/inference/v1/generate"] = "die"
    with pytest.raises(ServerDied):
        prove(sync, [[5, 6, 7]], [[-0.15, -0.15]], WITHIN, engines=fleet.serving)


def report_with(sync: WeightSync, **others: str) -> dict[str, str]:
    return sync.sent[-1] | others


@pytest.mark.parametrize("path", ["/start_weight_update", GENERATE])
def test_a_request_that_a_dead_engine_leaves_is_given_up(path: str, tmp_path: Path, monkeypatch) -> None:
    """vLLM's server lives on, and waits for an answer of an engine that died as it was asked."""
    monkeypatch.setattr("megatron_apo.rollout.client.HEALTH_EVERY_S", 0.1)
    server = Server(tmp_path)
    (engine,) = engines_of([server])
    engine.start()
    try:
        engine.client.pause()
        time.sleep(0.3)
        engine.client.pause()  # a server that is well is asked on
        server.faults[path] = "leave"
        with pytest.raises(ServerDied, match=r"engine is dead: /health"):
            engine.client.start_weight_update() if path != GENERATE else engine.client.score([[1, 2, 3]])
    finally:
        engine.stop()


def test_an_engine_that_does_not_start_again_is_left_while_another_answers(
    make_fleet: MakeFleet, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is started again with the next occasion; where nobody answers, its failure is the fleet's."""

    def no_start() -> None:
        raise ServerError("no memory")

    fleet, servers = make_fleet(2)
    first, second = fleet.engines
    monkeypatch.setattr(servers[0], "start", no_start)
    servers[0].die()
    first.fail(ServerDied("gone"))
    fleet.attend_to_lost()
    fleet.finish_starts()
    assert "rollout engine 0 did not start (no memory); the others go on without it" in capfd.readouterr().out
    assert fleet.answering == [second] and not first.answers
    monkeypatch.undo()
    fleet.attend_to_lost()
    fleet.finish_starts()
    assert fleet.answering == [first, second] and servers[0].num_starts == 2
    for server, engine in zip(servers, fleet.engines, strict=True):
        monkeypatch.setattr(server, "start", no_start)
        server.die()
        engine.fail(ServerDied("gone"))
    with pytest.raises(ServerError, match="no memory"):
        fleet.start()


def test_a_start_that_is_waited_for_can_be_ended(make_fleet: MakeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while `finish_starts` waits: `stop` ends the server that is starting, and does not wait for it."""
    fleet, (server,) = make_fleet(1)
    starting, stopped = threading.Event(), threading.Event()

    def start() -> None:
        starting.set()
        stopped.wait(LIMIT_S)

    monkeypatch.setattr(server, "start", start)

    def interrupt(self: Future, timeout: float | None = None) -> None:
        assert starting.wait(LIMIT_S)  # what an engine's start stops first is behind it
        monkeypatch.setattr(server, "stop", stopped.set)
        raise KeyboardInterrupt

    server.die()
    fleet.engines[0].fail(ServerDied("gone"))
    with monkeypatch.context() as waiting:
        waiting.setattr(Future, "exception", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fleet.start()
    began = time.monotonic()
    fleet.stop()
    assert stopped.is_set() and time.monotonic() - began < LIMIT_S / 2
