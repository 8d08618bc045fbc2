"""Converts weights between Hugging Face folders and Megatron's `torch_dist` checkpoints, bit for bit.

    hf_to_megatron(HF, OUT)      OUT: a checkpoint folder (see learner/checkpoint.py) that any TP x PP x EP loads
    megatron_to_hf(FOLDER, OUT)  FOLDER: what `hf_to_megatron` wrote, or a checkpoint of training

The command checks everything, then starts its ranks (under torchrun it is one). They work on the CPU, a
parameter at a time, whatever GPUs are there. OUT appears whole or not at all; OUT/conversion.json says what it was
made of.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from megatron_apo.config import ParallelConfig
from megatron_apo.learner.checkpoint import MODEL, Dtype, Record, read_record, torch_dtype
from megatron_apo.model.hf_config import ModelSpec, read_hf_config
from megatron_apo.runtime import launch
from megatron_apo.runtime.job import read_job
from megatron_apo.telemetry.summary import versions
from megatron_apo.telemetry.units import data_size
from megatron_apo.weights.families import hf_tensors
from megatron_apo.weights.hf_io import HFReader, combined_hash
from megatron_apo.weights.hf_writer import MAX_SHARD_BYTES, PROVENANCE, copy_side_files
from megatron_apo.weights.whole_folder import check_empty, leftover

if TYPE_CHECKING:
    from megatron_apo.runtime.topology import Topology
    from megatron_apo.weights.conversion import Conversion

_DONE, _REFRESH_S = "converted_bytes", 0.2  # all ranks count in the job's store


def hf_to_megatron(source: Path, out: Path, dtype: Dtype | None = None, ranks: int | None = None) -> None:
    """Write the Hugging Face folder `source` as Megatron weights. `dtype`: None keeps the tensors' own.

    Raises a ValueError, before any work, for a folder that is no whole model of a supported family, for an output
    folder that is not empty or has no room, and for a dtype that must be chosen.
    """
    check_empty(out)
    spec = read_hf_config(source)
    reader = HFReader(source)
    reader.check(spec)
    own = _own_dtype(reader, spec)
    wanted = dtype or own
    if wanted is None:
        found = ", ".join(sorted(str(name).removeprefix("torch.") for name in reader.dtypes(spec)))
        raise ValueError(f"{source}: its tensors are {found}; choose what to write with --dtype fp32, bf16 or fp16")

    def work(topology: Topology) -> None:
        from megatron_apo.runtime.collective import on_driver
        from megatron_apo.weights import conversion as streamed

        with streamed_conversion(spec, topology, wanted) as conversion:

            def complete(folder: Path) -> None:
                identities = conversion.all_identities()
                record = Record(wanted, model_hash=combined_hash(identities) if wanted == own else None)
                on_driver(topology, lambda: record.write(folder, source))
                on_driver(topology, lambda: _write_provenance(folder, conversion, source, identities))

            streamed.hf_to_megatron(conversion, reader, out, complete)

    arguments = ["hf-to-megatron", "--hf", str(source), "--out", str(out), "--dtype", wanted]
    _check_room(out, _model_bytes(spec, wanted))
    run_ranks(arguments, ranks, work)


def megatron_to_hf(
    source: Path,
    out: Path,
    dtype: Dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    ranks: int | None = None,
) -> None:
    """Write the weights of the checkpoint `source` as a Hugging Face folder. `dtype`: None keeps the checkpoint's.

    Raises a ValueError, before any work, for a folder that is no checkpoint, and for an output folder that is not empty
    or has no room; a RuntimeError for weights that are not those that the checkpoint was converted from.
    """
    check_empty(out)
    record = read_record(source)
    spec = read_hf_config(source / MODEL)
    wanted = dtype or record.dtype

    def work(topology: Topology) -> None:
        from megatron_apo.runtime.collective import on_driver
        from megatron_apo.weights import conversion as streamed

        with streamed_conversion(spec, topology, wanted) as conversion:

            def complete(folder: Path) -> None:
                identities = conversion.all_identities()
                on_driver(topology, lambda: _check_hash(source, record, wanted, identities))
                on_driver(topology, lambda: copy_side_files(source / MODEL, folder, torch_dtype(wanted)))
                on_driver(topology, lambda: _write_provenance(folder, conversion, source, identities))

            streamed.megatron_to_hf(conversion, source, out, complete, max_shard_bytes=max_shard_bytes)

    arguments = ["megatron-to-hf", "--megatron", str(source), "--out", str(out), "--dtype", wanted]
    arguments += ["--max-shard-size", str(max_shard_bytes)]
    _check_room(out, _model_bytes(spec, wanted))
    run_ranks(arguments, ranks, work)


def default_ranks() -> int:
    """Reading and writing gain little from more."""
    return min(4, len(os.sched_getaffinity(0)))


def run_ranks(
    arguments: Sequence[str],
    ranks: int | None,
    work: Callable[[Topology], None],
    parallel: ParallelConfig | None = None,
) -> None:
    """Do `work` on every rank: here, if this process is one or there is but one, else in processes of their own, each
    of which runs `megatron-apo convert ARGUMENTS`. parallel: their layout; None: side by side."""
    ranks = ranks or default_ranks()
    with _without_gpus():
        if job := read_job():
            launch.be_rank(job)
            from megatron_apo.parallel.groups import distributed

            with distributed(parallel or ParallelConfig(dp=job.world_size)) as topology:
                work(topology)
        elif ranks == 1:
            from megatron_apo.parallel.groups import alone

            with alone() as topology:
                work(topology)
        else:
            with TemporaryDirectory() as logs:
                launch.spawn(["convert", *arguments], world_size=ranks, log_dir=Path(logs))


@contextmanager
def _without_gpus() -> Iterator[None]:
    """GPUs are for training; a conversion may run beside it."""
    usual = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        if usual is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = usual


@contextmanager
def streamed_conversion(spec: ModelSpec, topology: Topology, dtype: Dtype) -> Iterator[Conversion]:
    """A `Conversion` with a progress bar on the driver, and a closing line."""
    import torch.distributed as dist
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from megatron_apo.weights.conversion import Conversion

    start = time.monotonic()
    total = _model_bytes(spec, dtype)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    store = dist.distributed_c10d._get_default_store()
    finished = threading.Event()
    with Progress(*columns, disable=not topology.is_driver) as progress:
        task = progress.add_task(spec.family, total=total)

        def watch() -> None:
            while not finished.wait(_REFRESH_S):
                progress.update(task, completed=store.add(_DONE, 0))

        watcher = threading.Thread(target=watch, daemon=True)
        if topology.is_driver:
            watcher.start()
        try:
            yield Conversion(spec, topology, torch_dtype(dtype), lambda num_bytes: store.add(_DONE, num_bytes))
            progress.update(task, completed=total)
        finally:
            finished.set()
            if topology.is_driver:
                watcher.join()
    if topology.is_driver:
        seconds = time.monotonic() - start
        print(f"{spec.family}, {data_size(total)} as {dtype}: {seconds:.1f} s, {data_size(total / seconds)}/s")


def _check_hash(source: Path, record: Record, dtype: Dtype, identities: dict[str, str]) -> None:
    if record.model_hash and dtype == record.dtype and combined_hash(identities) != record.model_hash:
        raise RuntimeError(f"{source}: its weights are not those that it was converted from; convert them again")


def _write_provenance(folder: Path, conversion: Conversion, source: Path, identities: dict[str, str]) -> None:
    tree = {
        "source": str(source.resolve()),
        "model_hash": combined_hash(identities),
        "written_dtype": str(conversion.dtype).removeprefix("torch."),
        "family": conversion.spec.family,
        "versions": versions(),
        "mapping": [
            {
                "megatron": conversion.keys(entry),
                "rule": type(entry.rule).__name__,
                "hugging_face": {name: identities[name] for name in entry.hf},  # dtype, shape, sha256
            }
            for entry in conversion.entries
        ],
    }
    (folder / PROVENANCE).write_text(json.dumps(tree, indent=1) + "\n")


def _check_room(out: Path, num_bytes: int) -> None:
    shutil.rmtree(leftover(out), ignore_errors=True)
    folder = next(folder for folder in out.resolve().parents if folder.is_dir())
    if (free := shutil.disk_usage(folder).free) < num_bytes:
        raise ValueError(f"output folder: {out} needs {data_size(num_bytes)}, {data_size(free)} are free there")


def _model_bytes(spec: ModelSpec, dtype: Dtype) -> int:
    return sum(map(prod, hf_tensors(spec).values())) * torch_dtype(dtype).itemsize


def _own_dtype(reader: HFReader, spec: ModelSpec) -> Dtype | None:
    """The one dtype of a model's tensors, if Megatron has it as well."""
    found = reader.dtypes(spec)
    names: tuple[Dtype, ...] = ("fp32", "bf16", "fp16")
    return next((name for name in names if found == {torch_dtype(name)}), None)
