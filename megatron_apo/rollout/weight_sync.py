"""Puts the trainer's weights into running vLLM engines.

    sync = WeightSync(source, engines)                          # on rank 0
    sync = WeightSync(source, rank=rank, group=group)           # on every other trainer rank
    sync.sync(version)      pause -> write once -> start, update -> compare checksums -> finish(version) -> resume

The only file that knows vLLM's transfer contract on the trainer's side (distributed/weight_transfer/base.py, 0.32).
It keeps to that contract's shapes (`source` is a WeightSource, an engine's client a VLLMWeightSyncClient) without
importing vLLM, which may live in another environment. Whether vLLM computes with what it loaded: `proof.py`.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_apo.rollout.engine import Answer, Engine, at_once
from megatron_apo.rollout.payload import PayloadWriter, publish, read_loaded
from megatron_apo.rollout.server import ServerDied, ServerError
from megatron_apo.telemetry.units import some
from megatron_apo.weights.safetensors_file import Meta, checksum


class SyncError(RuntimeError):
    """An engine does not hold the trainer's weights. It is paused and stays so: restart it and sync anew."""


class UpdateFailed(SyncError):
    """A weight update raised in an engine. After that vLLM would mix two versions, or refuse to go on."""


class Source(Protocol):
    """The trainer's weights in HF names and full shapes. Iteration is a collective over the trainer's ranks, fresh each
    time, and agrees with `metadata()` element for element; the tensors matter on rank 0 only."""

    def metadata(self) -> Sequence[Meta]: ...
    def __iter__(self) -> Iterator[tuple[str, Any]]: ...


@dataclass(frozen=True)
class SyncReport:
    """One finished sync. On ranks other than 0 only `version` and `seconds` are filled."""

    version: int
    seconds: float
    num_bytes: int
    checksums: dict[str, str]


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
    ):
        """`engines` are rank 0's, which may add to them. `rank` is in `group`, in which the others wait for rank 0 (see
        `Topology.broadcast`), the default group for None; without torch.distributed there is rank 0 alone."""
        self.source = source
        self.engines = engines
        self.rank = rank
        self.group = group
        self.checksums: list[dict[str, str]] = []  # of the last two versions
        self._version: int | None = None

    def sync(self, version: int, engines: Sequence[Engine] | None = None) -> SyncReport:
        """Replace the weights of `engines` (rank 0's; none: of all that answer) and label them `version`.

        They are given the weights at the same time, and one that fails (`Engine.fail`) does not keep the others from
        theirs; what the last of them failed with is raised: ServerDied, or UpdateFailed. Raises SyncError on every
        rank where the weights could not be gathered, or an engine loaded others than were sent; what is wrong is named,
        and engines that do not hold the weights stay paused. The payload is deleted in any case.
        """
        start = time.monotonic()
        metadata = self.source.metadata()
        update = None
        if self.rank == 0:
            update = _Update([one for one in self.engines if one.answers] if engines is None else engines, metadata)
        try:
            error = update.attempt(update.begin) if update else None
            self.raise_together(error)  # so that the engines are waited for here, and no gathering begins before
            # The iteration is a collective: once begun, rank 0 goes through all of it, whatever has failed meanwhile.
            try:
                for name, tensor in self.source:
                    if update and error is None:
                        error = update.attempt(update.add, name, tensor)
            except (ValueError, RuntimeError, OSError) as failure:
                error = SyncError(f"the trainer's weights could not be gathered: {failure}")
            if update and error is None:
                error = update.attempt(update.finish, version)
            self.raise_together(error)
        finally:
            if update:
                update.remove()
        if update is None:
            return SyncReport(version, time.monotonic() - start, 0, {})
        previous = self.checksums if version != self._version else self.checksums[:-1]  # else told to some engines late
        self._version, self.checksums = version, [*previous[-1:], update.payload.checksums]
        return SyncReport(version, time.monotonic() - start, update.payload.num_bytes, update.payload.checksums)

    def source_checksums(self) -> dict[str, str]:
        """Checksums of the trainer's weights as they are now, on rank 0; collective, as a sync is."""
        return {name: checksum(tensor) for name, tensor in self.source if self.rank == 0}

    def suspects(self, expected: dict[str, str] | None) -> list[str]:
        """Tensors of the last sync that are other than expected, by their checksums."""
        latest = self.checksums[-1] if self.checksums else {}
        return [name for name, value in (expected or {}).items() if latest.get(name) != value]

    def unchanged(self) -> list[str]:
        """Tensors that the last two syncs sent alike, if they did not send everything alike."""
        if len(self.checksums) < 2:
            return []
        previous, latest = self.checksums
        same = [name for name, value in latest.items() if previous.get(name) == value]
        return same if len(same) < len(latest) else []

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
        told: list[tuple[type[Exception], str] | None] = [None] * dist.get_world_size(self.group)
        kind = type(error) if isinstance(error, (ServerError, SyncError)) else SyncError
        dist.all_gather_object(told, None if error is None else (kind, str(error)), group=self.group)
        if error is not None:
            raise error
        for rank, failure in enumerate(told):
            if failure is not None:
                raise failure[0](f"rank {rank}: {failure[1]}")


class _Update:
    """One update of the weights of several engines, on rank 0. Engines that fail leave it."""

    def __init__(self, engines: Sequence[Engine], metadata: Sequence[Meta]):
        self.engines = list(engines)
        self.payload = _Payload(metadata)

    def attempt(self, step: Callable[..., None], *arguments: Any) -> Exception | None:
        """Take a step; return its error, if any, as one line."""
        try:
            step(*arguments)
        except (ServerDied, SyncError) as error:
            return error
        except (ValueError, OSError) as error:
            return SyncError(f"the weights were not written: {error}")
        return None

    def begin(self) -> None:
        self._with_each(lambda engine: engine.client.pause())
        self._with_each(self.payload.open)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.payload.writer.add(name, tensor)

    def finish(self, version: int) -> None:
        self.payload.writer.close()

        def load(engine: Engine) -> None:
            self.payload.publish(engine)
            engine.client.start_weight_update()
            engine.client.update_weights(self.payload.update_info(engine))
            self.payload.compare(engine)
            engine.client.finish_weight_update(str(version))
            engine.client.resume()
            engine.holds(version)

        self._with_each(load)

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

    def remove(self) -> None:
        self.payload.remove()


class _Payload:
    """What the `shm` transport sends: one file, written once, with a name in a folder of each engine.

    Each engine's workers write down beside it what they loaded. Its folders go with the engines, so that none is left,
    and the file lasts for the others.
    """

    def __init__(self, metadata: Sequence[Meta]):
        self.metadata = metadata
        self.folders: dict[Engine, Path] = {}
        self.writer: PayloadWriter
        self._opening = Lock()

    @property
    def checksums(self) -> dict[str, str]:
        return self.writer.checksums

    @property
    def num_bytes(self) -> int:
        return self.writer.num_bytes

    def open(self, engine: Engine) -> None:
        folder = Path(tempfile.mkdtemp(prefix="weights-", dir=engine.payload_dir))
        self.folders[engine] = folder
        with self._opening:
            if hasattr(self, "writer"):
                self.writer.link(folder)
            else:
                self.writer = PayloadWriter(folder, self.metadata)

    def publish(self, engine: Engine) -> None:
        publish(self.folders[engine])

    def update_info(self, engine: Engine) -> dict[str, Any]:
        return {
            "folder": str(self.folders[engine]),
            "names": [meta.name for meta in self.metadata],
            "dtypes": [str(meta.dtype) for meta in self.metadata],
            "shapes": [list(meta.shape) for meta in self.metadata],
        }

    def compare(self, engine: Engine) -> None:
        """Every worker of the engine loaded every tensor as it was written."""
        loaded = read_loaded(self.folders[engine])
        if len(loaded) != engine.num_workers:
            raise SyncError(f"{len(loaded)} of vLLM's {engine.num_workers} workers say what they loaded")
        for worker, checksums in loaded.items():
            wrong = [name for name, value in self.checksums.items() if checksums.get(name) != value]
            if wrong:
                raise SyncError(f"vLLM's worker {worker} loaded other values of {some(wrong)}")

    def remove(self) -> None:
        if hasattr(self, "writer"):
            self.writer.abandon()
        for folder in self.folders.values():
            shutil.rmtree(folder, ignore_errors=True)
