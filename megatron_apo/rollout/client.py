"""Token ids in, token ids and log-probs out: a blocking client of one vLLM server.

    client = RolloutClient(server.url, server.token)
    sampling = Sampling(max_tokens=1024, stop_token_ids=eos_token_ids(model))
    completions = client.generate([GenerateRequest(token_ids, seed), ...], sampling)

All requests of a call are in flight at once over kept-alive connections, on an event loop in a thread of its own;
callbacks run in the caller's thread. It also has the four methods of vLLM's VLLMWeightSyncClient protocol
(vllm/distributed/weight_transfer/base.py), so that any of vLLM's trainer-side engines can drive a server through it.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

import aiohttp

from megatron_apo.rollout.server import ServerDied, ServerError


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy. `stop_token_ids` alone end a response: see `eos_token_ids`."""

    max_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1

    def parameters(self) -> dict[str, Any]:
        """As fields of vLLM's SamplingParams."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop_token_ids": list(self.stop_token_ids),
            "ignore_eos": True,  # only the stop ids count, whatever the model's files say
            "detokenize": False,
        }


@dataclass(frozen=True)
class GenerateRequest:
    """One prompt to continue."""

    token_ids: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Completion:
    """One response. `token_ids` has the stop id that ended it; a truncated one ("length") has nothing added.

    `log_probs`: of each token under the distribution it was sampled from (temperature applied; natural logarithm).
    `weight_version`: of the weights that made it; "default" before the first sync.
    `seconds`: from the start of the call that asked for a batch of responses to the arrival of this one.
    """

    token_ids: list[int]
    log_probs: list[float]
    finish_reason: str
    weight_version: str
    seconds: float = field(compare=False)


HEALTH_EVERY_S = 5.0  # while something is unanswered
Body = dict[str, Any]
Outcome = dict[str, Any] | BaseException  # an answer, or why there is none


class RolloutClient:
    """One connection pool to one server. Every method blocks and raises ServerDied when the server is gone, ServerError
    (one line) when it refuses. `timeout_s` bounds one call.

    A request that reaches vLLM as its engine dies may be left for ever, and vLLM's API server then waits for it before
    it ends. So while something is unanswered, the server is asked for its health now and then.
    """

    def __init__(self, url: str, token: str, *, timeout_s: float = 3600):
        self.timeout_s = timeout_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-client", daemon=True)
        self._thread.start()
        self._waiting: set[asyncio.Task[Any]] = set()
        self._deaths: dict[asyncio.Task[Any], ServerDied] = {}
        self._death: ServerDied | None = None  # of the server, for good
        self._session = self._run(self._open_session(url, token))
        self._health = asyncio.run_coroutine_threadsafe(self._watch_health(), self._loop)
        self._sent: set[asyncio.Task[dict[str, Any]]] = set()

    def close(self) -> None:
        self.cancel()
        self._health.cancel()
        self._run(self._session.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> RolloutClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        sampling: Sampling,
        on_completion: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Sample one response per request, in the order of `requests`.

        `on_completion(index, completion)` is called in this thread as each arrives. The first failure ends the call.
        """
        completions: dict[int, Completion] = {}

        def read(index: int, answer: dict[str, Any], seconds: float) -> None:
            (completions[index],) = read_completions(answer, seconds)
            if on_completion is not None:
                on_completion(index, completions[index])

        self._generate_all({index: generate_body(request, sampling) for index, request in enumerate(requests)}, read)
        return [completions[index] for index in range(len(requests))]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of each sequence's tokens but the first, given those before them, at temperature 1.

        A sequence has at most the server's `max_model_len` tokens (one fewer where that is the model's own limit).
        """
        parameters = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
        bodies = {
            index: {"token_ids": list(sequence), "sampling_params": parameters}
            for index, sequence in enumerate(sequences)
        }
        scores: dict[int, list[float]] = {}

        def read(index: int, answer: dict[str, Any], _: float) -> None:
            pairs = zip(sequences[index][1:], answer["prompt_logprobs"][1:], strict=True)
            scores[index] = [entry[str(token)]["logprob"] for token, entry in pairs]

        self._generate_all(bodies, read)
        return [scores[index] for index in range(len(sequences))]

    def send(self, bodies: Mapping[int, Body], deliver: Callable[[int, Outcome], None]) -> None:
        """Send generate requests, all at once, and return.

        `deliver(index, answer)` is called for each exactly once, in the client's thread, with the error in place of an
        answer that will not come.
        """

        def post_all() -> None:
            for index, body in bodies.items():
                task = self._loop.create_task(self._post(body))
                self._sent.add(task)
                task.add_done_callback(partial(finish, index))

        def finish(index: int, task: asyncio.Task[dict[str, Any]]) -> None:
            self._sent.discard(task)
            error = ServerDied("the request was cancelled") if task.cancelled() else task.exception()
            deliver(index, task.result() if error is None else error)

        self._loop.call_soon_threadsafe(post_all)

    def cancel(self) -> None:
        """Give up what was sent and is not answered: its outcome is a ServerDied."""
        self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in self._sent])

    def abandon(self, death: ServerDied) -> None:
        """Wait for no answer any more: `death` is what comes of whatever was asked, and of what will be."""
        self._loop.call_soon_threadsafe(self._abandon, death)

    def _abandon(self, death: ServerDied) -> None:
        self._death = death
        self._give_up_waiting(death)

    def _give_up_waiting(self, death: ServerDied) -> None:
        for task in self._waiting:
            self._deaths[task] = death
            task.cancel()

    def health(self) -> None:
        """Raise ServerDied unless server and engine answer."""
        self._call("GET", "/health")

    def pause(self) -> None:
        """Let running requests end, hold new ones back and forget the KV cache, which belongs to the old weights."""
        self._call("POST", "/pause?mode=wait&clear_cache=true")

    def resume(self) -> None:
        self._call("POST", "/resume")

    def sleep(self) -> None:
        """Give GPU memory back: the KV cache is dropped, the weights wait in host memory.

        The server was started with rollout.sleep_while_training. Before requests and new weights comes `wake_up`: vLLM
        would write into memory that is not there.
        """
        self._call("POST", "/sleep?level=1")

    def wake_up(self, *tags: str) -> None:
        """Take back what `tags` ("weights", "kv_cache") name, or all that sleeps, after which requests are served.

        vLLM ignores the call altogether when one of several tags is awake (v1/executor/abstract.py, `wake_up`).
        """
        self._call("POST", "/wake_up" + "".join(f"{'&' if at else '?'}tags={tag}" for at, tag in enumerate(tags)))

    def is_paused(self) -> bool:
        return self._call("GET", "/is_paused")["is_paused"]

    def weight_version(self) -> str:
        """The version that the last finished update gave; "default" before the first."""
        return self._call("GET", "/weight_info")["weight_version"]

    def num_workers(self) -> int:
        return self._call("GET", "/get_world_size")["world_size"]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("POST", "/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._call("POST", "/start_weight_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._call("POST", "/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("POST", "/finish_weight_update", {"weight_version": weight_version})

    def held_weights(self) -> list[dict[str, Any]]:
        """What the model of each of the engine's workers holds since the last update (`transport/content.py`)."""
        return self._call("POST", "/collective_rpc", {"method": "held_weights"})["results"]

    def broken_transfers(self) -> list[dict[str, Any]]:
        """Of the engine's workers for whom the present transfer of weights broke off (`transport/receiver.py`)."""
        results = self._call("POST", "/collective_rpc", {"method": "broken_transfer"})["results"]
        return [result for result in results if result]

    def worker_places(self) -> list[dict[str, Any]]:
        """Where each of the engine's workers has its weights (`transport/ipc.py`)."""
        return self._call("POST", "/collective_rpc", {"method": "place"})["results"]

    def cached_tokens(self, token_ids: Sequence[int]) -> int:
        """Tokens of a prompt that are in the prefix cache, where one token more is asked for."""
        parameters = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
        answer = self._run(self._post({"token_ids": list(token_ids), "sampling_params": parameters}))
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    async def _open_session(self, url: str, token: str) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            url,
            headers={"Authorization": f"Bearer {token}"},
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=1800),
            timeout=aiohttp.ClientTimeout(total=self.timeout_s),
        )

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        # vLLM's server may close a connection after an answer of 500, and a later call that took it up would fail.
        return self._run(self._exchange(method, path, data, {"Connection": "close"}))

    def _generate_all(self, bodies: dict[int, Body], read: Callable[[int, dict[str, Any], float], None]) -> None:
        """Send all bodies at once; call `read(index, answer, seconds)` in this thread as answers arrive."""
        arrived: SimpleQueue[tuple[int, Outcome, float]] = SimpleQueue()
        start = time.perf_counter()
        self.send(bodies, lambda index, outcome: arrived.put((index, outcome, time.perf_counter() - start)))
        try:
            for _ in bodies:
                index, outcome, seconds = arrived.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                read(index, outcome, seconds)
        finally:
            self.cancel()

    async def _post(self, body: Body) -> dict[str, Any]:
        return await self._exchange("POST", "/inference/v1/generate", json.dumps(body).encode())

    async def _exchange(self, method: str, path: str, body: bytes | None, headers: dict[str, str] | None = None) -> Any:
        if self._death is not None:
            raise self._death
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            return await self._request(method, path, body, headers)
        except asyncio.CancelledError:
            if death := self._deaths.get(task):
                raise death from None
            raise
        finally:
            self._waiting.discard(task)
            self._deaths.pop(task, None)

    async def _watch_health(self) -> None:
        while True:
            await asyncio.sleep(HEALTH_EVERY_S)
            if not self._waiting:
                continue
            try:
                await self._request("GET", "/health", None)
            except ServerDied as death:
                self._give_up_waiting(death)
            except ServerError:
                pass  # it is busy; `timeout_s` ends that

    async def _request(self, method: str, path: str, body: bytes | None, headers: dict[str, str] | None = None) -> Any:
        if body is not None:
            headers = {"Content-Type": "application/json"} | (headers or {})
        try:
            async with self._session.request(method, path, data=body, headers=headers) as response:
                text = await response.read()
        except aiohttp.ClientError as error:
            raise ServerDied(f"the rollout server does not answer {path}: {error or type(error).__name__}") from None
        except TimeoutError:
            raise ServerError(f"the rollout server did not answer {path} within {self.timeout_s:g} s") from None
        if response.status == 200:
            return json.loads(text) if text else None
        message = _error_message(text)
        if response.status == 503 or "EngineDeadError" in message or "EngineCore encountered" in message:
            raise ServerDied(f"vLLM's engine is dead: {path}: {message}")
        raise ServerError(f"the rollout server answered {path} with {response.status}: {message}")


def generate_body(request: GenerateRequest, sampling: Sampling, num_samples: int = 1) -> Body:
    """One request for several samples, which share its prefill; sample i is drawn with seed + i (vLLM's own rule)."""
    parameters = sampling.parameters() | {"seed": request.seed, "logprobs": 0}  # the sampled token's
    if num_samples > 1:
        parameters["n"] = num_samples
    return {"token_ids": list(request.token_ids), "sampling_params": parameters}


def num_samples_of(body: Body) -> int:
    """How many responses a request asks for."""
    return body.get("sampling_params", {}).get("n", 1)


def read_completions(answer: dict[str, Any], seconds: float) -> list[Completion]:
    """A request's samples, in their order."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    return [_read_choice(choice, seconds) for choice in choices]


def _read_choice(choice: dict[str, Any], seconds: float) -> Completion:
    if choice["finish_reason"] not in ("stop", "length"):
        raise ServerError(f"a request ended with {choice['finish_reason']!r} instead of a response")
    versions = sorted({span["version"] for span in choice["weight_versions"]})
    if len(versions) != 1:
        raise ServerError(f"a response was sampled across weight versions {versions}; pause before an update")
    log_probs = [token["logprob"] for token in choice["logprobs"]["content"]]
    return Completion(choice["token_ids"], log_probs, choice["finish_reason"], versions[0], seconds)


def _error_message(text: bytes) -> str:
    """The message of vLLM's error body, in one line."""
    try:
        message = json.loads(text)["error"]
        message = message["message"] if isinstance(message, dict) else message
    except (ValueError, KeyError, TypeError):
        message = text.decode(errors="replace")
    return " ".join(str(message).split())
