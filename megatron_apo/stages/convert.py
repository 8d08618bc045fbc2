"""Converts weights between Hugging Face folders and Megatron's `torch_dist` checkpoints, bit for bit.

    hf_to_megatron(HF, OUT)      OUT: a checkpoint folder (see checkpoint.py) that any TP x PP loads
    megatron_to_hf(FOLDER, OUT)  FOLDER: what `hf_to_megatron` wrote, or a checkpoint of training

One process; the mapping is weights/families.py, as everywhere. OUT appears whole or not at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megatron_apo.checkpoint import MODEL, Record, read_record, torch_dtype
from megatron_apo.config import ParallelConfig
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.weights.hf_io import HFReader, check_empty, model_hash

Dtype = Literal["fp32", "bf16"]
_NAMES: dict[str, Dtype] = {"F32": "fp32", "BF16": "bf16"}


def hf_to_megatron(source: Path, out: Path, dtype: Dtype | None = None) -> None:
    """Write the Hugging Face folder `source` as Megatron weights. `dtype`: None keeps the tensors' own.

    Raises a ValueError, before any work, for a folder that is no model of a supported family, for an output folder that
    is not empty, and for a dtype that must be chosen.
    """
    check_empty(out)
    spec = read_hf_config(source)
    reader = HFReader(source)
    reader.check(spec)
    own = _own_dtype(reader)
    if dtype is None and own is None:
        found = ", ".join(sorted(reader.dtypes()))
        raise ValueError(f"{source}: its tensors are {found}; choose what to write with --dtype fp32 or --dtype bf16")
    record = Record(dtype or own, model_hash=model_hash(source) if dtype in (None, own) else None)

    from megatron_apo.model.build import build_model
    from megatron_apo.parallel.topology import alone
    from megatron_apo.weights import torch_dist
    from megatron_apo.weights.stream import load_weights

    with alone() as topology:
        model = build_model(spec, ParallelConfig(), topology, dtype=record.dtype)
        load_weights(model, spec, topology, reader)
        state = {"model": model.sharded_state_dict()}
        torch_dist.write(out, topology, state, lambda folder: record.write(folder, source))


def megatron_to_hf(source: Path, out: Path, dtype: Dtype | None = None) -> None:
    """Write the weights of the checkpoint `source` as a Hugging Face folder. `dtype`: None keeps the checkpoint's.

    Raises a ValueError, before any work, for a folder that is no checkpoint and for an output folder that is not empty.
    """
    check_empty(out)
    record = read_record(source)
    spec = read_hf_config(source / MODEL)

    from megatron_apo.model.build import build_model
    from megatron_apo.parallel.topology import alone
    from megatron_apo.weights import torch_dist
    from megatron_apo.weights.stream import WeightStream, export_hf

    with alone() as topology:
        model = build_model(spec, ParallelConfig(), topology, dtype=record.dtype)
        torch_dist.load_model(model, source)
        stream = WeightStream(model, spec, topology, dtype=torch_dtype(dtype or record.dtype))
        export_hf(stream, topology, source=source / MODEL, out=out)


def _own_dtype(reader: HFReader) -> Dtype | None:
    """The one dtype of a model's tensors, if Megatron has it as well."""
    found = reader.dtypes()
    return _NAMES.get(found.pop()) if len(found) == 1 else None
