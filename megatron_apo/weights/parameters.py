"""Which parameter of this rank is which row of the family's table, and Hugging Face weights read into them.

    stage_entries(spec, topology)                   the rows of what this rank holds
    stage_parameters(chunks, spec, topology)        each parameter of this rank with its row
    load_weights(chunks, spec, topology, reader)    every rank reads its own shards

`chunks` are the rank's model chunks, as `build_model` made them, or `build_critic` for a critic's spec.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_apo.model.hf_config import ModelSpec
from megatron_apo.model.precision import assign
from megatron_apo.runtime.topology import Topology
from megatron_apo.telemetry.units import some
from megatron_apo.weights.families import VALUE_HEAD, Entry, model_entries, tied_head_entry
from megatron_apo.weights.finite import is_finite, refuse_not_finite


class TensorReader(Protocol):
    def __contains__(self, name: str) -> bool: ...

    def get(self, name: str) -> Tensor: ...


class MappingError(ValueError):
    """Parameters without a row in the family's table, or rows without a parameter."""


def stage_entries(spec: ModelSpec, topology: Topology) -> list[Entry]:
    """The rows of what this rank holds, in HF order; the last stage's copy of a tied embedding comes last."""
    entries = model_entries(spec, topology.pp, topology.ep, topology.vpp)
    if tied_head := tied_head_entry(spec, topology.pp, topology.vpp):
        entries.append(tied_head)
    return [
        entry for entry in entries if entry.pp_rank == topology.pp_rank and entry.ep_rank in (None, topology.ep_rank)
    ]


def stage_parameters(
    chunks: Sequence[torch.nn.Module], spec: ModelSpec, topology: Topology
) -> dict[Entry, torch.nn.Parameter]:
    """Each of this rank's parameters with its row, in HF order. Raises `MappingError` for any that has none."""
    entries = stage_entries(spec, topology)
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
            f"{spec.family}: parameters without a row: {some(sorted(name for _, name in parameters)) or 'none'}; "
            f"rows without a parameter: {some(missing) or 'none'}"
        )
    return found


@torch.no_grad()
def load_weights(chunks: Sequence[torch.nn.Module], spec: ModelSpec, topology: Topology, reader: TensorReader) -> None:
    """Copy this rank's shards of an HF checkpoint into `chunks`, cast to each parameter's dtype. Collective.

    A value head that the checkpoint lacks, as a language model's does, stays what it was. Raises `ModelConfigError`, on
    every rank, for weights that are not finite.
    """
    not_finite: set[str] = set()
    for entry, parameter in stage_parameters(chunks, spec, topology).items():
        if entry.rule is VALUE_HEAD and entry.hf[0] not in reader:
            continue
        tensors = [reader.get(name) for name in entry.hf]
        shard = entry.rule.split(tensors, spec, topology.tp)[topology.tp_rank]
        if shard.shape != parameter.shape:
            raise MappingError(f"{entry.megatron}: shard {tuple(shard.shape)}, parameter {tuple(parameter.shape)}")
        if not is_finite(shard):
            not_finite.update(name for name, tensor in zip(entry.hf, tensors, strict=True) if not is_finite(tensor))
        assign(parameter, shard)
    found = [not_finite] * topology.world_size
    dist.all_gather_object(found, not_finite, group=topology.host_group)
    refuse_not_finite(getattr(reader, "folder", "the weights"), sorted(set().union(*found)))
