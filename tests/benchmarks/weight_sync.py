"""A weight sync by its phases, beside a memory copy of the same bytes and vLLM's own reload of an export, in one run.

    python -m tests.benchmarks.weight_sync [--model FOLDER | --shape 0.5B] [--dtype fp32] [--tp 2] [--pp 2]
                                           [--engines 1] [--rounds 5] [--bucket-mib 32]

Real Megatron ranks over gloo and real vLLM engines. Between rounds every weight is moved a little, so that every
tensor is another. In each round, in turns and between barriers:

- copy: as many bytes into memory that is new, by one thread (`Tensor.clone`);
- warm copy: the same into memory that was used before, in slabs that no cache holds;
- sync: what training does after a step;
- reload: the weights exported to a folder in shared memory, and loaded from there by vLLM's `reload_weights` in the
  live engine (which proves nothing, and leaves a tied head stale).

Medians are shown, seconds. `trainer` is what the trainer's side takes: its ranks put the buckets together, and rank 0
digests them; `load` is what vLLM takes to load and pack them, meanwhile; `proof` is all that is done to know that the
models hold what was sent: digests on both sides, reading back, comparing. Memory is the private memory that each rank
needs in a sync beside what it has. Targets: trainer at most 3 x copy, proof at most 15 % of the sync, the sync at least
2 x faster than the reload, two buckets a rank.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from megatron_apo.config import ModelConfig, ParallelConfig, RolloutConfig
from megatron_apo.model.build import build_model
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.model.precision import Precision
from megatron_apo.parallel.groups import distributed
from megatron_apo.rollout.engine import Engine
from megatron_apo.rollout.fleet import Fleet
from megatron_apo.rollout.server import VLLMServer
from megatron_apo.rollout.transport.base import Ranks
from megatron_apo.rollout.weight_sync import SyncReport, WeightSync
from megatron_apo.runtime.collective import on_driver
from megatron_apo.runtime.topology import Topology
from megatron_apo.telemetry.memory import pop_private_peak_bytes
from megatron_apo.telemetry.units import data_size
from megatron_apo.weights.gather import Gather
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.parameters import load_weights
from megatron_apo.weights.stream import WeightStream, export_hf
from tests.benchmarks.ranks import run_ranks

COMMON = {"model_type": "qwen2", "max_position_embeddings": 4096, "tie_word_embeddings": True, "num_key_value_heads": 2}
SHAPES = {
    "0.5B": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864}
    | {"vocab_size": 151936},
    "0.25B": {"hidden_size": 640, "num_hidden_layers": 24, "num_attention_heads": 10, "intermediate_size": 3456}
    | {"vocab_size": 65536},
    "0.1B": {"hidden_size": 512, "num_hidden_layers": 16, "num_attention_heads": 8, "intermediate_size": 2048}
    | {"vocab_size": 32768},
}
SLAB_BYTES = 256 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="0.5B")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bucket-mib", type=int, default=32)
    parser.add_argument("--no-reload", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        args.scratch = Path(scratch)
        if args.model is None:
            write_config(args.scratch / "model", args.shape)
        run_ranks(args.tp * args.pp, be_rank, args)


def write_config(folder: Path, shape: str) -> Path:
    """A new folder with the config.json of one of SHAPES."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(COMMON | SHAPES[shape] | {"architectures": ["Qwen2ForCausalLM"]}))
    return folder


def be_rank(args: argparse.Namespace) -> None:
    parallel = ParallelConfig(tp=args.tp, pp=args.pp)
    with distributed(parallel) as topology:
        model = ModelConfig(path=args.model or args.scratch / "model", dtype=args.dtype)
        spec = read_hf_config(model.path)
        policy = build_model(spec, parallel, topology, Precision.of(model, parallel))
        if args.model:
            load_weights(policy, spec, topology, HFReader(model.path))
        else:
            with torch.no_grad():
                for chunk in policy:
                    for parameter in chunk.parameters():  # whose memory nobody has written yet
                        parameter.normal_(std=0.02)
        source = Gather(policy, spec, topology, bucket_bytes=args.bucket_mib * 2**20)
        measure(topology, args, model, source, policy, spec)


def measure(topology: Topology, args: argparse.Namespace, model: ModelConfig, source: Gather, policy, spec) -> None:
    rollout = RolloutConfig(dtype={"fp32": "float32", "bf16": "bfloat16"}[args.dtype], kv_cache_gib=0.25, threads=2)
    rollout = rollout.model_copy(update={"replicas": args.engines})
    engines = []
    if topology.is_driver:
        engines = [
            Engine(
                VLLMServer(
                    rollout,
                    args.scratch / "start",  # vLLM reloads no model that it did not load
                    log_path=args.scratch / f"vllm-{number}.log",
                    seed=0,
                    max_model_len=256,
                ),
                number=number,
            )
            for number in range(args.engines)
        ]
    fleet = Fleet(engines, window=1)
    sync = WeightSync(source, fleet.engines, ranks=Ranks.of(topology))
    try:
        export_hf(WeightStream(policy, spec, topology), topology, source=model.path, out=args.scratch / "start")
        if topology.is_driver:
            fleet.start()
            fleet.connect(sync.init_info)
        dist.barrier(group=topology.host_group)
        found: defaultdict[str, list[float]] = defaultdict(list)
        reports: list[SyncReport] = []
        grown: list[int] = []
        for round_ in range(args.rounds + 1):
            change(policy, round_)
            for name, is_warm in (("copy", False), ("warm copy", True)):
                work = (lambda is_warm=is_warm: copy(source.plan.num_bytes, is_warm)) if topology.is_driver else None
                timed(topology, found, name, work or (lambda: None))
            before = pop_private_peak_bytes()
            before = pop_private_peak_bytes()
            reports.append(timed(topology, found, "sync", lambda round_=round_: sync.sync(round_)))
            grown.append(pop_private_peak_bytes() - before)
            if not args.no_reload:
                timed(topology, found, "reload", lambda: reload(topology, args, model.path, policy, spec, fleet))
        told: list[int] = [0] * topology.world_size
        dist.all_gather_object(told, max(grown[1:]), group=topology.host_group)
        if topology.is_driver:
            show(args, source, found, reports[1:], told)
    finally:
        fleet.stop()


def change(policy, round_: int) -> None:
    with torch.no_grad():
        for chunk in policy:
            for parameter in chunk.parameters():
                parameter.add_(0.01 if round_ % 2 else -0.01)


def timed(topology: Topology, found: dict[str, list[float]], name: str, work: Callable[[], object]):
    dist.barrier(group=topology.host_group)
    start = time.perf_counter()
    value = work()
    dist.barrier(group=topology.host_group)
    found[name].append(time.perf_counter() - start)
    return value


_slabs: list[torch.Tensor] = []


def copy(num_bytes: int, is_warm: bool) -> None:
    if not _slabs:
        _slabs.extend(torch.ones(SLAB_BYTES, dtype=torch.uint8) for _ in range(2))
    for start in range(0, num_bytes, SLAB_BYTES):
        slab = _slabs[0][: min(SLAB_BYTES, num_bytes - start)]
        _slabs[1][: len(slab)].copy_(slab) if is_warm else slab.clone()


def reload(topology: Topology, args: argparse.Namespace, source: Path, policy, spec, fleet: Fleet) -> None:
    folder = Path("/dev/shm") / f"{args.scratch.name}-export"
    try:
        export_hf(WeightStream(policy, spec, topology), topology, source=source, out=folder)

        def load() -> None:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            fleet.ask(lambda client: client._call("POST", "/collective_rpc", body))

        on_driver(topology, load)
    finally:
        if topology.is_driver:
            shutil.rmtree(folder, ignore_errors=True)


def show(
    args: argparse.Namespace, source: Gather, found: dict[str, list[float]], reports: list[SyncReport], told: list[int]
) -> None:
    phases = {name: median(report.phases[name] for report in reports) for name in reports[0].phases}
    seconds = {name: median(values[1:]) for name, values in found.items()}
    trainer = phases["gather"] + phases["digest"]
    proof = phases["digest"] + phases["check"] + phases["content"]
    print(
        f"{args.model or args.shape} {args.dtype}, TP {args.tp} x PP {args.pp} -> {args.engines} engines, "
        f"{data_size(source.plan.num_bytes)}, {len(source.plan.tensors)} tensors in {len(source.plan.buckets)} buckets"
    )
    print("  " + "  ".join(f"{name} {value:.3f}" for name, value in (seconds | phases).items()))
    print(
        f"  trainer {trainer:.3f} s, {trainer / seconds['copy']:.2f} x copy, "
        f"{trainer / seconds['warm copy']:.2f} x warm copy; proof {proof:.3f} s, "
        f"{proof / seconds['sync']:.1%} of the sync; sync {seconds['sync']:.3f} s"
        + (f", reload {seconds['reload'] / seconds['sync']:.2f} x that" if "reload" in seconds else "")
    )
    largest = source.plan.largest_bucket_bytes
    shares = ", ".join(f"{value / largest:.2f}" for value in told)
    print(f"  private memory of the ranks {shares} x the largest bucket ({data_size(largest)})")


if __name__ == "__main__":
    main()
