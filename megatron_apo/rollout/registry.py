"""Engines on other nodes, as the driver sees them: nodes join by HTTP, say how their engines are, and are told which of
them to start and to stop.

    with Registry(address, port, secret, versions, settings, patience_s) as registry:
        server = registry.server(number)     # stands in an `Engine` where a VLLMServer would
        server.start()                       # on whichever node has joined with room for it

Every request carries the job's secret. A node asks twice a second (`node.py`); one that does not for `patience_s` is
lost, and its engines with it.

    POST /join {"id", "name", "numbers": [of engines] or null, "room", "versions", "settings"} -> {"node"}; 409: why not
               The same id is the same node, which may have missed the answer.
    POST /beat {"node", "engines": {number: {"start", "state", "url", "token", "text"}}}
               -> {"starts": {number: start}, "is_over": whether the job has ended, "exit_code": with which code}
               {"node", "engines": {}, "leaves": true}: its engines have ended, and it asks no more
               {..., "asked": [why, left_s]}: the node was asked to end the run early (`runtime/ending.py`)

`start` counts the starts of an engine, 0 for none: the node starts it anew when its number rises, and ends it at 0.
"""

from __future__ import annotations

import asyncio
import hmac
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from aiohttp import web

from megatron_apo.rollout.server import ServerDied, ServerError
from megatron_apo.runtime.ending import EndedEarly, request
from megatron_apo.runtime.signals import ENDED_EARLY, RANK_LOST

_LOOK_EVERY_S = 0.25
_FAREWELL_S = 15.0  # a node that does not hear that the job is over waits for much longer


@dataclass
class _Node:
    """A node that has joined. room: engines that can still be given to it; one that is lost gets no other."""

    id: str
    name: str
    room: int
    beat_s: float
    numbers: Sequence[int] | None = None  # of the engines that are its own; None: any
    is_lost: bool = False

    def takes(self, server: RemoteServer) -> bool:
        return not self.is_lost and self.room > 0 and (self.numbers is None or server.number in self.numbers)


@dataclass
class _Report:
    """What a node says of an engine."""

    start: int = 0
    state: str = "none"  # "starting", "up", "failed", "ended"
    url: str = ""
    token: str = field(default="", repr=False)
    text: str = ""  # why it failed or ended, and the end of its log


class RemoteServer:
    """An engine's server on another node. What `VLLMServer` is to one that is started here."""

    payload_dir = Path("/nonexistent")  # nothing is shared with it
    pid = None

    def __init__(self, registry: Registry, number: int, start_timeout_s: float, cache_probe_tokens: int):
        self._registry = registry
        self._start_timeout_s = start_timeout_s
        self.number = number
        self.cache_probe_tokens = cache_probe_tokens
        self.url = self.token = ""
        self.on_death: Callable[[ServerDied], None] = lambda death: None
        self.node: int | None = None
        self.start_number = 0  # of the present start; 0: it is not to run
        self.num_starts = 0
        self.report = _Report()

    def start(self) -> None:
        """Have it started, and wait until it answers. Raises ServerError, with the end of its log if there is one."""
        self.num_starts += 1
        self.report = _Report()
        self.start_number = self.num_starts
        end = time.monotonic() + self._start_timeout_s + self._registry.patience_s
        node = None
        while self.start_number:
            node, report = self._registry.claim(self), self.report
            if report.start == self.start_number and report.state == "up":
                self.url, self.token = report.url, report.token
                return
            if report.start == self.start_number and report.state in ("failed", "ended"):
                self.start_number = 0
                raise ServerError(f"engine {self.number} on {self.where}: {report.text}")
            if time.monotonic() > end:
                self.start_number = 0
                limit = f"(rollout.start_timeout_s={self._start_timeout_s:g})"
                if node is None:
                    raise ServerError(
                        f"no node has joined that has room for engine {self.number} {limit}; start `megatron-apo serve "
                        f"-r RECIPE --driver {self._registry.address}:{self._registry.port}` on one"
                    )
                raise ServerError(f"engine {self.number} on {self.where} did not answer {limit}")
            time.sleep(_LOOK_EVERY_S)
        if node is not None and node.is_lost:
            raise ServerError(f"{node.name} was lost while engine {self.number} started on it")
        raise ServerError(f"engine {self.number} was stopped while it started")

    def stop(self) -> None:
        """Have it ended, and wait until it is, as long as its node can be asked. From any thread."""
        was, self.start_number = self.start_number, 0
        end = time.monotonic() + self._registry.patience_s
        while was and self._registry.node_of(self) is not None and self.report.state not in ("failed", "ended"):
            if time.monotonic() > end or self._registry.is_over:
                break
            time.sleep(0.05)

    @property
    def where(self) -> str:
        return self._registry.name_of(self.node)

    @property
    def is_gone(self) -> bool:
        report = self.report
        is_up = report.state == "up" and report.start == self.start_number
        return not is_up or self._registry.node_of(self) is None

    @property
    def can_start(self) -> bool:
        """Whether there is a node that it could be started on."""
        return self._registry.has_room(self)

    def log_tail(self) -> str:
        return self.report.text


@dataclass
class Registry(AbstractContextManager["Registry"]):
    """As a context manager it listens, and at the end tells the nodes that the job is over.

    address, port: where it listens (0: a free port, which is then `port`). versions: what both sides must have alike,
    by name. settings: what the engines must be started with, by key of the recipe. patience_s: how long a node may be
    silent. Raises OSError where it cannot listen.
    """

    address: str
    port: int
    secret: str = field(repr=False)
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    patience_s: float
    servers: list[RemoteServer] = field(default_factory=list)
    _nodes: dict[int, _Node] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    is_over: bool = False
    exit_code: int = 0  # of the job that is over
    _last_told: set[int] = field(default_factory=set)

    def server(self, number: int, start_timeout_s: float, cache_probe_tokens: int = 0) -> RemoteServer:
        made = RemoteServer(self, number, start_timeout_s, cache_probe_tokens)
        self.servers.append(made)
        return made

    def __enter__(self) -> Registry:
        self._loop = asyncio.new_event_loop()
        started: list[BaseException | None] = []
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started, ready), name="registry", daemon=True)
        self._thread.start()
        ready.wait()
        if started[0] is not None:
            raise started[0]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if error is not None:
            self.exit_code = ENDED_EARLY if isinstance(error, EndedEarly) else RANK_LOST
        self.is_over = True
        end = time.monotonic() + _FAREWELL_S
        while time.monotonic() < end and self._living() - self._last_told:
            time.sleep(0.02)
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    # --- what servers ask

    def node_of(self, server: RemoteServer) -> _Node | None:
        """The living node that has it."""
        node = self._nodes.get(server.node) if server.node is not None else None
        return None if node is None or node.is_lost else node

    def name_of(self, node: int | None) -> str:
        return self._nodes[node].name if node in self._nodes else "no node"

    def has_room(self, server: RemoteServer) -> bool:
        with self._lock:
            return self.node_of(server) is not None or any(node.takes(server) for node in self._nodes.values())

    def claim(self, server: RemoteServer) -> _Node | None:
        """The living node that has it, now or from now on."""
        with self._lock:
            if (node := self.node_of(server)) is not None:
                return node
            for number, node in self._nodes.items():
                if node.takes(server):
                    server.node, node.room = number, node.room - 1
                    return node
            return None

    # --- what nodes ask

    def _join(self, body: Mapping[str, Any]) -> dict[str, Any] | str:
        """The answer, or why there is none."""
        if problem := self._difference(body):
            return problem
        with self._lock:
            for number, known in self._nodes.items():
                if known.id == body["id"] and not known.is_lost:
                    known.beat_s = time.monotonic()
                    return {"node": number}
            number = len(self._nodes)
            node = _Node(body["id"], body["name"], int(body["room"]), time.monotonic(), body["numbers"])
            self._nodes[number] = node
            for server in self.servers:
                self.claim(server)
            given = [server.number for server in self.servers if server.node == number]
        print(f"{node.name} has joined: {_engines(given)}", flush=True)
        return {"node": number}

    def _difference(self, body: Mapping[str, Any]) -> str:
        """What keeps a node from joining, one line."""
        if problem := version_problem(self.versions, body["versions"], body["name"]):
            return problem
        for key, value in self.settings.items():
            if body["settings"].get(key) != value:
                return (
                    f"{key}: {value} in the trainer's recipe, {body['settings'].get(key)} in that of {body['name']}; "
                    "give both the same recipe"
                )
        return ""

    def _beat(self, body: Mapping[str, Any]) -> dict[str, Any] | str:
        with self._lock:
            node = self._nodes.get(body["node"])
            if node is None or node.is_lost:
                return "it was silent for too long, and its engines are given up; start it again"
            node.beat_s = time.monotonic()
            for server in self.servers:
                if server.node == body["node"] and (told := body["engines"].get(str(server.number))):
                    self._hear(server, _Report(**told))
            own = [server for server in self.servers if server.node == body["node"]]
            if asked := body.get("asked"):
                request.ask(f"{node.name}: {asked[0]}", float(asked[1]))
            if body.get("leaves"):
                self._lose(body["node"], f"{node.name} has left")
        if self.is_over:
            self._last_told.add(body["node"])
            return {"starts": {}, "is_over": True, "exit_code": self.exit_code}
        return {"starts": {server.number: server.start_number for server in own}, "is_over": False}

    def _hear(self, server: RemoteServer, report: _Report) -> None:
        before, server.report = server.report, report
        if (before.state, report.state) == ("up", "ended") and report.start == server.start_number:
            with suppress(RuntimeError):  # it is stopped at this moment
                server.on_death(ServerDied(f"engine {server.number} on {server.where} has ended"))

    # --- its thread

    def _serve(self, started: list[BaseException | None], ready: threading.Event) -> None:
        loop = self._loop
        asyncio.set_event_loop(loop)
        app = web.Application(middlewares=[self._check_secret])
        app.router.add_post("/join", self._handler(self._join))
        app.router.add_post("/beat", self._handler(self._beat))
        runner = web.AppRunner(app, access_log=None)
        try:
            loop.run_until_complete(runner.setup())
            loop.run_until_complete(web.TCPSite(runner, self.address, self.port).start())
            self.port = runner.addresses[0][1]
            started.append(None)
        except BaseException as error:
            started.append(error)
            return
        finally:
            ready.set()
        watch = loop.create_task(self._watch())
        loop.run_forever()
        watch.cancel()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    def _handler(self, answer: Callable[[Mapping[str, Any]], dict[str, Any] | str]):
        async def handle(request: web.Request) -> web.Response:
            found = answer(await request.json())
            return web.json_response(found, status=409 if isinstance(found, str) else 200)

        return handle

    @web.middleware
    async def _check_secret(self, request: web.Request, handler: Any) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if not hmac.compare_digest(given, f"Bearer {self.secret}".encode()):
            return web.json_response("missing or wrong secret", status=401)
        return await handler(request)

    async def _watch(self) -> None:
        """Engines of a node that is silent are lost."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(_LOOK_EVERY_S)
            now = time.monotonic()
            if (late_s := now - before - _LOOK_EVERY_S) > _LOOK_EVERY_S:  # it was this process that was silent
                for node in self._nodes.values():
                    node.beat_s += late_s
            for number, node in list(self._nodes.items()):
                silent_s = now - node.beat_s
                if not node.is_lost and silent_s > self.patience_s:
                    self._lose(number, f"{node.name} has been silent for {silent_s:.1f} s (sync.timeout_s)")

    def _lose(self, number: int, why: str) -> None:
        self._nodes[number].is_lost = True
        for server in self.servers:
            if server.node == number and server.start_number:
                with suppress(RuntimeError):  # it is stopped at this moment
                    server.on_death(ServerDied(why))
            if server.node == number:  # what it is on next starts it when it is told to
                server.start_number, server.report = 0, _Report()

    def _living(self) -> set[int]:
        return {number for number, node in list(self._nodes.items()) if not node.is_lost}


def version_problem(ours: Mapping[str, str], theirs: Mapping[str, str], who: str) -> str:
    """What differs between the trainer's versions and another's, one line; empty if nothing does."""
    for name in sorted({*ours, *theirs}):
        own, other = ours.get(name), theirs.get(name)
        if own is None:
            return f"{name}: the trainer has none, {who} {other}; install {name} {other} for the trainer, or none there"
        if other is None:
            return f"{name}: the trainer has {own}, {who} none; install {name} {own} there, or none for the trainer"
        if own != other:
            return (
                f"{name}: the trainer has {own}, {who} {other}; install {name} {own} there, or {other} for the trainer"
            )
    return ""


def _engines(numbers: Sequence[int]) -> str:
    if not numbers:
        return "there is no engine left to give it (rollout.replicas)"
    return f"engine{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
