"""All engines of a run, on the driver: who is asked for what, and what becomes of the requests of one that dies.

    fleet = Fleet.of(recipe, model)
    fleet.start()                          # all servers at the same time
    fleet.generate(queue, on_completion)   # every request answered once, by whichever engine has the least to do

One thread drives a fleet. Engines start in threads of their own, so that one that died is started again while the
others sample.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from heapq import heappop, heappush
from itertools import accumulate
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from megatron_apo.config import Recipe
from megatron_apo.rollout.client import Body, Completion, Outcome, RolloutClient, num_samples_of, read_completions
from megatron_apo.rollout.engine import Answer, Engine, State, at_once
from megatron_apo.rollout.registry import RemoteServer
from megatron_apo.rollout.server import ServerDied, ServerError, VLLMServer, log_file
from megatron_apo.runtime.ending import Interrupted
from megatron_apo.runtime.job import log_path

_LOOK_EVERY_S = 0.5


class RequestQueue:
    """Requests in order. Each is open, in flight at one engine, or answered, and goes back to open when its engine
    dies: so none is lost, and none that was answered is asked again. A request is for one response or more, and
    responses are counted in the requests' order."""

    def __init__(self, bodies: Sequence[Body]):
        self.bodies = bodies
        self.sizes = [num_samples_of(body) for body in bodies]
        self.answers: dict[int, list[Completion]] = {}
        self.answered_by: Counter[int] = Counter()  # how many responses each engine gave, by its number
        self._first = [0, *accumulate(self.sizes)]
        self.start_s = time.perf_counter()
        self._open = list(range(len(bodies)))  # a heap

    @property
    def has_open(self) -> bool:
        return bool(self._open)

    @property
    def completions(self) -> list[Completion]:
        """All responses, in their order."""
        return [one for index in range(len(self.bodies)) for one in self.answers[index]]

    def rows_of(self, index: int) -> range:
        """The numbers of a request's responses."""
        return range(self._first[index], self._first[index + 1])

    def request_of(self, row: int) -> int:
        """The request that a response answers."""
        return bisect_right(self._first, row) - 1

    def answer(self, index: int, completions: list[Completion], engine: int) -> dict[int, Completion]:
        """Keep a request's responses, from engine number `engine`; they are returned by their numbers."""
        if len(completions) != self.sizes[index]:
            raise ServerError(f"a request for {self.sizes[index]} responses was answered with {len(completions)}")
        self.answers[index] = completions
        self.answered_by[engine] += len(completions)
        return dict(zip(self.rows_of(index), completions, strict=True))

    def take(self) -> int:
        """The first open request, which is in flight from now on."""
        return heappop(self._open)

    def put_back(self, index: int) -> None:
        heappush(self._open, index)


class Fleet(AbstractContextManager["Fleet"]):
    """As a context manager it stops at the end what was started.

    window: responses that an engine is asked for at most, where there are several engines. has_weights: whether its
    engines hold a model's own when they have started. activity: what the run is
    at, for messages. may_start: whether an engine that is lost can be started again now, or memory must be made for it
    first (`sharing.py`).
    """

    def __init__(self, engines: Sequence[Engine], window: int, has_weights: bool = True):
        self.engines = list(engines)
        self.has_weights = has_weights
        self.activity = "the start"
        self.may_start = True
        self.is_interrupted = False
        self._arrived: SimpleQueue[tuple[Engine, int, Outcome, float] | None] | None = (
            None  # answers, while any are due
        )
        self._window = window if len(engines) > 1 else None
        self._starts: dict[Engine, Future[None]] = {}
        self._threads: list[threading.Thread] = []
        self._told: set[Engine] = set()  # lost engines of which a message was printed

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        model: Path,
        log_name: str = "vllm",
        *,
        load_format: str = "auto",
        here: Sequence[int] | None = None,
        elsewhere: Sequence[RemoteServer] = (),
    ) -> Fleet:
        """rollout.replicas engines, not started: those of the numbers `here` on this machine (none: all), and those of
        other nodes. Logs: RUN/logs/<log_name>[-<number>].log. load_format: see `VLLMServer`."""
        here = range(recipe.rollout.replicas) if here is None else here
        rollout = recipe.rollout.model_copy(update={"replicas": len(here)})  # what shares this machine
        servers: dict[int, VLLMServer | RemoteServer] = {server.number: server for server in elsewhere}
        for place, number in enumerate(here):
            servers[number] = VLLMServer(
                rollout,
                model,
                log_path=log_path(recipe.run.dir, log_file(log_name, number, recipe.rollout.replicas)),
                seed=recipe.run.seed,
                max_model_len=recipe.max_sequence_tokens,
                shm_dir=recipe.sync.dir,
                replica=None if len(here) == 1 else place,
                load_format=load_format,
            )
        engines = [
            Engine(server, number=number, timeout_s=rollout.request_timeout_s)
            for number, server in sorted(servers.items())
        ]
        for engine in engines:
            if isinstance(engine.server, RemoteServer):
                engine.server.on_death = engine.lose
        # What an engine does not decode yet waits in it: the next sequence begins where one has ended.
        window = rollout.max_num_seqs + max(1, rollout.max_num_seqs // 8)
        return cls(engines, window, has_weights=load_format != "dummy")

    @classmethod
    def to_be_synced(
        cls, recipe: Recipe, *, here: Sequence[int] | None = None, elsewhere: Sequence[RemoteServer] = ()
    ) -> Fleet:
        """Those of a training: they begin with weights that are nobody's, so that a sync that brings none is seen at
        once."""
        return cls.of(recipe, recipe.model.path, load_format="dummy", here=here, elsewhere=elsewhere)

    # --- starting and ending

    def start(self) -> None:
        """Start all engines that are down, and wait for those and for the ones that were starting."""
        self.begin_starts([engine for engine in self.engines if not engine.answers])
        self.finish_starts()

    def begin_starts(self, engines: Sequence[Engine]) -> None:
        """Start engines in the background. Those that are starting, and those that failed elsewhere, are left alone;
        where none answers, another node is waited for."""
        for engine in engines:
            can_start = engine.can_start or (isinstance(engine.server, RemoteServer) and not self.answering)
            if can_start and engine not in self._starts:
                self._starts[engine] = future = Future()
                thread = threading.Thread(target=_start, args=(engine, future), daemon=True)
                self._threads.append(thread)
                thread.start()

    def finish_starts(self) -> None:
        """Wait for the engines that are starting. One that does not start is left for the next step while others
        answer; raises ServerError where none does, Interrupted once the fleet was interrupted."""
        while self._starts:
            engine, future = next(iter(self._starts.items()))
            while not future.done():
                if self.is_interrupted:
                    raise Interrupted("the run was asked to end")
                wait([future], _LOOK_EVERY_S)
            error = future.exception()
            del self._starts[engine]  # only now: `stop` ends the starts that are waited for
            if error is None:
                self._told.discard(engine)
                continue
            engine.failure = ServerDied(str(error))
            if not isinstance(error, ServerError) or not (self.answering or self._starts):
                raise error
            print(f"rollout engine {engine.number} did not start ({error}); the others go on without it", flush=True)
        self._threads.clear()

    def connect(self, init_info: dict[str, Any]) -> None:
        """Make the engines that were started ready to take weights (`WeightSync.init_info`)."""
        new = [engine for engine in self.engines if engine.answers and not engine.num_workers]
        self._take(at_once(new, lambda engine: engine.connect(init_info)))

    def serve_own_weights(self) -> None:
        """Let the engines serve what they were started with. One that dies is not started again."""
        self.may_start = False
        for engine in self.answering:
            engine.state = State.SERVING

    def serve_no_longer(self) -> None:
        """Let the engines be as those of `to_be_synced` that have just started, also those that start again."""
        for engine in self.serving:
            engine.state = State.STARTED
        for engine in self.engines:
            if isinstance(engine.server, VLLMServer):
                engine.server.load_format = "dummy"
        self.may_start = True

    def stop(self) -> None:
        for thread in self._threads:
            while thread.is_alive():
                for engine in self._starts:
                    engine.server.stop()
                thread.join(0.2)
        at_once(self.engines, Engine.stop)

    def __exit__(self, *exception: object) -> None:
        self.stop()

    # --- what the engines are

    @property
    def answering(self) -> list[Engine]:
        return [engine for engine in self.engines if engine.answers]

    @property
    def serving(self) -> list[Engine]:
        return [engine for engine in self.engines if engine.state is State.SERVING]

    def in_state(self, state: State) -> list[Engine]:
        return [engine for engine in self.engines if engine.state is state]

    def numbers(self, state: State) -> list[int]:
        return [engine.number for engine in self.in_state(state)]

    def failures(self, state: State) -> list[str]:
        """What those in a state of failure failed with."""
        return [str(engine.failure) for engine in self.in_state(state) if engine.failure]

    def lacking(self, version: int) -> list[Engine]:
        """Those that can be given weights and do not hold these."""
        return [engine for engine in self.answering if engine.version != version]

    def require_one(self) -> None:
        """Raise ServerDied where none answers; see to those that were lost."""
        if not self.answering:
            raise self.death()
        self.attend_to_lost()

    def pids(self) -> dict[str, int | None]:
        """The root process of each engine that runs here, by what it is called in a summary."""
        if len(self.engines) == 1:
            return {"vllm server": self.engines[0].pid}
        return {f"vllm server {engine.number}": engine.pid for engine in self.engines}

    def attend_to_lost(self, engines: Sequence[Engine] | None = None, unfinished: int = 0) -> None:
        """Say which of `engines` (none: of all) were lost, and start them again if they may be, while others serve.

        Where none serves it is the caller's to restart them and to give them weights.
        """
        lost = [engine for engine in self.in_state(State.DOWN) if engines is None or engine in engines]
        for engine in lost:
            if self.serving and engine.failure and engine not in self._told:
                self._told.add(engine)
                asked = f"; the others are asked its unfinished requests, {unfinished}" if unfinished else ""
                print(f"rollout engine {engine.number} died in {self.activity} ({engine.failure}){asked}", flush=True)
        if self.serving and self.may_start:
            self.begin_starts([engine for engine in lost if engine in self._told])

    # --- what they are asked

    def ask(self, call: Callable[[RolloutClient], Answer]) -> dict[Engine, Answer]:
        """One call to every engine that answers, all at the same time; those that die in it are left out."""
        return self._take(at_once(self.answering, lambda engine: call(engine.client)))

    def _take(self, outcomes: dict[Engine, Answer | Exception]) -> dict[Engine, Answer]:
        answers = {}
        for engine, outcome in outcomes.items():
            if isinstance(outcome, ServerDied):
                engine.fail(outcome)
            elif isinstance(outcome, Exception):
                raise outcome
            else:
                answers[engine] = outcome
        self.attend_to_lost()
        return answers

    def generate(self, queue: RequestQueue, on_completion: Callable[[int, Completion], None]) -> None:
        """Have the queue's open requests answered; `on_completion(number, completion)` is called once a response.

        Requests of an engine that dies are asked of the others. Raises ServerDied when none is left; asked again, this
        goes on with what is unanswered. A request that is refused ends the call, and so does an error of the caller's.
        Raises Interrupted once the fleet was interrupted (`interrupt`).
        """
        arrived: SimpleQueue[tuple[Engine, int, Outcome, float] | None] = SimpleQueue()
        self._arrived = arrived
        in_flight: dict[Engine, set[int]] = {engine: set() for engine in self.engines}
        load = dict.fromkeys(self.engines, 0)  # responses in flight
        given_up: Counter[Engine] = Counter()

        def hand_out() -> None:
            shares: dict[Engine, dict[int, Body]] = {}
            while queue.has_open and (engine := self._least_busy(load)):
                index = queue.take()
                in_flight[engine].add(index)
                load[engine] += queue.sizes[index]
                shares.setdefault(engine, {})[index] = queue.bodies[index]
            for engine, bodies in shares.items():
                engine.client.send(
                    bodies,
                    lambda index, outcome, engine=engine: arrived.put((engine, index, outcome, time.perf_counter())),
                )

        try:
            hand_out()
            while any(in_flight.values()):
                if self.is_interrupted or (found := arrived.get()) is None:
                    raise Interrupted("the run was asked to end")
                engine, index, outcome, now = found
                in_flight[engine].discard(index)
                load[engine] -= queue.sizes[index]
                if isinstance(outcome, ServerDied):
                    queue.put_back(index)
                    given_up[engine] += 1
                    if engine.answers:
                        engine.fail(outcome)
                    if not in_flight[engine]:
                        self.attend_to_lost([engine], given_up[engine])
                elif isinstance(outcome, BaseException):
                    raise outcome
                else:
                    completions = read_completions(outcome, now - queue.start_s)
                    for number, completion in queue.answer(index, completions, engine.number).items():
                        on_completion(number, completion)
                hand_out()
        finally:
            self._arrived = None
            for engine in self.answering:
                engine.client.cancel()
        if queue.has_open:
            raise self.death()

    def interrupt(self) -> None:
        """What is generated is dropped, and what starts is not waited for, now and later. From any thread."""
        self.is_interrupted = True
        if (arrived := self._arrived) is not None:
            arrived.put(None)

    def death(self) -> ServerDied:
        """Why there is no engine left to ask."""
        return ServerDied([*self.failures(State.DOWN), "no rollout engine is running"][0])

    def log_tail(self) -> str:
        """The last lines that the engines which are down have logged."""
        return "\n".join(engine.log_tail() for engine in self.in_state(State.DOWN))

    def _least_busy(self, load: dict[Engine, int]) -> Engine | None:
        """Who is asked next: of the engines that serve and have room, the one with the fewest responses in flight."""
        engine = min(self.serving, key=load.__getitem__, default=None)
        if engine is None or (self._window is not None and load[engine] >= self._window):
            return None
        return engine


def _start(engine: Engine, started: Future[None]) -> None:
    try:
        engine.start()
        started.set_result(None)
    except BaseException as error:  # whoever waits for the start raises it
        started.set_exception(error)
