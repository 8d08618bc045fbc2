"""The optimizer's state in checkpoints: each parameter's main weight and Adam's moments, in the parameter's own shape.

    sharded(optimizer, model)                   for Megatron-Core to save
    sharded(optimizer, model, is_loading=True)  for Megatron-Core to fill
    load(optimizer, state, model, folder)       takes over what was filled, and reads what was not

The distributed optimizer of a rank holds a range of the flattened parameters. Megatron-Core would read all of them on
every rank, 12 bytes for each of the model's parameters in main memory, and drop what is not the rank's own
(distrib_optimizer.py, `sharded_param_state_fully_reshardable`). Here each rank reads the rows of its own range, one
tensor after the other. `model` is `torch_dist.sharded_state` of each of the rank's model chunks, whose keys begin with
`prefix` in the checkpoint.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_apo.weights.files import CheckpointError
from megatron_apo.weights.torch_dist import LAYOUT, one_line_errors

RESHARDABLE = LAYOUT | {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
_CHAINED = re.compile(r"^chained_\d+\.")
# Megatron-Core's descriptions of a rank's tensor: one piece of a saved tensor, or several (gate and up lie apart).
Sharded = ShardedTensor | ShardedTensorFactory


def sharded(optimizer: Any, model: dict[int, dict[str, Any]], *, is_loading: bool = False) -> dict[str, Any]:
    """The state as Megatron-Core's sharded state, to be saved or filled. Collective.

    To be saved, it is in the parameters' own shapes, so that another layout can load it; for that, data-parallel rank 0
    gathers its shards in main memory. To be filled, it has nothing of a distributed optimizer: what is not sharded
    comes without being asked for, and `load` reads the rest.
    """
    if is_loading:
        _allocate(optimizer)
        if _distributed(optimizer):
            return {}
    with _compact_index(optimizer):
        return optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=RESHARDABLE)


def load(
    optimizer: Any, state: dict[Any, Any], model: dict[int, dict[str, Any]], folder: Path, *, prefix: str = ""
) -> None:
    """Take over the filled `state`; read what a distributed optimizer holds of its parameters from `folder`.

    Raises `CheckpointError` for a tensor that is missing there or of another shape.
    """
    parts = optimizer.chained_optimizers  # experts have one of their own
    if not _distributed(optimizer):
        for index, part in enumerate(parts):
            part.load_state_dict(state if len(parts) == 1 else state[index])
        return
    found, _ = extract_sharded_tensors_and_factories(model)
    described: dict[Tensor, Sharded] = {description.data: description for description in nested_values(found)}
    tensors = _Tensors(folder, prefix)
    for part, own in zip(parts, _common_states(state, len(parts)), strict=True):
        part.load_state_dict(own)
        if isinstance(part.optimizer, torch.optim.Adam):
            for parameter_state in part.optimizer.state.values():
                # Megatron-Core leaves all parameters one `step` object, which each of them would count up.
                parameter_state["step"] = parameter_state["step"].clone()
        _load_parameters(part, described, tensors)


def _common_states(state: dict[Any, Any], num_parts: int) -> list[dict[str, Any]]:
    """Each part's settings and step, of which the checkpoint may have another number: with expert ranks the experts
    have an optimizer of their own, with the same settings."""
    saved = [state] if "optimizer" in state else [state[index] for index in sorted(state)]
    saved = [{key: value for key, value in one.items() if not key.startswith("param_state")} for one in saved]
    if len(saved) == num_parts:
        return saved
    groups = saved[0]["optimizer"]["param_groups"]
    both = [group | {"is_expert_parallel": experts} for experts in (False, True) for group in groups]
    return [saved[0] | {"optimizer": saved[0]["optimizer"] | {"param_groups": both}} for _ in range(num_parts)]


@torch.no_grad()
def _load_parameters(part: Any, described: dict[Tensor, Sharded], tensors: _Tensors) -> None:
    """Read a distributed optimizer's own range of each parameter, one tensor at a time.

    Megatron-Core's `load_parameter_state_from_fully_reshardable` hands over the three tensors of a parameter at once.
    """
    by_name = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    for parameter in part.model_param_gbuf_map:
        own = part._get_model_param_range_map(parameter)["param"]
        for name in ("param", "exp_avg", "exp_avg_sq"):
            others = {} if by_name else part._get_main_param_and_optimizer_states(parameter)  # copied to themselves
            read = tensors.read(f"optimizer.state.{name}", described[parameter], own.start, own.end)
            part._set_main_param_and_optimizer_states(parameter, others | {name: read})
            del read  # before the next one
    if isinstance(part.optimizer, HybridDeviceOptimizer):
        part.optimizer._sync_hdo_state_to_sub_optimizers()


class _Tensors:
    """Parts of a checkpoint's tensors, read by this process alone: of those whose keys begin with `prefix`."""

    def __init__(self, folder: Path, prefix: str):
        self._prefix = prefix
        self._error = f"{folder}: the checkpoint could not be read"
        self._reader = FileSystemReader(folder)

    @cached_property
    def _saved(self) -> dict[str, tuple[str, Any]]:
        """Every tensor's key and description, by the key without the prefix and the number of its chained optimizer."""
        with one_line_errors(self._error):
            metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=False)
        return {
            _CHAINED.sub("", key.removeprefix(self._prefix)): (key, saved)
            for key, saved in metadata.state_dict_metadata.items()
            if key.startswith(self._prefix)
        }

    def read(self, prefix: str, description: Sharded, start: int, end: int) -> Tensor:
        """Elements `start` to `end` of a rank's flattened tensor, fp32 in main memory, of which no more is touched than
        the rows that have them. Its key is `prefix` and that of `description`."""
        whole = torch.empty(description.data.shape)
        for piece in _saved_slices(description, f"{prefix}.{description.key}", whole):
            rows = _rows(piece.data, start, end)
            if len(rows):
                self._fill(piece, rows)
        return whole.flatten()[start:end]

    def _fill(self, piece: ShardedTensor, rows: range) -> None:
        """Read some rows of a piece into its `data`."""
        key, saved = self._saved.get(piece.key, (self._prefix + piece.key, None))
        if not isinstance(saved, TensorStorageMetadata):
            raise CheckpointError(f"{self._error}: {key} is missing")
        # The vocabulary is padded to the layout that saved it.
        fixed = slice(1 if piece.allow_shape_mismatch else 0, None)
        if tuple(saved.size)[fixed] != tuple(piece.global_shape)[fixed]:
            raise CheckpointError(
                f"{self._error}: {key} has shape {list(saved.size)}, expected {list(piece.global_shape)}"
            )
        target = piece.data[rows.start : rows.stop]
        if piece.allow_shape_mismatch:
            target.zero_()
        offsets = torch.Size((piece.global_offset[0] + rows.start, *piece.global_offset[1:]))
        for item in create_read_items_for_chunk_list(key, saved, [ChunkStorageMetadata(offsets, target.shape)]):
            try:  # one at a time: torch's reader keeps a tensor until it has read the next
                self._reader.read_data(LoadPlan([item]), _Into(target))
            except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
                raise CheckpointError(f"{self._error}: {key}: {' '.join(str(error).split())}") from error


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: Tensor):
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._target


def _saved_slices(description: Sharded, key: str, data: Tensor) -> list[ShardedTensor]:
    """The saved tensors' pieces that make up a rank's tensor, as views of `data`."""
    if isinstance(description, ShardedTensorFactory):
        return list(nested_values(replace(description, key=key, data=data).build()))
    return [replace(description, key=key, data=data, dtype=data.dtype)]


def _rows(piece: Tensor, start: int, end: int) -> range:
    """Rows of a view that have any of the elements `start` to `end` of what it is a view of."""
    if not piece.is_contiguous():
        return range(len(piece))
    first, row = piece.storage_offset(), piece[0].numel()
    return range(max((start - first) // row, 0), min(-((first - end) // row), len(piece)))


def _allocate(optimizer: Any) -> None:
    """Give a new optimizer the state that a checkpoint will fill, where Megatron-Core does not do so itself.

    Where TE and Apex are not, it reads `step` (distrib_optimizer.py, `state_dict`) before there is one
    (optimizer/__init__.py, `init_state_fn`).
    """
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            part.optimizer.dummy_step()  # a real step on random gradients: the checkpoint's weights must follow
        elif isinstance(part.optimizer, torch.optim.Adam):
            part.init_state_fn(part.optimizer, part.config)
            for parameter_state in part.optimizer.state.values():
                parameter_state["step"] = torch.tensor(0.0)


def _distributed(optimizer: Any) -> list[DistributedOptimizer]:
    return [part for part in optimizer.chained_optimizers if isinstance(part, DistributedOptimizer)]


@contextmanager
def _compact_index(optimizer: Any) -> Iterator[None]:
    """Within: parameters are where the optimizer state that data-parallel rank 0 gathered has them.

    Megatron-Core gathers buckets without the padding between them (distrib_optimizer.py, `get_parameter_state_dp_zero`)
    and looks parameters up with it (`sharded_param_state_fully_reshardable`): all behind the first padded bucket would
    be saved shifted. The last stage of a tied model has two buckets.
    """
    buffers = [buffer for part in _distributed(optimizer) for buffer in part.buffers]
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        sizes = [bucket.numel_unpadded for bucket in buffer.buckets]
        shifts = [bucket.offset - sum(sizes[:index]) for index, bucket in enumerate(buffer.buckets)]
        buffer.param_index_map = {
            parameter: (start - shifts[bucket], end - shifts[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, index in zip(buffers, padded, strict=True):
            buffer.param_index_map = index
