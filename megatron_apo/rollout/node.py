"""A node's engines: started, watched and ended as the driver says (`registry.py`), and gone with this process.

    with NodeEngines(recipe, address, secret, room=2, patience_s=60) as node:
        node.join()
        node.follow()               returns when the job is over; or, in a process that does more than that:
        node.follow_beside()        returns at once

What a node must have in common with the trainer is said as it joins: versions of what weights pass through, and the
settings of engines.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

from megatron_apo.config import Recipe, fields_marked
from megatron_apo.rollout.server import VLLMServer, engine_gpus, log_file
from megatron_apo.runtime.ending import request
from megatron_apo.runtime.hosts import names_loopback, route
from megatron_apo.runtime.job import SECRET, log_path
from megatron_apo.runtime.signals import RANK_LOST

BEAT_EVERY_S = 0.5
_ANSWER_S = 5.0  # how long the driver may take over an answer
_VERSIONS = """
import importlib.metadata, json
found = {}
for one in importlib.metadata.distributions():
    name = (one.metadata["Name"] or "").lower().replace("_", "-")
    if name in ("torch", "megatron-apo") or name.startswith("nvidia-nccl-cu"):
        found["nccl" if "nccl" in name else name] = one.version.partition("+")[0]
print(json.dumps(found))
"""


class JoinRefused(ValueError):
    """The driver does not take this node."""


class DriverLost(RuntimeError):
    """The driver does not answer."""

    exit_code = RANK_LOST


def versions(python: str | None = None) -> dict[str, str]:
    """Of torch, NCCL and this package in an interpreter (none: this one). Imports none of them."""
    command = [python or sys.executable, "-c", _VERSIONS]
    try:
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise ValueError(f"rollout.python: {command[0]} cannot say which torch it has: {error}") from None


def engine_settings(recipe: Recipe) -> dict[str, Any]:
    """What the engines of a run are started with, wherever they are, by key of the recipe. How many workers share the
    work is each node's to say."""
    free = {key for key, mark in fields_marked("resume").items() if mark == "may change"} | {"rollout.tp", "rollout.ep"}
    rollout = recipe.rollout.model_dump(mode="json")
    found = {f"rollout.{key}": value for key, value in rollout.items() if f"rollout.{key}" not in free}
    config = (recipe.model.path / "config.json").read_bytes()
    return found | {
        "data.max_prompt_tokens + sampling.max_response_tokens": recipe.max_sequence_tokens,
        "sha256 of config.json in model.path": hashlib.sha256(config).hexdigest()[:16],
    }


@dataclass
class _Engine:
    """One engine of this node. start: which of its starts this is, as the driver counts them."""

    server: VLLMServer
    start: int = 0
    state: str = "none"
    text: str = ""
    thread: threading.Thread | None = None  # in which it is started or ended
    interruption: threading.Thread | None = None

    def told(self) -> dict[str, Any]:
        if self.state == "up" and not self.server.alive():
            self.state, self.text = "ended", self.server.log_tail()
        is_up = self.state == "up"
        return {
            "start": self.start,
            "state": self.state,
            "url": self.server.url if is_up else "",
            "token": self.server.token if is_up else "",
            "text": self.text,
        }


class NodeEngines(AbstractContextManager["NodeEngines"]):
    """As a context manager it ends what it has started.

    address: HOST:PORT of the driver. room: how many engines this node can have. numbers: of the engines that are its
    own (none: those that the driver gives it). patience_s: how long the driver may be silent.
    """

    def __init__(
        self,
        recipe: Recipe,
        address: str,
        secret: str,
        *,
        room: int,
        patience_s: float,
        numbers: Sequence[int] | None = None,
    ):
        self._recipe = recipe
        self._address = address
        self._secret = secret
        self._room = room
        self._numbers = numbers
        self._patience_s = patience_s
        self._engines: dict[int, _Engine] = {}
        self._node = -1  # what the driver calls this node
        self._following: threading.Thread | None = None
        self._stopping = threading.Event()
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy must see the secret

    def follow(self) -> int:
        """Do as the driver says until the job is over; returns its exit code, 0 where this was stopped here. A node
        that it has given up joins anew, without engines. Raises JoinRefused where it is not taken, DriverLost when the
        driver has been silent for `patience_s`."""
        heard_s = time.monotonic()
        while not self._stopping.wait(BEAT_EVERY_S):
            told = {number: engine.told() for number, engine in self._engines.items()}
            try:
                asked = {"asked": [request.why, request.left_s]} if request.why is not None else {}
                answer = self._ask("/beat", {"node": self._node, "engines": told} | asked)
                heard_s = time.monotonic()
            except JoinRefused as refusal:
                self._node = -1
                self._end_engines()
                print(f"{refusal}; joining again", flush=True)
                self.join()
                continue
            except OSError as error:
                if time.monotonic() - heard_s > self._patience_s:
                    self._node = -1
                    raise DriverLost(self._silence(error)) from None
                continue
            if answer["is_over"]:
                return answer["exit_code"]
            for number, start in answer["starts"].items():
                if not self._stopping.is_set():
                    self._bring(int(number), start)
        return 0

    def follow_beside(self) -> None:
        """`follow`, in a thread of a process that does not end with it: the run does, when the driver is gone."""

        def follow() -> None:
            try:
                self.follow()
            except Exception as error:  # whatever it is, the driver finds these engines lost
                print(f"{error}; the engines of this host have ended", file=sys.stderr, flush=True)
                self._leave()

        self._following = threading.Thread(target=follow, name="node", daemon=True)
        self._following.start()

    def stop(self) -> None:
        """From any thread: `follow` returns."""
        self._stopping.set()

    def __exit__(self, *exception: object) -> None:
        self.stop()
        if self._following is not None:
            self._following.join()
        self._leave()

    def _leave(self) -> None:
        self._end_engines()
        if self._node >= 0:
            with suppress(OSError, JoinRefused):  # it may be gone itself
                self._ask("/beat", {"node": self._node, "engines": {}, "leaves": True})

    def _end_engines(self) -> None:
        for engine in self._engines.values():
            engine.start = 0
            engine.server.stop()
        for engine in self._engines.values():
            while engine.thread is not None and engine.thread.is_alive():
                engine.server.stop()
                engine.thread.join(0.1)
        self._engines.clear()

    def join(self) -> None:
        """Raises JoinRefused, or DriverLost where nobody answers within rollout.start_timeout_s."""
        body = {
            "id": secrets.token_hex(8),
            "name": socket.gethostname(),
            "numbers": self._numbers,
            "room": self._room,
            "versions": versions(self._recipe.rollout.python),
            "settings": engine_settings(self._recipe),
        }
        end = time.monotonic() + self._recipe.rollout.start_timeout_s
        while True:
            try:
                self._node = self._ask("/join", body)["node"]
                return
            except OSError as error:
                if time.monotonic() > end or self._stopping.wait(BEAT_EVERY_S):
                    raise DriverLost(
                        f"the driver at {self._address} has not answered for rollout.start_timeout_s="
                        f"{self._recipe.rollout.start_timeout_s:g} s ({_why(error)}); start the training there, or "
                        "give its address"
                    ) from None

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Raises OSError where the driver cannot be asked, JoinRefused where it refuses."""
        request = urllib.request.Request(
            f"http://{self._address}{path}",
            data=json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self._secret}", "Content-Type": "application/json"},
        )
        try:
            with self._opener.open(request, timeout=min(_ANSWER_S, self._patience_s)) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code >= 500:
                raise ConnectionError(f"status {error.code}") from None
            if error.code == 401:
                raise JoinRefused(
                    f"{SECRET}: the driver at {self._address} has another one; give both the same"
                ) from None
            raise JoinRefused(f"the driver at {self._address} refuses this node: {_text(error)}") from None
        except (http.client.HTTPException, ValueError) as error:
            raise ConnectionError(f"what answers is no driver: {error or type(error).__name__}") from None

    def _silence(self, error: OSError) -> str:
        return (
            f"the driver at {self._address} has been silent for {self._patience_s:g} s ({_why(error)}); its engines "
            "here are ended"
        )

    def _bring(self, number: int, start: int) -> None:
        """Have an engine run as its start number `start`, or not at all for 0."""
        engine = self._engines.get(number)
        if engine is None:
            if not start:
                return
            engine = self._engines[number] = _Engine(self._server(number))
        if engine.start == start or (not start and engine.state in ("none", "failed", "ended")):
            return
        if engine.thread is not None and engine.thread.is_alive():
            if engine.state == "starting" and not (engine.interruption and engine.interruption.is_alive()):
                engine.interruption = threading.Thread(target=engine.server.stop, daemon=True)
                engine.interruption.start()
            return  # and look again at the next beat
        if start:
            engine.start, engine.state, engine.text = start, "starting", ""
        engine.thread = threading.Thread(target=self._start if start else self._end, args=(engine,), daemon=True)
        engine.thread.start()

    def _start(self, engine: _Engine) -> None:
        try:
            engine.server.stop()
            engine.server.start()
            engine.state = "up"
        except Exception as error:  # whatever it is, the driver waits for it
            engine.state, engine.text = "failed", str(error)

    def _end(self, engine: _Engine) -> None:
        engine.server.stop()
        engine.state = "ended"

    def _server(self, number: int) -> VLLMServer:
        recipe, place = self._recipe, len(self._engines)
        host = recipe.rollout.host
        own = route(self._address.rpartition(":")[0].strip("[]"))
        rollout = recipe.rollout.model_copy(
            update={
                "replicas": self._room,
                "host": own if names_loopback(host) else host,
                "advertise_host": recipe.rollout.advertise_host or own,
            }
        )
        return VLLMServer(
            rollout,
            recipe.model.path,
            log_path=log_path(recipe.run.dir, log_file("vllm", number, recipe.rollout.replicas)),
            seed=recipe.run.seed,
            max_model_len=recipe.max_sequence_tokens,
            replica=None if self._room == 1 else place,
            load_format="dummy",
        )


def room_here(recipe: Recipe) -> int:
    """How many engines this machine can have: as many as its GPUs allow; without GPUs one."""
    gpus = engine_gpus(recipe.rollout)
    return gpus // recipe.rollout.tp if gpus else 1


def say_idle_gpus(recipe: Recipe, engines: int) -> None:
    """Name the GPUs of this machine that no engine has."""
    gpus = engine_gpus(recipe.rollout)
    if idle := list(range(engines * recipe.rollout.tp, gpus)):
        names, have = ("GPUs", "have") if len(idle) > 1 else ("GPU", "has")
        print(
            f"{socket.gethostname()}: {names} {', '.join(map(str, idle))} of {gpus} {have} no engine: {engines} of "
            f"rollout.tp={recipe.rollout.tp}",
            flush=True,
        )


def _why(error: OSError) -> str:
    return str(getattr(error, "reason", error))


def _text(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error))
    except ValueError:
        return f"status {error.code}"
