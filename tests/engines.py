"""A counterpart of an engine for tests of what is asked of it, when, and what becomes of its death: an HTTP server in
this process that speaks the routes of vLLM that the trainer uses, without a model behind them."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from aiohttp import web

from megatron_apo.rollout.client import GenerateRequest, Sampling, generate_body
from megatron_apo.rollout.engine import Engine
from megatron_apo.rollout.transport.base import TransferError, heard
from megatron_apo.rollout.transport.collective import CollectiveReader
from megatron_apo.rollout.transport.shm import ShmReader
from megatron_apo.weights.digest import digest

READERS = {"shm": ShmReader, "collective": CollectiveReader}
GENERATE = "/inference/v1/generate"
LIMIT_S = 20.0
SAMPLING = Sampling(max_tokens=2, stop_token_ids=(1,))


def requests(number: int) -> list[dict[str, Any]]:
    """Bodies of requests whose seeds, by which a `Server` knows them, are 0, 1, ..."""
    return [generate_body(GenerateRequest([5, 6], seed), SAMPLING) for seed in range(number)]


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


class Worker:
    """What a worker of vLLM does with buckets, without a model: it holds what it has read.

    num_breaks: how many transfers from now on break off for it, each after `after` buckets (0: before it has come);
    is_alone: whether it says that nobody else hears of that."""

    def __init__(self, init_info: dict[str, Any]):
        buckets = heard(init_info["buckets"])
        self._reader = READERS[init_info["transport"]](buckets, 0, torch.device("cpu"))
        self._report: dict[str, Any] = {"wrong": {}, "seconds": {}}
        self._broken: dict[str, Any] = {}
        self.num_breaks, self.after, self.is_alone = 0, 0, False

    def update(self, update_info: dict[str, Any]) -> None:
        """A transfer that breaks off raises nothing here, as in `BucketTransferEngine.receive_weights`."""
        where, held, self._broken = update_info["where"], [], {}
        try:
            self._break_off_after(0)
            for bucket, buffer in self._reader.buckets(where):
                held += [digest(view) for view in bucket.views(buffer)]
                self._break_off_after(bucket.index + 1)
            self._report["held"] = held
        except TransferError as error:
            self._reader.give_up(where)
            self._broken = {"broken": str(error), "alone": bool(error.silent)}

    def _break_off_after(self, num_read: int) -> None:
        if self.num_breaks and num_read == self.after:
            self.num_breaks -= 1
            raise TransferError("the network is gone", silent=[0] if self.is_alone else ())

    def held_weights(self) -> dict[str, Any]:
        return {"results": [self._broken or self._report]}

    def asked(self, method: str) -> dict[str, Any]:
        """What an engine of this worker answers."""
        return {"results": [self._broken]} if method == "broken_transfer" else self.held_weights()


class Server:
    """Started and stopped as `VLLMServer` is.

    events: paths in the order in which they were asked, "score" and "generate" for the two uses of one route, and
    "start"; asked, answered: seeds of generate requests. While `held`, these wait for `release`. faults: what becomes
    of the next request of a route: "die", a status, or "leave", no answer ever, since the engine behind the server is
    dead. delay_s: of every generate request. score: the log-prob of every token. before_update: called with what the
    trainer says of an update, before its buckets are read.
    """

    def __init__(self, folder: Path, events: list[str] | None = None):
        self._folder = folder
        self.events = [] if events is None else events
        self.asked: list[int] = []
        self.answered: list[int] = []
        self.num_starts = 0
        self.held, self.delay_s, self.score = False, 0.0, 0.0
        self.faults: dict[str, str | int] = {}
        self.before_update: Callable[[dict[str, Any]], None] = lambda where: None
        self.cache_probe_tokens = 0
        self.pid, self.token, self.url = None, "", ""
        self.payload_dir = Path()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        self.num_starts += 1
        self.version, self.engine_is_dead = "default", False
        self.payload_dir = self._folder / f"payloads-{self.num_starts}"
        self.payload_dir.mkdir(parents=True)
        self.events.append("start")
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(LIMIT_S)

    def stop(self) -> None:
        self.die()

    def die(self) -> None:
        """As after SIGKILL: connections end, nobody listens, and the guard has removed the payloads."""
        loop, thread, self._loop = self._loop, getattr(self, "_thread", None), None
        if loop is not None:
            loop.call_soon_threadsafe(loop.stop)
            if thread is not None and threading.current_thread() is not thread:
                thread.join(LIMIT_S)

    can_start = True

    @property
    def is_gone(self) -> bool:
        return not self.payload_dir.exists()

    def log_tail(self) -> str:
        return "the end of its log"

    def release(self, number: int = 1) -> None:
        """Answer so many of the requests that wait, in the order in which they came."""
        assert self._loop
        for _ in range(number):
            self._loop.call_soon_threadsafe(self._gate.release)

    def _run(self, started: threading.Event) -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        self._gate = asyncio.Semaphore(0)
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, shutdown_timeout=0)
        loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._loop = loop  # from now on it can be stopped
        started.set()
        loop.run_forever()
        shutil.rmtree(self.payload_dir, ignore_errors=True)
        for connection in runner.server.connections if runner.server else ():
            if connection.transport is not None:
                connection.transport.abort()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(runner.cleanup())
        loop.close()

    async def _handle(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else {}
        path, is_score = request.path, "prompt_logprobs" in body.get("sampling_params", {})
        if path == "/health":
            return web.json_response({}, status=503 if self.engine_is_dead else 200)
        self.events.append(("score" if is_score else "generate") if path == GENERATE else request.path_qs)
        fault = self.faults.pop(path, None)
        if fault == "leave":
            self.engine_is_dead = True
            await asyncio.sleep(10 * LIMIT_S)
        if fault == "die":
            self.die()
            await asyncio.sleep(LIMIT_S)
        if isinstance(fault, int):
            return web.json_response({"error": "it raised"}, status=fault)
        if path == "/get_world_size":
            return web.json_response({"world_size": 1})
        if path == "/init_weight_transfer_engine":
            self.worker = Worker(body["init_info"])
        if path == "/update_weights":
            await asyncio.to_thread(self.before_update, body["update_info"]["where"])
            await asyncio.to_thread(self.worker.update, body["update_info"])
        if path == "/collective_rpc":
            return web.json_response(await asyncio.to_thread(self.worker.asked, body["method"]))
        if path == "/finish_weight_update":
            self.version = body["weight_version"]
        if path == GENERATE:
            return await (self._scored(body) if is_score else self._generated(body))
        return web.json_response({})

    async def _scored(self, body: dict[str, Any]) -> web.Response:
        entries = [{str(token): {"logprob": self.score}} for token in body["token_ids"][1:]]
        return web.json_response({"prompt_logprobs": [None, *entries]})

    async def _generated(self, body: dict[str, Any]) -> web.Response:
        seed = body["sampling_params"]["seed"]
        self.asked.append(seed)
        await asyncio.sleep(self.delay_s)
        if self.held:
            await self._gate.acquire()
        self.answered.append(seed)
        choice = {"finish_reason": "stop", "weight_versions": [{"version": self.version}]}
        choice |= {"logprobs": {"content": [{"logprob": 0.0}] * 2}}
        samples = range(body["sampling_params"].get("n", 1))
        choices = [choice | {"index": i, "token_ids": [(seed + i) % 1000, 1]} for i in samples]
        return web.json_response({"choices": choices[::-1]})  # in no order


def engines_of(servers: list[Server]) -> list[Engine]:
    return [Engine(server, number=number, timeout_s=LIMIT_S) for number, server in enumerate(servers)]  # type: ignore
