"""Moves weights between a Megatron model spread over ranks and Hugging Face tensors.

    load_weights(chunks, spec, topology, reader)    every rank reads its own shards
    WeightStream(chunks, spec, topology)            HF tensors, in HF order, on global rank 0
    export_hf(stream, topology, ...)                the stream written as an HF folder

The stream sends a layer at a time: every rank that holds a piece of the layer sends one flat buffer to rank 0, which
merges: the tensor ranks of the first data-parallel replica, and of the replicas that hold the other experts. While the
caller consumes one layer, the next is already being received. A rank sends when rank 0 says that it receives, and waits
for that on the host: the caller may take longer over a layer than a collective may wait. `chunks` are the rank's model
chunks, as `build_model` made them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_apo.model.hf_config import ModelSpec
from megatron_apo.model.precision import assign, plain
from megatron_apo.runtime.topology import Topology
from megatron_apo.weights.families import Entry, hf_tensors, model_entries, tied_head_entry
from megatron_apo.weights.hf_writer import write_hf_folder

# What rank 0 says to a rank that has a piece of a layer: that it receives it, or that it will receive no more.
_NEXT, _NO_MORE = 1, 0
# (expert rank, flat shard, what has to be waited for before it is there)
_Posted = tuple[int, Tensor, list[dist.Work]]


class TensorReader(Protocol):
    def get(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class TensorMeta:
    """A full Hugging Face tensor, not yet made."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class MappingError(ValueError):
    """Parameters without a row in the family's table, or rows without a parameter. Lists all of them."""


def stage_parameters(
    chunks: Sequence[torch.nn.Module], spec: ModelSpec, topology: Topology
) -> dict[Entry, torch.nn.Parameter]:
    """Each of this rank's parameters with its row, in HF order. Raises `MappingError` for any that has none."""
    entries = [
        entry
        for entry in model_entries(spec, topology.pp, topology.ep, topology.vpp)
        if entry.pp_rank == topology.pp_rank and entry.ep_rank in (None, topology.ep_rank)
    ]
    tied_head = tied_head_entry(spec, topology.pp, topology.vpp)
    if tied_head and tied_head.pp_rank == topology.pp_rank:
        entries.append(tied_head)
    parameters = {(index, name): p for index, chunk in enumerate(chunks) for name, p in chunk.named_parameters()}
    found = {}
    missing = []
    for entry in entries:
        parameter = parameters.pop((entry.chunk, entry.megatron), None)
        if parameter is None:
            parameter = parameters.pop((entry.chunk, entry.te), None)
        if parameter is None:
            missing.append(entry.megatron)
        else:
            found[entry] = parameter
    if missing or parameters:
        raise MappingError(
            f"{spec.family}: parameters without a row: {sorted(name for _, name in parameters) or 'none'}; "
            f"rows without a parameter: {missing or 'none'}"
        )
    return found


@torch.no_grad()
def load_weights(chunks: Sequence[torch.nn.Module], spec: ModelSpec, topology: Topology, reader: TensorReader) -> None:
    """Copy this rank's shards of an HF checkpoint into `chunks`, cast to each parameter's dtype."""
    for entry, parameter in stage_parameters(chunks, spec, topology).items():
        tensors = [reader.get(name) for name in entry.hf]
        shard = entry.rule.split(tensors, spec, topology.tp)[topology.tp_rank]
        if shard.shape != parameter.shape:
            raise MappingError(f"{entry.megatron}: shard {tuple(shard.shape)}, parameter {tuple(parameter.shape)}")
        assign(parameter, shard)


class WeightStream:
    """The model's Hugging Face tensors, one layer at a time.

    `metadata()` is static and the same on every rank. Iterating is collective over all ranks; global rank 0 yields
    (name, full tensor) in the order of `metadata()`, the others yield nothing. Can be iterated again.

    tensor_of: which tensor of a parameter to stream; the default is its value (tests stream gradients).
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        spec: ModelSpec,
        topology: Topology,
        *,
        dtype: torch.dtype | None = None,
        tensor_of: Callable[[torch.nn.Parameter], Tensor] = plain,
    ):
        self._spec = spec
        self._topology = topology
        self._tensor_of = tensor_of
        self._own = stage_parameters(chunks, spec, topology)
        self._shard_dtype = tensor_of(next(iter(self._own.values()))).dtype
        self.dtype = dtype or self._shard_dtype
        entries = model_entries(spec, topology.pp, topology.ep, topology.vpp)
        self._buckets = [
            list(members) for _, members in groupby(entries, key=lambda entry: (entry.pp_rank, entry.layer))
        ]

    def metadata(self) -> list[TensorMeta]:
        return [TensorMeta(name, self.dtype, shape) for name, shape in hf_tensors(self._spec).items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        if self._topology.is_driver:
            yield from self._receive()
        else:
            self._send()

    def _send(self) -> None:
        topology = self._topology
        if topology.rank not in topology.owner_ranks(topology.pp_rank, topology.ep_rank):
            return
        pending = []
        word = torch.empty(1, dtype=torch.uint8)
        for bucket in self._buckets:
            own = _sent_by(topology.ep_rank, bucket)
            if bucket[0].pp_rank == topology.pp_rank and own:
                flat = self._flatten(own)
                dist.recv(word, src=0, group=topology.host_group)
                if word.item() == _NO_MORE:
                    break
                pending.append((dist.isend(flat, dst=0), flat))
            if len(pending) > 2:  # a layer being received and one ahead of it
                pending.pop(0)[0].wait()
        for work, _ in pending:
            work.wait()

    def _receive(self) -> Iterator[tuple[str, Tensor]]:
        posted: list[_Posted] = []
        num_posted = 0
        try:
            for bucket in self._buckets:
                current = posted or self._post(num_posted)
                num_posted += not posted
                posted = self._post(num_posted)
                num_posted += 1
                flats: dict[int, list[Tensor]] = {}
                for ep_rank, flat, works in current:
                    for work in works:
                        work.wait()
                    flats.setdefault(ep_rank, []).append(flat)
                yield from self._merge(bucket, flats)
        finally:  # after an error, or when the caller has had enough, no rank must be left waiting
            for _, _, works in posted:
                for work in works:
                    work.wait()
            self._say_no_more(num_posted)

    def _say_no_more(self, first: int) -> None:
        """Tell every rank that would still send one of the buckets from `first` on that nobody receives them."""
        waiting = {
            rank
            for bucket in self._buckets[first:]
            for ep_rank in range(self._topology.ep)
            if _sent_by(ep_rank, bucket)
            for rank in self._topology.owner_ranks(bucket[0].pp_rank, ep_rank)
        }
        for rank in sorted(waiting - {0}):
            dist.send(torch.tensor([_NO_MORE], dtype=torch.uint8), dst=rank, group=self._topology.host_group)

    def _post(self, index: int) -> list[_Posted]:
        """Start receiving bucket `index`, by tensor rank for each expert rank."""
        if index >= len(self._buckets):
            return []
        bucket = self._buckets[index]
        flats: list[tuple[int, int, Tensor]] = []  # expert rank, sender, memory for what it sends
        for ep_rank in range(self._topology.ep):
            entries = _sent_by(ep_rank, bucket)
            if not entries:
                continue
            size = sum(prod(self._shard_shapes(entry)[0]) for entry in entries)
            for rank in self._topology.owner_ranks(bucket[0].pp_rank, ep_rank):
                own = rank == 0
                flat = (
                    self._flatten(entries)
                    if own
                    else torch.empty(size, dtype=self._shard_dtype, device=self._topology.device)
                )
                flats.append((ep_rank, rank, flat))
        word = torch.tensor([_NEXT], dtype=torch.uint8)
        posted: list[_Posted] = []
        for ep_rank, rank, flat in flats:
            works = []
            if rank != 0:
                works = [dist.isend(word, dst=rank, group=self._topology.host_group), dist.irecv(flat, src=rank)]
            posted.append((ep_rank, flat, works))
        return posted

    def _flatten(self, entries: list[Entry]) -> Tensor:
        return torch.cat([self._tensor_of(self._own[entry]).reshape(-1) for entry in entries])

    def _merge(self, bucket: list[Entry], flats: dict[int, list[Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """`flats`: what each expert rank sent, by tensor rank."""
        offsets: Counter[int] = Counter()
        for entry in bucket:
            sender = entry.ep_rank or 0
            shapes = self._shard_shapes(entry)
            size, offset = prod(shapes[0]), offsets[sender]
            pairs = zip(flats[sender], shapes, strict=True)
            shards = [flat[offset : offset + size].view(shape) for flat, shape in pairs]
            offsets[sender] += size
            for name, tensor in zip(entry.hf, entry.rule.merge(shards, self._spec), strict=True):
                yield name, tensor.to(self.dtype).contiguous()

    def _shard_shapes(self, entry: Entry) -> list[torch.Size]:
        """Shape of the parameter on each tensor rank, from the rule itself."""
        full = [torch.empty(shape, device="meta") for shape in entry.rule.hf_shapes(self._spec)]
        return [shard.shape for shard in entry.rule.split(full, self._spec, self._topology.tp)]


def _sent_by(ep_rank: int, bucket: list[Entry]) -> list[Entry]:
    """What expert rank `ep_rank` sends of a bucket: its experts, and the first one what all of them hold."""
    return [entry for entry in bucket if (entry.ep_rank or 0) == ep_rank]


def export_hf(stream: WeightStream, topology: Topology, *, source: Path, out: Path) -> None:
    """Write the streamed weights as the HF folder `out`, with `source`'s configuration and tokenizer. Collective."""
    if topology.is_driver:
        write_hf_folder(stream, stream.metadata(), source, out)
    else:
        for _ in stream:
            pass
    dist.barrier(group=topology.host_group)  # the writer works on after the last tensor
