"""Puts the trainer's weights into running vLLM engines, and has it proven that they are there.

    sync = WeightSync(source, engines)                          # on rank 0
    sync = WeightSync(source, ranks=ranks)                      # on every other trainer rank
    sync.sync(version)      pause -> buckets, while vLLM loads -> finish(version) -> what do the models hold? -> resume

The only file that knows vLLM's transfer contract on the trainer's side (distributed/weight_transfer/base.py, 0.32), by
which an engine's client is a VLLMWeightSyncClient. How buckets travel: `transport/`; whether vLLM computes as the
trainer does: `proof.py`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megatron_apo.rollout.engine import Answer, Engine, State
from megatron_apo.rollout.server import ServerDied, ServerError
from megatron_apo.rollout.transport.base import (
    Ranks,
    Receiver,
    Sender,
    Source,
    TransferError,
    Update,
    bucket_digests,
    told,
)
from megatron_apo.rollout.transport.collective import CollectiveSender
from megatron_apo.rollout.transport.ipc import IpcSender
from megatron_apo.rollout.transport.shm import ShmSender
from megatron_apo.telemetry.timers import Stopwatch
from megatron_apo.telemetry.units import some
from megatron_apo.weights.plan import Bucket, Plan

_EARLY_S = 0.5  # before the others, an engine may well be through; after that it is asked whether it is

SENDERS: dict[str, Callable[[Plan, Ranks, float], Sender]] = {
    "shm": ShmSender,
    "collective": CollectiveSender,
    "ipc": IpcSender,
}


class SyncError(RuntimeError):
    """An engine does not hold the trainer's weights. It is paused and stays so: restart it and sync anew."""


class UpdateFailed(SyncError):
    """A weight update raised in an engine. After that vLLM would mix two versions, or refuse to go on."""


@dataclass(frozen=True)
class SyncReport:
    """One finished sync. On ranks other than 0 only `version` and `seconds` are filled.

    phases: seconds of its parts on rank 0: "pause"; "gather", "digest" and "wait" (for room, and for the engines to
    have loaded the last bucket); "finish"; "check". Of the slowest worker "load", in which vLLM loads and packs, and
    "content", in which it is looked at what was loaded.
    """

    version: int
    seconds: float
    num_bytes: int
    digests: dict[str, str]
    phases: dict[str, float] = field(default_factory=dict)


class WeightSync:
    """Every method is called on every trainer rank. An error on rank 0 is raised on all of them; a rank that fails
    while it sends its part of the weights ends the job."""

    def __init__(
        self,
        source: Source,
        engines: Sequence[Engine] = (),
        *,
        ranks: Ranks | None = None,
        transport: str = "shm",
        timeout_s: float = 120.0,
    ):
        """`engines` are rank 0's, which may add to them. `transport`: one of SENDERS. `timeout_s`: how long an engine
        may be silent in an update."""
        self.source = source
        self.engines = engines
        self.sent: list[dict[str, str]] = []  # digests by tensor, of the last two versions
        self._ranks = ranks or Ranks()
        self._transport = transport
        self._timeout_s = timeout_s
        self._sender = SENDERS[transport](source.plan, self._ranks, timeout_s)
        self._version: int | None = None

    @cached_property
    def init_info(self) -> dict[str, Any]:
        """What engines are told once (`Engine.connect`)."""
        return {
            "transport": self._transport,
            "digest": self._ranks.digest_kind,
            "buckets": told(self.source.plan),
        }

    def sync(self, version: int, engines: Sequence[Engine] | None = None) -> SyncReport:
        """Replace the weights of `engines` (rank 0's; none: of all that answer) and label them `version`.

        They are given the weights at the same time, and one that fails (`Engine.fail`) does not keep the others from
        theirs; what the last of them failed with is raised: ServerDied, or UpdateFailed. A transfer that breaks off is
        made anew, without the engines that are to blame; once only where none is. Raises SyncError on every rank where
        the weights could not be gathered or sent, or an engine's model then holds others than were sent; what is wrong
        is named, and engines that do not hold the weights stay paused. Nothing is left of it in any case.
        """
        start, watch = time.monotonic(), Stopwatch()
        chosen: list[Engine] = []
        if self._ranks.rank == 0:
            chosen = [one for one in self.engines if one.answers] if engines is None else list(engines)
        num_unexplained, given = 0, chosen
        while True:
            try:
                self._update(version, chosen, watch)
                break
            except (ServerDied, UpdateFailed):  # of all that were sent to anew; the others go on
                if not self._ranks.broadcast(any(engine.version == version for engine in given)):
                    raise
                break
            except TransferError as broken:
                self._sender.start_anew()
                num_unexplained += all(engine.answers for engine in chosen)
                if self._ranks.broadcast(num_unexplained > 1):
                    raise SyncError(f"the weights could not be sent, twice: {broken}") from None
                chosen = [engine for engine in chosen if engine.answers and engine.version != version]
        seconds = time.monotonic() - start
        if self._ranks.rank:
            return SyncReport(version, seconds, 0, {})
        return SyncReport(version, seconds, self.source.plan.num_bytes, self.sent[-1], dict(watch.seconds))

    def _update(self, version: int, chosen: Sequence[Engine], watch: Stopwatch) -> None:
        """One try. What was sent is noted on rank 0 before it is looked for in the engines: some may hold it then."""
        update = _Update(chosen, self._sender, watch, self._timeout_s) if self._ranks.rank == 0 else None
        try:
            self._together(update, lambda update: update.begin())
            self._together(update, lambda update: self._sender.meet(), self._sender.meet)
            self._together(update, self._send, lambda: self._send(None))
            previous = self._previous(version)
            if update:
                self._version, self.sent = version, [previous, update.digests]
            self._together(update, lambda update: update.finish(version, previous))
        finally:
            if update:
                update.close()

    def source_digests(self) -> dict[str, str]:
        """Digests of the trainer's weights as they are now, on rank 0; collective, as a sync is."""
        with closing(self.source.buckets("driver")) as buckets:
            found: dict[str, str] = {}
            for bucket, buffer in buckets:
                found |= bucket_digests(bucket, buffer, self._ranks.digest_kind)
            return found

    def suspects(self, expected: Mapping[str, str] | None) -> list[str]:
        """Tensors of the last sync that are other than expected, by their digests."""
        latest = self.sent[-1] if self.sent else {}
        return [name for name, value in (expected or {}).items() if latest.get(name) != value]

    def unchanged(self) -> list[str]:
        """Tensors that the last two syncs sent alike, if they did not send everything alike."""
        if len(self.sent) < 2 or not self.sent[0]:
            return []
        previous, latest = self.sent
        same = [name for name, value in latest.items() if previous.get(name) == value]
        return same if len(same) < len(latest) else []

    def _previous(self, version: int) -> dict[str, str]:
        """Digests of what was sent before this version, some engines of which may have been given it already."""
        if not self.sent:
            return {}
        return self.sent[0] if version == self._version else self.sent[1]

    def _send(self, update: _Update | None) -> None:
        """Bring all buckets to the engines, on every rank. Collective."""
        if update:
            update.load()
        try:
            digests = self._sender.send(self.source, update)
            if update:
                update.has_sent(digests)
        except TransferError as broken:
            if update:  # rank 0 says what becomes of it
                update.break_off(broken)
        except (SyncError, ServerError):
            raise
        except (ValueError, RuntimeError, OSError) as failure:
            raise SyncError(f"the trainer's weights could not be gathered: {failure}") from failure

    def _together(
        self, update: _Update | None, step: Callable[[_Update], None], elsewhere: Callable[[], None] = lambda: None
    ) -> None:
        """Take a step, on rank 0 `step`. Raises an error of any rank on every rank."""
        error: Exception | None = None
        try:
            if update:
                step(update)
            else:
                elsewhere()
        except (ServerDied, SyncError, TransferError) as failure:
            error = failure
        except (ValueError, OSError) as failure:
            error = SyncError(f"the weights were not written: {failure}")
        self.raise_together(error)

    def on_rank_0(self, work: Callable[[], Answer]) -> Answer:
        """Its value, or its error, on every rank."""
        value, error = None, None
        if self._ranks.rank == 0:
            try:
                value = work()
            except Exception as failure:  # whatever it is, the others wait for an answer
                error = failure
        self.raise_together(error)
        return self._ranks.broadcast(value)

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank if there is an error on any."""
        kind = type(error) if isinstance(error, (ServerError, SyncError, TransferError)) else SyncError
        errors = self._ranks.gather(None if error is None else (kind, str(error)))
        if error is not None:
            raise error
        for rank, failure in enumerate(errors):
            if failure is not None:
                raise failure[0](f"rank {rank}: {failure[1]}")


class _Update(Update):
    """One update of the weights of several engines, on rank 0. Engines that fail leave it."""

    def __init__(self, engines: Sequence[Engine], sender: Sender, watch: Stopwatch, timeout_s: float):
        self.engines = list(engines)
        self.digests: dict[str, str] = {}
        self.watch = watch
        self._timeout_s = timeout_s
        self._sender = sender
        self._threads = ThreadPoolExecutor(max(1, 2 * len(self.engines)), "update")  # each loads, and is asked
        self._opened: list[Engine] = []
        self._loading: dict[Engine, Future[None]] = {}
        self._cut_off: dict[Engine, str] = {}  # engines that cannot be sent to, and why
        self._is_sent = threading.Event()

    def begin(self) -> None:
        """Engines are paused, and wait for the first bucket."""
        with self.watch.phase("pause"):
            self._with_each(lambda engine: engine.client.pause())
            while not self._open():
                pass

    def _open(self) -> bool:
        """False where an engine has died meanwhile, whose folder goes with it; it has left the update then."""
        before, end = len(self.engines), time.monotonic() + 2.0
        self._opened = list(self.engines)
        try:
            self._sender.open(self.engines)
        except FileNotFoundError:
            self._sender.close()
            while len(self.engines) == before:  # what is in the folder goes first
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)
                self._with_each(lambda engine: engine.payload_dir.stat())
            return False
        return True

    def load(self) -> None:
        """Engines read what is sent from now on."""
        self._loading = {engine: self._threads.submit(self._load, engine) for engine in self.engines}

    def has_sent(self, digests: dict[str, str]) -> None:
        self.digests = digests
        self._is_sent.set()

    def _load(self, engine: Engine) -> None:
        try:
            info = self._sender.update_info(engine)
            engine.client.start_weight_update()
            engine.client.update_weights({"where": info})
            if not self._is_sent.wait(_EARLY_S) and (broken := engine.client.broken_transfers()):
                if alone := [one["broken"] for one in broken if one["alone"]]:
                    self._cut_off[engine] = alone[0]
                self._sender.fail(engine)
        except BaseException:
            self._sender.fail(engine)
            raise
        finally:
            self._sender.drop(engine)

    def require_readers(self, bucket: Bucket) -> None:
        if not all(future.done() for future in self._loading.values()):
            return

        def unread(engine: Engine) -> None:
            _require_whole(engine, engine.client.held_weights())
            raise ServerError(f"vLLM was done before it had read {bucket.tensors[0].name}")

        self._joined()
        self._with_each(unread)

    def silent(self, receivers: Sequence[Receiver], why: str) -> None:
        def give_up(engine: Engine) -> None:
            if engine in receivers:
                raise ServerDied(self._cut_off.get(engine, f"{why} (sync.timeout_s)"))

        self._with_each(give_up)

    def break_off(self, broken: TransferError) -> None:
        """The transfer broke off: engines that are to blame leave the update, the others read no more of it.

        Raises TransferError where it can be made anew."""
        self.silent([self._opened[index] for index in broken.silent] + list(self._cut_off), str(broken))
        self._joined(self._timeout_s / 3)
        self._with_each(lambda engine: engine.client.finish_weight_update(None))
        for engine in self.engines:
            engine.state = State.STARTED
        raise broken

    def finish(self, version: int, previous: Mapping[str, str]) -> None:
        """The engines have loaded all; have them say what they hold, and go on."""
        with self.watch.phase("wait"):
            self._joined()

        def end(engine: Engine) -> None:
            engine.client.finish_weight_update(str(version))

        def check(engine: Engine) -> None:
            reports = engine.client.held_weights()
            for report in reports:
                for name in ("load", "content"):
                    self.watch.seconds[name] = max(self.watch.seconds[name], report.get("seconds", {}).get(name, 0.0))
            _require_whole(engine, reports)
            if problem := held_problem(self.digests, previous, reports, engine.num_workers):
                raise SyncError(problem)
            engine.client.resume()
            if stale := engine.cached_tokens():
                engine.client.pause()
                raise SyncError(f"vLLM still has {stale} tokens of a prompt in its prefix cache, of older weights")
            engine.holds(version)

        with self.watch.phase("finish"):
            self._with_each(end)
        with self.watch.phase("check"):
            self._with_each(check)

    def _joined(self, within_s: float | None = None) -> None:
        """Wait until every engine has loaded, or failed to."""
        self._with_each(lambda engine: self._loading[engine].result(), within_s)

    def _with_each(self, work: Callable[[Engine], object], within_s: float | None = None) -> None:
        """Do `work` with all engines at the same time. Raises an error only if it is not an engine's, or the last's.

        An engine that takes longer than `within_s` (none: sync.timeout_s) is silent, and is waited for no longer."""
        within_s = self._timeout_s if within_s is None else within_s
        asked = {engine: self._threads.submit(work, engine) for engine in self.engines}
        _, late = wait(asked.values(), within_s)
        setting = f"sync.timeout_s={self._timeout_s:g}"
        death = ServerDied(f"the rollout server has not answered in {within_s:.3g} s of an update ({setting})")
        failures: list[Exception] = []
        others: list[Exception] = []
        for engine, future in asked.items():
            error = death if future in late else future.exception()
            if not isinstance(error, Exception):
                continue
            if isinstance(error, (ServerError, OSError)) and engine.is_gone:
                error = ServerDied("the rollout server is gone, and its folder with it")
            elif isinstance(error, ServerError) and not isinstance(error, ServerDied):
                error = UpdateFailed(f"the server's weights were not replaced: {error}")
            if not isinstance(error, (ServerDied, UpdateFailed)):
                others.append(error)
                continue
            engine.fail(error)
            self.engines.remove(engine)
            failures.append(error)
        if others:  # weights that are not those that were sent first
            raise min(others, key=lambda error: not isinstance(error, SyncError))
        if not self.engines:
            raise min(failures, key=lambda error: isinstance(error, ServerDied), default=ServerDied("no engine runs"))

    def close(self) -> None:
        self._sender.give_up()
        self._threads.shutdown()
        self._sender.close()


def _require_whole(engine: Engine, reports: Sequence[Mapping[str, Any]]) -> None:
    """Raise TransferError where a transfer broke off for one of an engine's workers."""
    if broken := [report["broken"] for report in reports if "broken" in report]:
        engine.state = State.STARTED
        raise TransferError(f"engine {engine.number}: {broken[0]}")


def held_problem(
    sent: Mapping[str, str], previous: Mapping[str, str], reports: Sequence[Mapping[str, Any]], num_workers: int
) -> str | None:
    """What is wrong with what an engine's workers say that their models hold (`transport/content.py`), in one line.

    sent: digest of each tensor, in order; previous: of the sync before.
    """
    if len(reports) != num_workers:
        return f"{len(reports)} of vLLM's {num_workers} workers say what their models hold"
    digests = list(sent.values())
    unheld = [set(report.get("unheld", ())) for report in reports]
    nowhere = [name for number, name in enumerate(sent) if all(number in each for each in unheld)]
    for worker, report in enumerate(reports):
        if "error" in report:
            return f"vLLM's worker {worker} cannot say what its model holds: {report['error']}"
        wrong = dict(report["wrong"])
        wrong |= {name: "no parameter of vLLM's model has it" for name in nowhere}
        if report["held"] != digests:
            for (name, value), held in zip(sent.items(), report["held"], strict=True):
                if held != value:
                    usual = wrong.get(name, "it has other values")
                    wrong[name] = "it holds what the sync before sent" if held == previous.get(name) else usual
        if wrong:
            listed = some([f"{name} ({why})" for name, why in wrong.items()])
            return f"vLLM's worker {worker} does not hold the weights that were sent: {listed}"
    return None
