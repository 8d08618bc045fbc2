"""The engines of a training as stage 1's, before its first step (vstar.at_start).

    with serving_reference(fleet) as engine:
        engine.add(key, token_ids, sampling, num_samples=8, seed=17)
        for key, samples in engine.step(): ...

They hold the reference's weights then, and not nobody's: that the first sync brings all of the policy's is not seen by
what follows from it, but by what the workers say they hold, as at every sync.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from queue import Empty, SimpleQueue

from megatron_apo.rollout.client import GenerateRequest, Outcome, Sampling, generate_body
from megatron_apo.rollout.engine import Engine
from megatron_apo.rollout.fleet import Fleet
from megatron_apo.rollout.offline import Sample, sample_of
from megatron_apo.rollout.server import ServerDied
from megatron_apo.runtime.ending import EndedEarly, Interrupted, request

_LOOK_EVERY_S = 0.5  # graders answer meanwhile, and other workers ask whether this one is alive


@contextmanager
def serving_reference(fleet: Fleet) -> Iterator[ServedEngines]:
    """Wait for a fleet that was begun with the reference's weights, and have it sample. Raises EndedEarly where the run
    is asked to end before it can."""
    try:
        with request.heard_by(fleet.interrupt):
            fleet.finish_starts()
    except Interrupted:
        raise EndedEarly(f"ended early as engines started ({request.why})") from None
    fleet.serve_own_weights()
    try:
        yield ServedEngines(fleet)
        for engine in fleet.serving:
            engine.cached_tokens()  # the first sync must find that these are forgotten
    finally:
        fleet.serve_no_longer()


@dataclass(frozen=True)
class _Asked:
    key: Hashable
    request: GenerateRequest
    sampling: Sampling
    num_samples: int


class ServedEngines:
    """What `filling.Sampler` asks of an engine, of all of a fleet's. What an engine that dies has not answered is asked
    of the others; raises ServerDied when none is left."""

    def __init__(self, fleet: Fleet):
        self._fleet = fleet
        self._numbers = count()
        self._asked: dict[int, tuple[_Asked, Engine]] = {}
        self._load = dict.fromkeys(fleet.engines, 0)  # responses that it was asked for and has not given
        self._arrived: SimpleQueue[tuple[int, Outcome]] = SimpleQueue()
        self.num_samples_open = 0

    def add(self, key: Hashable, token_ids: Sequence[int], sampling: Sampling, *, num_samples: int, seed: int) -> None:
        """As `OfflineEngine.add`."""
        self.num_samples_open += num_samples
        self._ask(_Asked(key, GenerateRequest(token_ids, seed), sampling, num_samples))

    def step(self) -> list[tuple[Hashable, list[Sample]]]:
        """Wait a moment for answers: (key, samples in order) of the requests that were finished."""
        found = []
        try:
            arrived = [self._arrived.get(timeout=_LOOK_EVERY_S)]
            while not self._arrived.empty():
                arrived.append(self._arrived.get())
        except Empty:
            return []
        for number, outcome in arrived:
            asked, engine = self._asked.pop(number)
            self._load[engine] -= asked.num_samples
            if isinstance(outcome, ServerDied):
                if engine.answers:
                    engine.fail(outcome)
                    print(f"rollout engine {engine.number} died in stage 1 ({outcome})", flush=True)
                self._ask(asked)
                continue
            if isinstance(outcome, BaseException):
                raise outcome
            self.num_samples_open -= asked.num_samples
            ordered = sorted(outcome["choices"], key=lambda choice: choice["index"])
            found.append((asked.key, [sample_of(choice["token_ids"], choice["finish_reason"]) for choice in ordered]))
        return found

    def _ask(self, asked: _Asked) -> None:
        if not self._fleet.serving:
            raise ServerDied("\n".join(filter(None, (str(self._fleet.death()), self._fleet.log_tail()))))
        engine = min(self._fleet.serving, key=self._load.__getitem__)
        number = next(self._numbers)
        self._asked[number] = (asked, engine)
        self._load[engine] += asked.num_samples
        body = generate_body(asked.request, asked.sampling, asked.num_samples)
        del body["sampling_params"]["logprobs"]  # of no use to a store
        engine.client.send({number: body}, lambda number, outcome: self._arrived.put((number, outcome)))
