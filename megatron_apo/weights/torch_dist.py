"""Reads and writes Megatron-Core's distributed checkpoints (`torch_dist`), which any TP x PP x EP x DP can load.

Everything here is collective over all ranks. The files hold pickles: a folder from elsewhere must be trusted.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import torch as mcore_torch
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.fp8_utils import is_float8tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_apo.runtime.collective import on_driver
from megatron_apo.runtime.topology import Topology
from megatron_apo.weights.files import CheckpointError, write_list
from megatron_apo.weights.whole_folder import whole_folder

# Every layer and every expert a tensor of its own: Megatron-Core keeps the stacked kind for old checkpoints only
# (transformer_block.py, `sharded_state_dict`). Written into the checkpoint, where Megatron-LM looks for it.
LAYOUT = {"singleton_local_shards": True}
# load(key of a sharded tensor) -> its value
Load = Callable[[str], torch.Tensor]


def sharded_state(model: torch.nn.Module) -> dict[str, Any]:
    """The model's parameters as Megatron-Core describes them to a checkpoint, by parameter name."""
    return model.sharded_state_dict(metadata=dict(LAYOUT))  # into which it writes a group


def write(
    folder: Path,
    topology: Topology,
    state: dict[str, Any],
    complete: Callable[[Path], None],
    load: Load | None = None,
) -> None:
    """Save the sharded `state` as `folder`, whole or not at all; `complete(path)`, called on every rank at the end,
    adds further files. All of them are listed (`write_list`).

    load: where the state's tensors are on the meta device, their values, each asked for when it is written.
    """
    with whole_folder(folder, topology) as partial:
        strategy = _InProcess("torch_dist", 1, load)
        with one_line_errors(f"{folder}: the checkpoint could not be written"), _no_archive_checksums():
            dist_checkpointing.save(state, str(partial), sharded_strategy=strategy, content_metadata=dict(LAYOUT))
        complete(partial)
        digests: list[dict[str, str]] = [{}] * topology.world_size
        torch.distributed.all_gather_object(digests, strategy.digests)
        known = {name: digest for one in digests for name, digest in one.items()}
        on_driver(topology, lambda: write_list(partial, known))


def read(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The values of the sharded `state`, in its nesting, read into the memory that it describes where it describes any.
    `CheckpointError` for tensors that `folder` lacks."""
    _merge_in_place(state)
    with one_line_errors(f"{folder}: the checkpoint could not be read"):
        return dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)


def load_model(chunks: Sequence[torch.nn.Module], folder: Path) -> None:
    """Copy this rank's weights from `folder` into its model chunks, cast to each parameter's dtype."""
    found = read(folder, {str(index): sharded_state(chunk) for index, chunk in enumerate(chunks)})
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(found[str(index)])


def _merge_in_place(state: dict[str, Any]) -> None:
    """Let the parts of a tensor, which Megatron-Core reads into views of it, not be joined in new memory: the gates and
    ups of all layers at a time, 2/3 of a dense model's weights."""

    def merging(whole: torch.Tensor, merge: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
        def merged(parts: Any) -> torch.Tensor:
            return whole if next(nested_values(parts)).data_ptr() == whole.data_ptr() else merge(parts)

        return merged

    for value in nested_values(state):
        # An FP8 weight is read into another tensor, by Megatron-Core's `force_all_tensors_to_non_fp8`.
        if isinstance(value, ShardedTensorFactory) and not is_float8tensor(value.data):
            value.merge_fn = merging(value.data, value.merge_fn)


class _InProcess(mcore_torch.TorchDistSaveShardedStrategy):
    """Megatron-Core's format, written in the calling process.

    Megatron-Core's writer starts a manager process by spawn and forks one process a file (filesystem_async.py,
    `_get_write_results_queue`) even when the caller waits: two seconds at the first save, a hang in a script without
    a `__main__` guard, and a fork of a process that holds GPUs.

    digests: sha256 of the files that this rank has written, by name.
    """

    def __init__(self, backend: str, version: int, load: Load | None):
        super().__init__(backend, version)
        self._load = load
        self.digests: dict[str, str] = {}

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        state, _, _ = mcore_torch._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        torch_checkpoint.save(
            mcore_torch.mcore_to_pyt_state_dict(state, False),
            storage_writer=_OneByOne(checkpoint_dir, self.digests),
            planner=_Planner(self._load),
        )


class _Planner(mcore_torch.MCoreSavePlanner):
    def __init__(self, load: Load | None):
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._load = load

    def resolve_data(self, write_item: WriteItem) -> Any:
        if self._load is None or write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        return self._load(write_item.index.fqn)


class _OneByOne(FileSystemWriter):
    """One file a rank, of one tensor after the other.

    torch's own keeps every tensor of a file until the file is closed (filesystem.py, `_write_files_from_queue`), which
    for tensors on a GPU, or made as they are written, is a second copy of all of them.
    """

    def __init__(self, folder: Path, digests: dict[str, str]):
        super().__init__(folder)
        self._digests = digests

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        results = []
        with _File(io.FileIO(self.fs.concat_path(self.path, name), "w")) as file:
            for item in plan.items:
                start = file.tell()
                data = planner.resolve_data(item)
                if item.type == WriteItemType.BYTE_IO:
                    file.write(data.getbuffer())
                else:
                    file.save(_alone(data))
                length = file.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
            file.flush()
            os.fsync(file.fileno())
        self._digests[name] = file.digest.hexdigest()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


class _File(io.BufferedWriter):
    """Hashes what is written, and says why a write failed: torch.save raises an error of its own, of positions in its
    archive."""

    error: OSError | None = None

    def __init__(self, raw: io.RawIOBase):
        super().__init__(raw)
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise

    def save(self, tensor: torch.Tensor) -> None:
        try:
            torch.save(tensor, self)
        except RuntimeError as error:
            raise self.error or error from None


@contextmanager
def _no_archive_checksums() -> Iterator[None]:
    """torch.save's own CRC takes twice as long as the rest of it, and torch.load does not look at it."""
    usual = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(usual)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, with a storage that holds nothing else: torch.save writes whole storages."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


@contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Failures as `CheckpointError` of one line. torch reports one on any rank on all of them, but by an exception that
    no `except Exception` sees."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if not isinstance(cause, Exception):
            raise cause from None  # Ctrl-C or SIGTERM, which torch takes for a failure of its own
        raise CheckpointError(f"{what}: rank {rank}: {' '.join(str(cause).split())}") from error
    except (CheckpointingException, OSError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{what}: {' '.join(str(error).split())}") from error
