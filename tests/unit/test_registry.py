"""Engines of other nodes, over the real HTTP between registry and nodes: they join, start, die, start again and end as
the driver says, and nobody else is heard. Behind each is a counterpart of an engine (`tests/engines.py`)."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_apo
from megatron_apo.config import Recipe, RolloutConfig
from megatron_apo.rollout import node as nodes
from megatron_apo.rollout import registry as registries
from megatron_apo.rollout.engine import Engine, State
from megatron_apo.rollout.fleet import Fleet, RequestQueue
from megatron_apo.rollout.node import DriverLost, JoinRefused, NodeEngines, engine_settings, versions
from megatron_apo.rollout.placement import Placement, transport_of
from megatron_apo.rollout.registry import Registry, version_problem
from megatron_apo.rollout.server import ServerDied, ServerError
from megatron_apo.runtime.ending import EndedEarly, Request
from tests.engines import LIMIT_S, Server, requests, until
from tests.runs import write_run

SECRET = "the job's"


class NodeServer(Server):
    """As a `VLLMServer` is watched by its node."""

    def alive(self) -> bool:
        return self._loop is not None


class FailingServer(NodeServer):
    def start(self) -> None:
        raise ServerError("vLLM ended with status 1 at its start")


class SlowServer(NodeServer):
    """Neither starts nor stops before it is let."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.goes_on, self.is_starting = threading.Event(), False

    def start(self) -> None:
        self.is_starting = True
        assert self.goes_on.wait(LIMIT_S)
        raise ServerError("it was stopped")

    def stop(self) -> None:
        if self.is_starting:
            assert self.goes_on.wait(LIMIT_S)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return write_run(tmp_path, "rollout.start_timeout_s=20")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as found:
        yield found


@pytest.fixture
def registry(recipe: Recipe, stack: ExitStack) -> Registry:
    made = Registry("127.0.0.1", 0, SECRET, versions(), engine_settings(recipe), patience_s=1.5)
    return stack.enter_context(made)


class Node:
    """A node whose engines are counterparts, in threads of this process."""

    def __init__(
        self, recipe: Recipe, registry: Registry, stack: ExitStack, kind: type[Server] = NodeServer, **options
    ):
        self.servers: dict[int, Server] = {}
        self.ended: list[Exception | int] = []  # its exit code, or what it failed with
        self.engines = NodeEngines(
            recipe, f"{registry.address}:{registry.port}", SECRET, **{"room": 1, "patience_s": 1.5} | options
        )

        def server(number: int) -> Server:
            folder = Path(tempfile.mkdtemp(dir=recipe.run.dir.parent))
            return self.servers.setdefault(number, kind(folder))

        self.engines._server = server  # type: ignore[method-assign, assignment]
        stack.enter_context(self.engines)
        self.engines.join()
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def _follow(self) -> None:
        try:
            self.ended.append(self.engines.follow())
        except (DriverLost, JoinRefused) as error:
            self.ended.append(error)


@pytest.fixture
def make_node(recipe: Recipe, registry: Registry, stack: ExitStack, monkeypatch) -> Callable[..., Node]:
    monkeypatch.setattr(nodes, "BEAT_EVERY_S", 0.05)
    return lambda **options: Node(recipe, registry, stack, **options)


def fleet_of(registry: Registry, stack: ExitStack, count: int, start_timeout_s: float = 10.0) -> Fleet:
    engines = [
        Engine(registry.server(number, start_timeout_s), number=number, timeout_s=LIMIT_S) for number in range(count)
    ]
    for engine in engines:
        engine.server.on_death = engine.lose  # type: ignore[union-attr]
    fleet = Fleet(engines, window=2)
    stack.callback(fleet.stop)
    return fleet


def serve(fleet: Fleet) -> None:
    """Start what is down, and let all that answer serve."""
    fleet.start()
    fleet.serve_own_weights()


def ask(fleet: Fleet, count: int = 4) -> RequestQueue:
    queue = RequestQueue(requests(count))
    fleet.generate(queue, lambda index, completion: None)
    return queue


def test_engines_of_two_nodes_are_a_fleet(registry: Registry, stack: ExitStack, make_node) -> None:
    """Those that are asked before a node has joined wait for one; the job's end ends the nodes'."""
    fleet = fleet_of(registry, stack, 3)
    starting = threading.Thread(target=fleet.start)
    starting.start()
    time.sleep(0.3)
    first, second = make_node(room=2), make_node()
    starting.join(LIMIT_S)
    fleet.serve_own_weights()
    assert (sorted(first.servers), sorted(second.servers)) == ([0, 1], [2])
    assert sorted(ask(fleet, 9).answered_by) == [0, 1, 2]
    fleet.stop()
    until(lambda: not any(server.alive() for server in (*first.servers.values(), *second.servers.values())))
    stack.close()
    until(lambda: first.ended == second.ended == [0])


def test_an_engine_that_dies_is_known_at_once_and_started_again(
    registry: Registry, stack: ExitStack, make_node
) -> None:
    fleet = fleet_of(registry, stack, 2)
    node = make_node(room=2)
    serve(fleet)
    fleet.may_start = True
    node.servers[0].held = True  # so that what is asked of it waits
    threading.Timer(0.3, node.servers[0].die).start()
    node.servers[0].delay_s = LIMIT_S
    queue = ask(fleet, 6)
    assert len(queue.answers) == 6
    assert fleet.engines[0].state is State.DOWN
    node.servers[0].held, node.servers[0].delay_s = False, 0.0
    fleet.finish_starts()
    assert fleet.engines[0].state is State.STARTED and node.servers[0].num_starts == 2


def test_a_node_that_is_silent_is_lost_and_another_takes_its_place(
    registry: Registry, stack: ExitStack, make_node
) -> None:
    fleet = fleet_of(registry, stack, 1)
    silent = make_node()
    serve(fleet)
    silent.engines.stop()  # it says no more; its engine would answer
    since = time.monotonic()
    until(lambda: fleet.engines[0].server.is_gone)
    assert time.monotonic() - since < 2.5
    with pytest.raises(ServerDied, match=r"has been silent for 1\.\d s"):
        ask(fleet)
    assert not fleet.engines[0].can_start
    other = make_node()
    assert fleet.engines[0].can_start
    serve(fleet)
    assert len(ask(fleet).answers) == 4 and list(other.servers) == [0]


def test_a_node_with_room_takes_over_what_is_lost(registry: Registry, stack: ExitStack, make_node) -> None:
    """Though it joined when nothing was to be had."""
    fleet = fleet_of(registry, stack, 1)
    first, spare = make_node(), make_node()
    serve(fleet)
    first.engines.__exit__(None, None, None)
    with pytest.raises(ServerDied, match="has left"):
        ask(fleet)
    assert fleet.engines[0].can_start
    serve(fleet)
    assert len(ask(fleet).answers) == 4 and list(spare.servers) == [0]


def test_a_node_that_leaves_is_missed_at_once(registry: Registry, stack: ExitStack, make_node) -> None:
    fleet = fleet_of(registry, stack, 1)
    node = make_node()
    serve(fleet)
    node.engines.__exit__(None, None, None)
    assert not node.servers[0].alive() and fleet.engines[0].server.is_gone
    with pytest.raises(ServerDied, match="has left"):
        ask(fleet)
    since = time.monotonic()
    fleet.stop()
    assert time.monotonic() - since < 1


def test_a_node_that_was_given_up_joins_again(registry: Registry, stack: ExitStack, make_node, capfd) -> None:
    fleet = fleet_of(registry, stack, 1)
    node = make_node()
    fleet.start()
    registry._lose(0, "it was silent")
    until(lambda: 1 in registry._nodes)
    assert not node.servers[0].alive() and not node.ended
    fleet.engines[0].fail(ServerDied("it was silent"))
    assert "refuses this node: it was silent for too long" in capfd.readouterr().out
    fleet.start()
    assert node.servers[0].alive()


def test_the_driver_that_is_gone_ends_the_nodes(
    recipe: Recipe, make_node, registry: Registry, stack: ExitStack
) -> None:
    fleet = fleet_of(registry, stack, 1)
    node = make_node()
    fleet.start()
    registry._loop.call_soon_threadsafe(registry._loop.stop)  # as after SIGKILL
    until(lambda: node.ended)
    assert isinstance(node.ended[0], DriverLost) and "silent for 1.5 s" in str(node.ended[0])
    assert node.ended[0].exit_code == 76


def test_who_has_another_secret_version_or_setting_is_refused_in_a_line(
    recipe: Recipe, registry: Registry, stack: ExitStack, make_node, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.server(0, 1.0)
    address = f"{registry.address}:{registry.port}"
    stranger = NodeEngines(recipe, address, "a stranger's", room=1, patience_s=1.5)
    expected = f"^MEGATRON_APO_SECRET: the driver at {address} has another one; give both"
    with pytest.raises(JoinRefused, match=expected) as refusal:
        stranger.join()
    assert "a stranger's" not in str(refusal.value)
    almost = [SECRET[0], SECRET[:-1], SECRET[:-1] + "x", SECRET + "s"]
    for path in ("/join", "/beat", "/"):
        for headers in ({}, *({"Authorization": f"Bearer {given}"} for given in ("", "a stranger's", *almost))):
            request = urllib.request.Request(f"http://{address}{path}", b"{}", headers)
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request, timeout=5)
            assert caught.value.code == 401 and json.load(caught.value) == "missing or wrong secret"
    own = versions()
    monkeypatch.setattr(nodes, "versions", lambda python: own | {"torch": "2.12.0"})
    expected = (
        f"torch: the trainer has {own['torch']}, .* 2.12.0; install torch {own['torch']} there, or 2.12.0 for the"
    )
    with pytest.raises(JoinRefused, match=expected):
        make_node()
    monkeypatch.setattr(nodes, "versions", lambda python: own)
    other = recipe.model_copy(update={"rollout": RolloutConfig(dtype="bfloat16")})
    with pytest.raises(
        JoinRefused, match=r"rollout.dtype: float32 in the trainer's recipe, bfloat16 in that of .*; give"
    ):
        NodeEngines(other, address, SECRET, room=1, patience_s=1.5).join()
    assert not registry._nodes


def test_the_registry_listens_on_its_address_alone(registry: Registry) -> None:
    socket.create_connection((registry.address, registry.port), timeout=2).close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", registry.port), timeout=2).close()


def test_no_proxy_sees_the_secret(
    recipe: Recipe, registry: Registry, make_node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.rollout.start_timeout_s = 2.0
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        make_node()
        assert len(registry._nodes) == 1
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_nobody_there_is_said_within_the_limit(recipe: Recipe, registry: Registry, stack: ExitStack) -> None:
    recipe.rollout.start_timeout_s = 0.5
    with pytest.raises(
        DriverLost, match="the driver at 127.0.0.1:9 has not answered for rollout.start_timeout_s=0.5 s"
    ):
        NodeEngines(recipe, "127.0.0.1:9", SECRET, room=1, patience_s=1.5).join()
    fleet = fleet_of(registry, stack, 1, start_timeout_s=0.2)
    with pytest.raises(
        ServerError, match=r"no node has joined that has room for engine 0 .*; start `megatron-apo serve"
    ):
        fleet.start()


def test_a_node_that_is_lost_while_its_engine_starts_is_not_waited_for(
    registry: Registry, stack: ExitStack, make_node
) -> None:
    """And another, which it joins as later, starts nothing that it is not told to."""
    fleet = fleet_of(registry, stack, 1, start_timeout_s=LIMIT_S)
    node = make_node(kind=SlowServer)
    outcome: list[Exception] = []

    def start() -> None:
        try:
            fleet.start()
        except ServerError as error:
            outcome.append(error)

    starting = threading.Thread(target=start)
    starting.start()
    until(lambda: node.servers and node.servers[0].is_starting)  # type: ignore[attr-defined]
    node.engines.stop()
    since = time.monotonic()
    starting.join(LIMIT_S)
    assert time.monotonic() - since < 3 and "was lost while engine 0 started on it" in str(outcome[0])
    assert fleet.engines[0].server.is_gone
    other = make_node()
    time.sleep(0.3)
    assert not other.servers
    node.servers[0].goes_on.set()  # type: ignore[attr-defined]


def test_a_node_beats_while_it_stops_an_engine(registry: Registry, stack: ExitStack, make_node) -> None:
    """Which takes longer than the driver would wait for a beat."""
    fleet = fleet_of(registry, stack, 1)
    node = make_node(kind=SlowServer)
    starting = threading.Thread(target=lambda: pytest.raises(ServerError, fleet.start))
    starting.start()
    until(lambda: node.servers and node.servers[0].is_starting)  # type: ignore[attr-defined]
    fleet.engines[0].server.stop()
    time.sleep(2 * registry.patience_s)
    assert not registry._nodes[0].is_lost
    node.servers[0].goes_on.set()  # type: ignore[attr-defined]
    starting.join(LIMIT_S)


def test_a_driver_that_was_asleep_does_not_take_the_nodes_for_silent(
    registry: Registry, stack: ExitStack, make_node
) -> None:
    make_node()
    registry._loop.call_soon_threadsafe(time.sleep, 2 * registry.patience_s)
    time.sleep(2 * registry.patience_s + 1)
    assert not registry._nodes[0].is_lost


@pytest.mark.parametrize(("error", "code"), [(None, 0), (EndedEarly("asked"), 75), (RuntimeError("no"), 76)])
def test_a_node_ends_with_the_job_and_hears_how(
    error: Exception | None, code: int, recipe: Recipe, registry: Registry, make_node
) -> None:
    node = make_node()
    registry.__exit__(type(error) if error else None, error, None)
    until(lambda: node.ended)
    assert node.ended == [code]


@pytest.fixture
def driver_and_node(monkeypatch: pytest.MonkeyPatch) -> tuple[Request, Request]:
    """A request of each. Asked for first, so that they are taken back when nobody beats any more."""
    both = Request(), Request()
    for module, request in zip((registries, nodes), both, strict=True):
        monkeypatch.setattr(module, "request", request)
    return both


def test_a_node_that_is_asked_to_end_the_run_tells_the_driver(
    driver_and_node: tuple[Request, Request], registry: Registry, make_node
) -> None:
    driver, asked = driver_and_node
    node = make_node()
    asked.ask("SIGUSR1", 30)
    until(lambda: driver.why is not None)
    assert driver.why == f"{socket.gethostname()}: SIGUSR1" and 25 < driver.left_s <= 30 and not node.ended


def test_a_node_that_missed_the_answer_joins_once(recipe: Recipe, registry: Registry) -> None:
    body = {"id": "x", "name": "h", "room": 1, "numbers": None, "versions": versions()}
    body["settings"] = engine_settings(recipe)
    registry.server(0, 1.0)
    assert registry._join(body) == registry._join(body) == {"node": 0}
    assert registry._join(body | {"id": "y"}) == {"node": 1}


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        ({"torch": "2.11.0", "nccl": "2.27"}, ""),
        ({"torch": "2.11.0"}, "nccl: the trainer has 2.27, h1 none; install nccl 2.27 there, or none for the trainer"),
        (
            {"torch": "2.11.0", "nccl": "2.27", "x": "1"},
            "x: the trainer has none, h1 1; install x 1 for the trainer, or none there",
        ),
        (
            {"torch": "2.10.0", "nccl": "2.27"},
            "torch: the trainer has 2.11.0, h1 2.10.0; install torch 2.11.0 there, or 2.10.0 for the trainer",
        ),
        (
            {"torch": "2.11.1", "nccl": "2.27"},
            "torch: the trainer has 2.11.0, h1 2.11.1; install torch 2.11.0 there, or 2.11.1 for the trainer",
        ),
        (
            {"torch": "2.11.0", "nccl": "2.27.3"},
            "nccl: the trainer has 2.27, h1 2.27.3; install nccl 2.27 there, or 2.27.3 for the trainer",
        ),
    ],
)
def test_versions_are_compared_both_ways(theirs: dict[str, str], expected: str) -> None:
    assert version_problem({"torch": "2.11.0", "nccl": "2.27"}, theirs, "h1") == expected


def test_versions_are_of_what_weights_pass_through() -> None:
    found = versions()
    own = {"torch": torch.__version__.partition("+")[0], "megatron-apo": megatron_apo.__version__}
    assert own.items() <= found.items() <= (own | {"nccl": found.get("nccl")}).items()


@pytest.mark.parametrize(
    ("host", "given"),
    [("127.0.0.1", "own"), ("localhost", "own"), ("0.0.0.0", "0.0.0.0"), ("somewhere.invalid", "somewhere.invalid")],
)
def test_engines_of_a_node_listen_where_the_driver_reaches_them(
    recipe: Recipe, host: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "route", {"192.0.2.1": "10.0.0.7"}.get)
    recipe.rollout.host = host
    made = NodeEngines(recipe, "192.0.2.1:9", SECRET, room=1, patience_s=1.5)._server(0).rollout
    assert (made.host, made.advertise_host) == ("10.0.0.7" if given == "own" else given, "10.0.0.7")


def test_a_start_that_fails_says_why(registry: Registry, stack: ExitStack, make_node) -> None:
    fleet = fleet_of(registry, stack, 1)
    make_node(kind=FailingServer)
    with pytest.raises(ServerError, match="engine 0 on .*: vLLM ended with status 1 at its start"):
        fleet.start()


def test_a_nodes_own_engines_are_given_to_no_other(registry: Registry, stack: ExitStack, make_node) -> None:
    fleet = fleet_of(registry, stack, 2)
    first, second = make_node(numbers=[1]), make_node(numbers=[0])
    fleet.start()
    assert (list(first.servers), list(second.servers)) == ([1], [0])


@pytest.mark.parametrize(
    ("replicas", "hosts", "expected"),
    [
        (1, (), {0: [0]}),
        (3, ("a", "a"), {0: [0, 1, 2]}),
        (4, ("a", "a", "b", "b"), {0: [0, 1], 2: [2, 3]}),
        (5, ("a", "b", "c"), {0: [0, 1], 1: [2, 3], 2: [4]}),
        (1, ("a", "b"), {0: [0], 1: []}),
    ],
)
def test_colocated_engines_are_spread_over_the_hosts(replicas: int, hosts: tuple[str, ...], expected) -> None:
    placement = Placement.of(RolloutConfig(replicas=replicas), hosts)
    assert placement.by_rank == expected
    assert placement.here == expected[0]
    assert sorted(placement.here + placement.elsewhere) == list(range(replicas))


@pytest.mark.parametrize(
    ("settings", "device", "expected"),
    [
        ({}, "cpu", "shm"),
        ({}, "cuda", "shm"),
        ({"hosts": ("a", "b")}, "cpu", "collective"),
        ({"hosts": ("a", "b")}, "cuda", "ipc"),
        ({"hosts": ("a", "b"), "transport": "shm"}, "cpu", "sync.transport: shm, but engines are on other machines"),
        ({"transport": "collective"}, "cpu", "collective"),
        ({"transport": "collective"}, "cuda", "sync.transport: collective, but colocated engines share GPUs"),
        ({"transport": "collective", "placement": "dedicated"}, "cuda", "collective"),
        ({"transport": "ipc"}, "cuda", "ipc"),
        ({"placement": "dedicated"}, "cuda", "collective"),
    ],
)
def test_how_weights_travel(settings: dict[str, Any], device: str, expected: str, recipe: Recipe) -> None:
    recipe.rollout = RolloutConfig(placement=settings.get("placement", "colocated"), replicas=2, driver="a:1")
    recipe.sync.transport = settings.get("transport", "auto")
    placement = Placement.of(recipe.rollout, settings.get("hosts", ("a", "a")))
    if " " not in expected:
        assert transport_of(recipe, placement, on_gpu=device == "cuda") == expected
        return
    with pytest.raises(ValueError, match=expected):
        transport_of(recipe, placement, on_gpu=device == "cuda")


def test_dedicated_engines_are_nobodys() -> None:
    placement = Placement.of(RolloutConfig(replicas=2, placement="dedicated", driver="a:1"), ("a", "b"))
    assert placement.by_rank == {} and placement.elsewhere == [0, 1] and placement.here == []
