"""A handle to one vLLM engine: a server that is started here, or one that runs elsewhere and is known by its address.

What an engine may be asked depends on its state. It serves requests when it holds the policy's weights and, once it was
started anew, when that is proven (`proof.py`). Whoever meets an error of an engine tells it (`fail`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from megatron_apo.rollout.client import RolloutClient
from megatron_apo.rollout.server import ServerDied

Answer = TypeVar("Answer")


class State(Enum):
    DOWN = "not started, or dead"
    UNUSABLE = "a weight update raised in it: it is outside vLLM's protocol and between two versions, and is restarted"
    STARTED = "it answers, and holds weights that are not the policy's"
    UNPROVEN = "it was given the policy's weights after a restart, and nobody has looked whether it has them"
    SERVING = "it may be asked for responses"


@dataclass(frozen=True)
class Address:
    """A server that somebody else started. `payload_dir`: what its workers and the trainer share; `cache_probe_tokens`:
    see `VLLMServer` (0: nobody looks whether its prefix cache is of older weights)."""

    url: str
    token: str
    payload_dir: Path
    cache_probe_tokens: int = 0
    pid: int | None = None
    can_start: bool = False  # it is joined once, and is its owner's to start again

    @property
    def is_gone(self) -> bool:
        """For good, whatever still answers."""
        return not self.payload_dir.exists()

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def log_tail(self) -> str:
        return ""


class Server(Protocol):
    """What an engine needs of its server: `VLLMServer`, `Address`, or `registry.RemoteServer`."""

    url: str
    token: str

    @property
    def payload_dir(self) -> Path: ...
    @property
    def cache_probe_tokens(self) -> int: ...
    @property
    def pid(self) -> int | None: ...
    @property
    def is_gone(self) -> bool: ...
    @property
    def can_start(self) -> bool: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def log_tail(self) -> str: ...


class Engine:
    """One engine of a fleet. `timeout_s` bounds one request.

    version: of the weights it holds; None: others than the policy's, or not whole. num_workers: its processes that load
    weights, 0 until it was asked. failure: what it failed with last.
    """

    def __init__(self, server: Server, *, number: int = 0, timeout_s: float = 3600):
        self.server = server
        self.number = number
        self._timeout_s = timeout_s
        self._client: RolloutClient | None = None
        self.state = State.DOWN
        self.version: int | None = None
        self.num_workers = 0
        self.num_starts = 0
        self.places: list[dict[str, Any]] = []  # of its workers, for a transport that asks
        self.needs_proof = False
        self.failure: Exception | None = None

    def start(self) -> None:
        """Start the server, or start it again. Returns when it answers; raises ServerError when it does not."""
        self.stop()
        self.server.start()
        self._client = RolloutClient(self.server.url, self.server.token, timeout_s=self._timeout_s)
        if self.server.is_gone:  # meanwhile, when there was nobody yet to tell (`lose`)
            self.stop()
            raise ServerDied("it is gone as soon as it answered")
        self.state = State.STARTED
        self.needs_proof = self.failure is not None
        self.version, self.num_workers = None, 0
        self.num_starts += 1

    def stop(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        self.server.stop()
        self.state = State.DOWN

    def connect(self, init_info: dict[str, Any]) -> None:
        """Introduce the trainer to vLLM's weight transfer (`WeightSync.init_info`)."""
        self.client.init_weight_transfer_engine(init_info)
        self.num_workers = self.client.num_workers()
        if init_info["transport"] == "ipc":
            self.places = self.client.worker_places()

    @property
    def client(self) -> RolloutClient:
        assert self._client is not None, "the engine is not started"
        return self._client

    @property
    def payload_dir(self) -> Path:
        """A folder that its workers and the trainer share; removed with the server."""
        return self.server.payload_dir

    @property
    def host(self) -> str:
        """By which name or address it is reached."""
        return urlsplit(self.server.url).hostname or ""

    @property
    def is_gone(self) -> bool:
        """Its server has ended, as far as is known here."""
        return self.server.is_gone

    @property
    def can_start(self) -> bool:
        """Also again, once it has failed."""
        return self.failure is None or self.server.can_start

    @property
    def answers(self) -> bool:
        return self.state not in (State.DOWN, State.UNUSABLE)

    @property
    def pid(self) -> int | None:
        """The root of its processes, where they run here."""
        return self.server.pid

    def cached_tokens(self) -> int:
        """How many tokens of a fixed prompt the engine's prefix cache already had. From now on it has them all."""
        length = self.server.cache_probe_tokens
        return self.client.cached_tokens([0] * length) if length else 0

    def holds(self, version: int) -> None:
        """A weight update is complete."""
        self.version = version
        self.state = State.UNPROVEN if self.needs_proof else State.SERVING

    def is_proven(self) -> None:
        """It was seen to hold the policy's weights."""
        self.needs_proof = False
        self.state = State.SERVING

    def lose(self, death: ServerDied) -> None:
        """Its server, or the node that has it, is gone: whoever asks it, or waits for it, hears of that at once."""
        if self._client is not None:
            self._client.abandon(death)

    def fail(self, error: Exception) -> None:
        """It died, or otherwise failed where there is no way on but a restart. All that it was asked is given up."""
        self.failure = error
        self.version = None
        self.state = State.UNUSABLE if self.can_start and not isinstance(error, ServerDied) else State.DOWN
        self.client.abandon(ServerDied(str(error)))

    def log_tail(self) -> str:
        return self.server.log_tail()


def at_once(engines: Sequence[Engine], work: Callable[[Engine], Answer]) -> dict[Engine, Answer | Exception]:
    """Do `work` with all engines at the same time: each one's answer, or the error that it raised."""

    def attempt(engine: Engine) -> Answer | Exception:
        try:
            return work(engine)
        except Exception as error:  # told by engine
            return error

    if len(engines) <= 1:
        return {engine: attempt(engine) for engine in engines}
    with ThreadPoolExecutor(len(engines), "engine") as threads:
        return dict(zip(engines, threads.map(attempt, engines), strict=True))
