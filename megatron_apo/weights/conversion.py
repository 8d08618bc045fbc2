"""Hugging Face <-> Megatron checkpoints, tensor by tensor: any number of ranks read and write in parallel.

    hf_to_megatron(conversion, reader, out)         every rank writes its share of the parameters
    megatron_to_hf(conversion, source, out)         every rank writes its share of the tensors into common files
    compare(conversion, tensors, reader)            the two sides against each other, bit by bit

What Megatron-Core calls each parameter in a checkpoint, and how it cuts it there, is asked of Megatron-Core itself, by
a model on the meta device: no rank ever has the model in memory, only one parameter at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_apo.config import ParallelConfig
from megatron_apo.model.build import build_model
from megatron_apo.model.hf_config import ModelSpec
from megatron_apo.runtime.collective import on_all, on_driver
from megatron_apo.runtime.topology import Topology
from megatron_apo.weights import torch_dist
from megatron_apo.weights.families import Entry, hf_tensors, model_entries
from megatron_apo.weights.files import CheckpointError
from megatron_apo.weights.hf_io import HFReader, identity
from megatron_apo.weights.hf_writer import HFWriter
from megatron_apo.weights.plan import TensorMeta
from megatron_apo.weights.tensor_names import in_lines
from megatron_apo.weights.whole_folder import whole_folder

Progress = Callable[[int], None]
# Keys of a training checkpoint that are no weights of the policy: its optimizer's, of which experts have their own, and
# all of a critic (learner/checkpoint.py, `sharded_states`).
_BESIDE_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.|critic\.")


@dataclass(frozen=True)
class Conversion:
    """One model's tensors on both sides, shared out among the ranks of `topology`.

    dtype: of the side that is written. progress(bytes): called for each parameter that this rank is done with.
    """

    spec: ModelSpec
    topology: Topology
    dtype: torch.dtype
    progress: Progress = lambda num_bytes: None
    identities: dict[str, str] = field(default_factory=dict)  # of the HF tensors that this rank saw, by name

    @cached_property
    def entries(self) -> list[Entry]:
        """Every parameter, in Hugging Face order."""
        return model_entries(self.spec, pp=1)

    @cached_property
    def own(self) -> list[Entry]:
        """This rank's share: neighbours, and about as many bytes as every other rank's."""
        sizes = [self.num_bytes(entry) for entry in self.entries]
        total, world, before = sum(sizes), self.topology.world_size, 0
        mine = []
        for entry, size in zip(self.entries, sizes, strict=True):
            if (before + size / 2) * world // total == self.topology.rank:
                mine.append(entry)
            before += size
        return mine

    def num_bytes(self, entry: Entry) -> int:
        """Size of a parameter, bytes."""
        return sum(map(prod, entry.rule.hf_shapes(self.spec))) * self.dtype.itemsize

    def metadata(self) -> list[TensorMeta]:
        """The Hugging Face tensors, in order."""
        return [TensorMeta(name, self.dtype, shape) for name, shape in hf_tensors(self.spec).items()]

    @cached_property
    def state(self) -> dict[str, Any]:
        """Megatron-Core's description of every parameter by name, whole (TP = PP = EP = 1) and without memory."""
        with torch.device("meta"):
            (model,) = build_model(self.spec, ParallelConfig(), self.topology)
        state = torch_dist.sharded_state(model.to(self.dtype))
        for entry in self.own:  # to Megatron-Core the ranks are replicas, of which the first writes everything
            state[entry.megatron].replica_id = 0
        return state

    def pieces(self, entry: Entry, parameter: Tensor) -> dict[str, Tensor]:
        """A parameter's tensors in a checkpoint, by key: itself, or its parts (gate and up lie apart)."""
        sharded = self.state[entry.megatron]
        if isinstance(sharded, ShardedTensorFactory):
            parts = sharded.build_fn(sharded.key, parameter, sharded.replica_id, sharded.flattened_range)
            return {part.key: part.data for part in parts}
        assert isinstance(sharded, ShardedTensor) and sharded.local_shape == tuple(parameter.shape), entry.megatron
        return {sharded.key: parameter}

    def keys(self, entry: Entry) -> list[str]:
        """The keys of `pieces`."""
        sharded = self.state[entry.megatron]
        return list(self.pieces(entry, sharded.data))

    def join(self, entry: Entry, pieces: list[Tensor]) -> Tensor:
        """The inverse of `pieces`, in the order of `keys`."""
        sharded = self.state[entry.megatron]
        return sharded.merge_fn(pieces) if isinstance(sharded, ShardedTensorFactory) else pieces[0]

    def saw(self, entry: Entry, tensors: list[Tensor]) -> None:
        """Note the identities of an entry's Hugging Face tensors, and that it is done."""
        self.identities.update(zip(entry.hf, map(identity, tensors), strict=True))
        self.progress(self.num_bytes(entry))

    def all_identities(self) -> dict[str, str]:
        """`identities` of all ranks. Collective."""
        gathered: list[dict[str, str]] = [{} for _ in range(self.topology.world_size)]
        dist.all_gather_object(gathered, self.identities)
        return {name: line for found in gathered for name, line in found.items()}


def hf_to_megatron(conversion: Conversion, reader: HFReader, out: Path, complete: Callable[[Path], None]) -> None:
    """Write the tensors of `reader` as the checkpoint `out`. `complete(folder)`, called on every rank once all tensors
    are written, adds further files. Collective."""
    entry_of = {key: entry for entry in conversion.own for key in conversion.keys(entry)}
    parts: dict[str, Tensor] = {}  # of the parameter that is being written

    def load(key: str) -> Tensor:
        if key not in parts:
            entry = entry_of[key]
            tensors = [reader.get(name) for name in entry.hf]
            (parameter,) = entry.rule.split(tensors, conversion.spec, 1)
            parts.clear()
            parts.update(conversion.pieces(entry, parameter.to(conversion.dtype)))
            conversion.saw(entry, tensors)
        return parts.pop(key)

    own = {entry.megatron for entry in conversion.own}
    expected = {entry.megatron for entry in conversion.entries}
    # Beside parameters there are Megatron-Core's `_extra_state` objects, empty without Transformer Engine.
    mine = {
        name: value
        for name, value in conversion.state.items()
        if (name in own if name in expected else conversion.topology.is_driver)
    }
    torch_dist.write(out, conversion.topology, {"model": mine}, complete, load)


def megatron_to_hf(
    conversion: Conversion, source: Path, out: Path, complete: Callable[[Path], None], *, max_shard_bytes: int
) -> None:
    """Write the weights of the checkpoint `source` as the Hugging Face folder `out`. `complete` is as above."""
    tensors = CheckpointTensors(source)
    tensors.check(conversion)
    writer = HFWriter(conversion.metadata(), max_shard_bytes)
    with whole_folder(out, conversion.topology) as folder:
        on_driver(conversion.topology, lambda: writer.create(folder))

        def write_own() -> None:
            with writer.opened(folder) as write:
                for entry in conversion.own:
                    values = [value.to(conversion.dtype) for value in tensors.get(conversion, entry)]
                    for name, value in zip(entry.hf, values, strict=True):
                        write(name, value)
                    conversion.saw(entry, values)

        on_all(conversion.topology, write_own)
        complete(folder)


def compare(conversion: Conversion, tensors: CheckpointTensors, reader: HFReader) -> Iterator[str]:
    """The Hugging Face tensors of this rank's share that the checkpoint does not hold bit for bit."""
    for entry in conversion.own:
        found = tensors.get(conversion, entry)
        for name, value in zip(entry.hf, found, strict=True):
            expected = reader.get(name).to(value.dtype)
            if not torch.equal(_bits(value), _bits(expected)):
                yield name
        conversion.progress(conversion.num_bytes(entry))


class CheckpointTensors:
    """Single tensors of a checkpoint's model, by this process alone."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._reader = _Reader(folder)
        with torch_dist.one_line_errors(f"{folder}: the checkpoint could not be read"):
            self._metadata = self._reader.read_metadata().state_dict_metadata

    def check(self, conversion: Conversion) -> None:
        """Raises `CheckpointError` for tensors that are missing, of another shape, or not of this model."""
        unknown, problems = [], []
        expected = {key for entry in conversion.entries for key in conversion.keys(entry)}
        for key, found in sorted(self._metadata.items()):
            weights = isinstance(found, TensorStorageMetadata) and not _BESIDE_WEIGHTS.match(key)
            if weights and key not in expected:
                unknown.append((key, f"{{}} is no tensor of this {conversion.spec.family}"))
        for entry in conversion.entries:
            sharded = conversion.state[entry.megatron]
            for key, piece in conversion.pieces(entry, sharded.data).items():
                found = self._metadata.get(key)
                # The vocabulary is padded to the layout that saved it.
                padded = getattr(sharded, "allow_shape_mismatch", False)
                if not isinstance(found, TensorStorageMetadata):
                    problems.append((key, "{} is missing"))
                elif found.size[1:] != piece.shape[1:] or (
                    found.size[0] < piece.shape[0] if padded else found.size[0] != piece.shape[0]
                ):
                    problems.append((key, f"{{}} has shape {list(found.size)}, expected {list(piece.shape)}"))
        if lines := in_lines(unknown) + in_lines(problems):
            raise CheckpointError("\n".join(f"{self._folder}: {line}" for line in lines))

    def get(self, conversion: Conversion, entry: Entry) -> list[Tensor]:
        """An entry's Hugging Face tensors, in the checkpoint's dtype."""
        state = {}
        for key in conversion.keys(entry):
            found = self._metadata[key]
            state[key] = torch.empty(found.size, dtype=found.properties.dtype)
        with torch_dist.one_line_errors(f"{self._folder}: the checkpoint could not be read"):
            torch_checkpoint.load(state, storage_reader=self._reader, no_dist=True)
        return entry.rule.merge([conversion.join(entry, list(state.values()))], conversion.spec)


class _Reader(FileSystemReader):
    """Reads the checkpoint's metadata once, not for every tensor."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if not hasattr(self, "_metadata"):
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata


def _bits(tensor: Tensor) -> Tensor:
    """As integers, so that NaNs and zeros' signs count."""
    return tensor.contiguous().view(torch.uint8)
