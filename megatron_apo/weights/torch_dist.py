"""Reads and writes Megatron-Core's distributed checkpoints (`torch_dist`), which any TP x PP x DP can load.

Everything here is collective over all ranks. The files hold pickles: a folder from elsewhere must be trusted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import torch as mcore_torch
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megatron_apo.parallel.topology import Topology
from megatron_apo.rollout.failures import on_driver

PARTIAL = ".partial"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read."""


class _InProcess(mcore_torch.TorchDistSaveShardedStrategy):
    """Megatron-Core's format written by torch's own writer, in the calling process.

    Megatron-Core's writer starts a manager process by spawn and forks one process a file (filesystem_async.py,
    `_get_write_results_queue`) even when the caller waits: two seconds at the first save, a hang in a script without
    a `__main__` guard, and a fork of a process that holds GPUs.
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        state, _, _ = mcore_torch._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        torch_checkpoint.save(
            mcore_torch.mcore_to_pyt_state_dict(state, False),
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir),
            planner=mcore_torch.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def write(folder: Path, topology: Topology, state: dict[str, Any], complete: Callable[[Path], None]) -> None:
    """Save the sharded `state` as `folder`; `complete(path)` adds further files, on the driver.

    All is written as `folder`.partial, forced to disk and renamed: `folder` is there whole or not at all.
    """
    partial = folder.with_name(folder.name + PARTIAL)

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)  # of a save that was killed
        partial.mkdir(parents=True)

    def publish() -> None:
        complete(partial)
        for path in [*partial.rglob("*"), partial]:
            _to_disk(path)
        os.rename(partial, folder)
        _to_disk(folder.parent)

    on_driver(topology, begin)
    with _one_line_errors(f"{folder}: the checkpoint could not be written"):
        dist_checkpointing.save(state, str(partial), sharded_strategy=_InProcess("torch_dist", 1))
    on_driver(topology, publish)


def read(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The values of the sharded `state`, in its nesting; `CheckpointError` for tensors that `folder` lacks."""
    with _one_line_errors(f"{folder}: the checkpoint could not be read"):
        return dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)


def load_model(model: torch.nn.Module, folder: Path) -> None:
    """Copy this rank's weights from `folder` into `model`, cast to each parameter's dtype."""
    model.load_state_dict(read(folder, {"model": model.sharded_state_dict()})["model"])


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """torch reports a failure on any rank on all of them, but by an exception that no `except Exception` sees."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{what}: rank {rank}: {' '.join(str(cause).split())}") from error
    except CheckpointingException as error:
        raise CheckpointError(f"{what}: {' '.join(str(error).split())}") from error
