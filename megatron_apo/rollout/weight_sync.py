"""Puts the trainer's weights into a running vLLM server, and proves that they are there.

    sync = WeightSync(source, client=client, folder=server.payload_dir)         # on rank 0
    sync = WeightSync(source, rank=rank, group=group)                           # on every other trainer rank
    sync.sync(version)      pause -> write -> start, update -> compare checksums -> finish(version) -> resume
    sync.prove(...)         vLLM's log-probs of probe tokens equal the trainer's

The only file that knows vLLM's transfer contract on the trainer's side (distributed/weight_transfer/base.py, 0.32).
It keeps to that contract's shapes (`source` is a WeightSource, `client` a VLLMWeightSyncClient) without importing vLLM,
which may live in another environment.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_apo.rollout.client import RolloutClient
from megatron_apo.rollout.payload import PayloadWriter, read_loaded
from megatron_apo.rollout.server import ServerDied, ServerError
from megatron_apo.telemetry.units import some
from megatron_apo.weights.safetensors_file import Meta, checksum


class SyncError(RuntimeError):
    """The server does not hold the trainer's weights. It is paused and stays so: restart it and sync anew."""


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
        *,
        client: RolloutClient | None = None,
        folder: Path | None = None,
        rank: int = 0,
        group: dist.ProcessGroup | None = None,
    ):
        """`client` and `folder` (where payloads are written, readable by vLLM's workers) are rank 0's. `rank` is in
        `group`, in which the others wait for rank 0 (see `Topology.broadcast`), the default group for None; without
        torch.distributed there is rank 0 alone."""
        assert (rank == 0) == (client is not None) == (folder is not None), "rank 0 alone talks to the server"
        self.source = source
        self.client = client
        self.folder = folder
        self.rank = rank
        self.group = group
        self.num_workers = 0
        self.checksums: list[dict[str, str]] = []  # of the last two syncs

    def init(self) -> None:
        """Meet the server. Raises ServerError, on every rank."""

        def meet() -> None:
            assert self.client is not None
            self.client.init_weight_transfer_engine({})
            self.num_workers = self.client.num_workers()

        self._on_rank_0(meet)

    def sync(self, version: int) -> SyncReport:
        """Replace the server's weights and label them `version`.

        Raises SyncError (or ServerDied), naming what is wrong, on every rank; the server then stays paused. The payload
        is deleted in any case.
        """
        start = time.monotonic()
        metadata = self.source.metadata()
        update = _Update(self.client, self.folder, metadata, self.num_workers) if self.rank == 0 else None
        try:
            error = update.attempt(update.begin) if update else None
            self._raise_together(error)  # so that the server is waited for here, and no gathering begins before
            # The iteration is a collective: once begun, rank 0 goes through all of it, whatever has failed meanwhile.
            try:
                for name, tensor in self.source:
                    if update and error is None:
                        error = update.attempt(update.add, name, tensor)
            except (ValueError, RuntimeError, OSError) as failure:
                error = SyncError(f"the trainer's weights could not be gathered: {failure}")
            if update and error is None:
                error = update.attempt(update.finish, str(version))
            self._raise_together(error)
        finally:
            if update:
                update.remove()
        if update:
            self.checksums = [*self.checksums[-1:], update.writer.checksums]
        num_bytes, checksums = (update.writer.num_bytes, update.writer.checksums) if update else (0, {})
        return SyncReport(version, time.monotonic() - start, num_bytes, checksums)

    def prove(
        self,
        sequences: Sequence[Sequence[int]] = (),
        log_probs: Sequence[Sequence[float]] = (),
        tolerance: float = 1e-4,
        expected_checksums: dict[str, str] | None = None,
    ) -> float:
        """Compare vLLM's log-probs of `sequences` with the trainer's; return the largest absolute difference.

        Arguments count on rank 0 only, the result is on every rank. `log_probs[i]` are, at temperature 1, of
        `sequences[i]`'s tokens but the first, or of its last `len(log_probs[i])` tokens. `expected_checksums` (name ->
        checksum, of all tensors or some) are of the weights that the trainer's log-probs were computed with.
        Raises SyncError beyond `tolerance`, or where the last sync sent other tensors than expected, naming the worst
        token and the tensors to blame as far as checksums tell: those that differ from `expected_checksums`, else those
        that came unchanged in the last sync while others changed. The server is then paused.
        """
        worst = [0.0]

        def compare() -> None:
            assert self.client is not None
            worst[0], where = _largest_difference(sequences, self.client.score(sequences), log_probs)
            latest = self.checksums[-1] if self.checksums else {}
            suspects = [name for name, value in (expected_checksums or {}).items() if latest.get(name) != value]
            if worst[0] <= tolerance and not suspects:
                return
            suspects = suspects or self._unchanged()
            self.client.pause()
            blame = f"stale: {some(suspects)}" if suspects else "no checksum is amiss: a copy that vLLM made is stale"
            difference = f"{worst[0]:.3g} (allowed: {tolerance:g})"
            raise SyncError(f"vLLM's log-probs differ from the trainer's by {difference} {where}; {blame}")

        self._on_rank_0(compare)
        if dist.is_initialized():
            dist.broadcast_object_list(worst, group=self.group, group_src=0)
        return worst[0]

    def source_checksums(self) -> dict[str, str]:
        """Checksums of the trainer's weights as they are now, on rank 0; collective, as a sync is."""
        return {name: checksum(tensor) for name, tensor in self.source if self.rank == 0}

    def _unchanged(self) -> list[str]:
        """Tensors that the last two syncs sent alike, if they did not send everything alike."""
        if len(self.checksums) < 2:
            return []
        previous, latest = self.checksums
        same = [name for name, value in latest.items() if previous.get(name) == value]
        return same if len(same) < len(latest) else []

    def _on_rank_0(self, work: Callable[[], None]) -> None:
        error = None
        if self.rank == 0:
            try:
                work()
            except (ServerError, SyncError) as failure:
                error = failure
        self._raise_together(error)

    def _raise_together(self, error: Exception | None) -> None:
        """Raise on every rank if there is an error on any."""
        if not dist.is_initialized():
            if error is not None:
                raise error
            return
        told: list[tuple[type[Exception], str] | None] = [None] * dist.get_world_size(self.group)
        kind = type(error) if isinstance(error, ServerError) else SyncError
        dist.all_gather_object(told, None if error is None else (kind, str(error)), group=self.group)
        if error is not None:
            raise error
        for rank, failure in enumerate(told):
            if failure is not None:
                raise failure[0](f"rank {rank}: {failure[1]}")


class _Update:
    """One update of the server's weights, on rank 0."""

    def __init__(self, client: RolloutClient | None, folder: Path | None, metadata: Sequence[Meta], num_workers: int):
        assert client is not None and folder is not None and num_workers, "call init() first"
        self.client = client
        self.metadata = metadata
        self.num_workers = num_workers
        self.parent = folder
        self.folder: Path | None = None
        self.writer: PayloadWriter

    def attempt(self, step: Callable[..., None], *arguments: Any) -> Exception | None:
        """Take a step; return its error, if any, as one line."""
        try:
            step(*arguments)
        except ServerDied as error:
            return error
        except (ServerError, SyncError, ValueError, OSError) as error:
            if not self.parent.exists():  # it goes with the server
                return ServerDied(f"the rollout server is gone, and its folder {self.parent} with it")
            return SyncError(f"the server's weights were not replaced: {error}")
        return None

    def begin(self) -> None:
        self.client.pause()
        self.folder = Path(tempfile.mkdtemp(prefix="weights-", dir=self.parent))
        self.writer = PayloadWriter(self.folder, self.metadata)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.writer.add(name, tensor)

    def finish(self, version: str) -> None:
        self.writer.close()
        self.client.start_weight_update()
        self.client.update_weights(
            {
                "folder": str(self.folder),
                "names": [meta.name for meta in self.metadata],
                "dtypes": [str(meta.dtype) for meta in self.metadata],
                "shapes": [list(meta.shape) for meta in self.metadata],
            }
        )
        self._compare()
        self.client.finish_weight_update(version)
        self.client.resume()

    def _compare(self) -> None:
        """Every worker loaded every tensor as it was written."""
        loaded = read_loaded(self.folder)
        if len(loaded) != self.num_workers:
            raise SyncError(f"{len(loaded)} of vLLM's {self.num_workers} workers say what they loaded")
        for worker, checksums in loaded.items():
            wrong = [name for name, value in self.writer.checksums.items() if checksums.get(name) != value]
            if wrong:
                raise SyncError(f"vLLM's worker {worker} loaded other values of {some(wrong)}")

    def remove(self) -> None:
        if hasattr(self, "writer"):
            self.writer.abandon()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _largest_difference(
    sequences: Sequence[Sequence[int]], ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]
) -> tuple[float, str]:
    """Largest |vLLM - trainer|, and where it is. Not-a-number counts as infinite."""
    worst, where = 0.0, "anywhere"
    for row, (tokens, server, trainer) in enumerate(zip(sequences, ours, theirs, strict=True)):
        first = len(tokens) - len(trainer)
        if first < 1:
            raise SyncError(
                f"probe sequence {row}: {len(trainer)} log-probs for {len(tokens)} tokens, the first has none"
            )
        difference = (torch.tensor(server[first - 1 :]).double() - torch.tensor(trainer).double()).abs()
        difference = difference.nan_to_num(nan=float("inf"))
        if len(difference) and difference.max() > worst:
            at = int(difference.argmax())
            worst = float(difference[at])
            where = (
                f"at probe sequence {row}, position {first + at}, token {tokens[first + at]}: "
                f"vLLM {server[first - 1 + at]:.6f}, trainer {trainer[at]:.6f}"
            )
    return worst, where
