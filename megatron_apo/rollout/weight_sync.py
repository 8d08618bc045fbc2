"""Puts the trainer's weights into running vLLM engines, and has it proven that they are there.

    sync = WeightSync(source, engines)                          # on rank 0
    sync = WeightSync(source, rank=rank, group=group)           # on every other trainer rank
    sync.sync(version)      pause -> buckets, while vLLM loads -> finish(version) -> what do the models hold? -> resume

The only file that knows vLLM's transfer contract on the trainer's side (distributed/weight_transfer/base.py, 0.32), by
which an engine's client is a VLLMWeightSyncClient. How buckets travel: `transport/`; whether vLLM computes as the
trainer does: `proof.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_apo.rollout.engine import Answer, Engine, at_once
from megatron_apo.rollout.server import ServerDied, ServerError
from megatron_apo.rollout.transport.base import Sender, told
from megatron_apo.rollout.transport.shm import ShmSender
from megatron_apo.telemetry.timers import Stopwatch
from megatron_apo.telemetry.units import some
from megatron_apo.weights.digest import digest, digest_kind
from megatron_apo.weights.plan import Bucket, Plan

SENDERS: dict[str, Callable[[Plan], Sender]] = {"shm": ShmSender}


class SyncError(RuntimeError):
    """An engine does not hold the trainer's weights. It is paused and stays so: restart it and sync anew."""


class UpdateFailed(SyncError):
    """A weight update raised in an engine. After that vLLM would mix two versions, or refuse to go on."""


class Source(Protocol):
    """The trainer's weights in HF names and full shapes (`weights/gather.py`). `plan` is the same on every rank."""

    @property
    def plan(self) -> Plan: ...

    def buckets(
        self,
        to: str,
        buffer_of: Callable[[Bucket], Tensor] | None = None,
        has_room: Callable[[Bucket], bool] | None = None,
    ) -> Generator[tuple[Bucket, Tensor], None, None]:
        """Collective over the trainer's ranks. On rank 0 each bucket of the plan and its bytes. Who leaves it before
        its end closes it, so that the other ranks hear of it."""


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
        rank: int = 0,
        group: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        transport: str = "shm",
    ):
        """`engines` are rank 0's, which may add to them. `rank` is in `group`, in which the others wait for rank 0 (see
        `Topology.broadcast`), the default group for None; without torch.distributed there is rank 0 alone. `device`:
        where the weights are (None: host memory). `transport`: one of SENDERS."""
        self.source = source
        self.engines = engines
        self.rank = rank
        self.group = group
        self.sent: list[dict[str, str]] = []  # digests by tensor, of the last two versions
        self._device = device or torch.device("cpu")
        self._digest_kind = digest_kind(self._device)
        self._transport = transport
        self._sender = SENDERS[transport](source.plan)
        self._version: int | None = None

    @cached_property
    def init_info(self) -> dict[str, Any]:
        """What engines are told once (`Engine.connect`)."""
        return {"transport": self._transport, "digest": self._digest_kind, "buckets": told(self.source.plan)}

    def sync(self, version: int, engines: Sequence[Engine] | None = None) -> SyncReport:
        """Replace the weights of `engines` (rank 0's; none: of all that answer) and label them `version`.

        They are given the weights at the same time, and one that fails (`Engine.fail`) does not keep the others from
        theirs; what the last of them failed with is raised: ServerDied, or UpdateFailed. Raises SyncError on every
        rank where the weights could not be gathered, or an engine's model then holds others than were sent; what is
        wrong is named, and engines that do not hold the weights stay paused. Nothing is left of it in any case.
        """
        start = time.monotonic()
        watch = Stopwatch()
        update = None
        if self.rank == 0:
            chosen = [one for one in self.engines if one.answers] if engines is None else engines
            update = _Update(chosen, self._sender, watch)
        try:
            self._together(update, lambda update: update.begin())
            is_shared = self._share_memory()
            self._together(update, lambda update: self._send(update, is_shared), lambda: self._send(None, is_shared))
            previous = self._previous(version)
            self._together(update, lambda update: update.finish(version, previous))
        finally:
            if update:
                update.close()
        if update is None:
            return SyncReport(version, time.monotonic() - start, 0, {})
        self._version, self.sent = version, [previous, update.digests]
        seconds = time.monotonic() - start
        return SyncReport(version, seconds, self.source.plan.num_bytes, update.digests, dict(watch.seconds))

    def source_digests(self) -> dict[str, str]:
        """Digests of the trainer's weights as they are now, on rank 0; collective, as a sync is."""
        with closing(self.source.buckets("driver")) as buckets:
            return {
                meta.name: digest(view, self._digest_kind)
                for bucket, buffer in buckets
                for meta, view in zip(bucket.tensors, bucket.views(buffer), strict=True)
            }

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

    def _share_memory(self) -> bool:
        """Whether all ranks can write where the workers read. Collective."""
        if self._device.type != "cpu" or not dist.is_initialized():
            return False
        place = self.on_rank_0(self._sender.place)
        answers: list[bool] = [False] * dist.get_world_size(self.group)
        dist.all_gather_object(answers, self.rank == 0 or self._sender.join(place), group=self.group)
        return all(answers)

    def _send(self, update: _Update | None, is_shared: bool) -> None:
        """Bring all buckets to the engines, on every rank. Collective."""
        try:
            if is_shared:
                buckets = self.source.buckets(
                    "shared", update.buffer_of if update else self._sender.buffer_of, update and update.has_room
                )
            else:  # what is on a GPU is put together and digested there
                in_place = update is not None and self._device.type == "cpu"
                buckets = self.source.buckets("driver", update.buffer_of if update and in_place else None)
            with closing(buckets):
                if update is None:
                    for _ in buckets:
                        pass
                    return
                with update.watch.phase("gather"):
                    for bucket, buffer in buckets:
                        update.send(bucket, buffer, self._digest_kind)
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
        except (ServerDied, SyncError) as failure:
            error = failure
        except (ValueError, OSError) as failure:
            error = SyncError(f"the weights were not written: {failure}")
        self.raise_together(error)

    def on_rank_0(self, work: Callable[[], Answer]) -> Answer:
        """Its value, or its error, on every rank."""
        value, error = None, None
        if self.rank == 0:
            try:
                value = work()
            except Exception as failure:  # whatever it is, the others wait for an answer
                error = failure
        self.raise_together(error)
        box = [value]
        if dist.is_initialized():
            dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank if there is an error on any."""
        if not dist.is_initialized():
            if error is not None:
                raise error
            return
        errors: list[tuple[type[Exception], str] | None] = [None] * dist.get_world_size(self.group)
        kind = type(error) if isinstance(error, (ServerError, SyncError)) else SyncError
        dist.all_gather_object(errors, None if error is None else (kind, str(error)), group=self.group)
        if error is not None:
            raise error
        for rank, failure in enumerate(errors):
            if failure is not None:
                raise failure[0](f"rank {rank}: {failure[1]}")


class _Update:
    """One update of the weights of several engines, on rank 0. Engines that fail leave it."""

    def __init__(self, engines: Sequence[Engine], sender: Sender, watch: Stopwatch):
        self.engines = list(engines)
        self.digests: dict[str, str] = {}
        self.watch = watch
        self._sender = sender
        self._threads = ThreadPoolExecutor(max(1, len(self.engines)), "update")
        self._loading: dict[Engine, Future[None]] = {}

    def begin(self) -> None:
        """Engines are paused, and wait for the first bucket."""
        with self.watch.phase("pause"):
            self._with_each(lambda engine: engine.client.pause())
            while not self._opened():
                pass
            self._loading = {engine: self._threads.submit(self._load, engine) for engine in self.engines}

    def _opened(self) -> bool:
        """False where an engine has died meanwhile, whose folder goes with it; it has left the update then."""
        before, end = len(self.engines), time.monotonic() + 2.0
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

    def _load(self, engine: Engine) -> None:
        try:
            info = self._sender.update_info(engine)
            engine.client.start_weight_update()
            engine.client.update_weights({"where": info})
        finally:
            self._sender.drop(engine)

    def has_room(self, bucket: Bucket) -> bool:
        return self._sender.has_room(bucket)

    def buffer_of(self, bucket: Bucket) -> Tensor:
        """Where a bucket is to be put together, once all engines have read what was there.

        Raises UpdateFailed or ServerDied where no engine is left that reads on."""
        with self.watch.phase("wait"):
            while not self._sender.has_room(bucket):
                time.sleep(2e-4)
        if all(future.done() for future in self._loading.values()):

            def unread(engine: Engine) -> None:
                raise ServerError(f"vLLM was done before it had read {bucket.tensors[0].name}")

            self._joined()
            self._with_each(unread)
        return self._sender.buffer_of(bucket)

    def send(self, bucket: Bucket, buffer: Tensor, kind: str) -> None:
        """A bucket is put together, in the transport's memory or elsewhere."""
        with self.watch.phase("digest"):
            for meta, view in zip(bucket.tensors, bucket.views(buffer), strict=True):
                self.digests[meta.name] = digest(view, kind)
        target = self._sender.buffer_of(bucket)
        if target.data_ptr() != buffer.data_ptr():
            self.buffer_of(bucket).copy_(buffer)
        self._sender.publish(bucket)

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

    def _joined(self) -> None:
        """Wait until every engine has loaded, or failed to."""
        self._with_each(lambda engine: self._loading[engine].result())

    def _with_each(self, work: Callable[[Engine], object]) -> None:
        """Do `work` with all engines at the same time. Raises an error only if it is not an engine's, or the last's."""
        failures: list[Exception] = []
        for engine, error in at_once(self.engines, work).items():
            if not isinstance(error, Exception):
                continue
            if isinstance(error, (ServerError, OSError)) and not engine.payload_dir.exists():  # it goes with the server
                error = ServerDied(f"the rollout server is gone, and its folder {engine.payload_dir} with it")
            elif isinstance(error, ServerError) and not isinstance(error, ServerDied):
                error = UpdateFailed(f"the server's weights were not replaced: {error}")
            if not isinstance(error, (ServerDied, UpdateFailed)):
                raise error
            engine.fail(error)
            self.engines.remove(engine)
            failures.append(error)
        if not self.engines:
            raise min(failures, key=lambda error: isinstance(error, ServerDied), default=ServerDied("no engine runs"))

    def close(self) -> None:
        self._sender.give_up()
        self._threads.shutdown()
        self._sender.close()


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
