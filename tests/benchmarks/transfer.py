"""Weights by `collective` over several hosts, beside a bare broadcast of the same bytes over the same groups.

    python -m tests.benchmarks.transfer [--model FOLDER | --shape 0.1B] [--dtype fp32] [--tp 2] [--pp 2]
                                        [--engines 1 2 4] [--workers 1] [--rounds 5] [--bucket-mib 32] [--one-host]

Each stage's ranks are on a host of their own (`tests/hosts.py`), and so is each engine, behind which is a reader that
drops what it reads, so that what vLLM takes to load is left out. In each round, in turns:

- transfer: gathering included, from the first byte to when all have the last;
- broadcast: each stage's owner broadcasts buffers that are filled beforehand, in the same groups and sizes, in the same
  order, and as many at a time.

Shown are medians, seconds, their ratio (target: 1.3 at most), and what all interfaces sent in a transfer as a share of
the least, which is the model's bytes times the workers (target: 1.05). With --one-host all are on this machine's own
host, and bytes are not shown.
"""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_apo.config import ModelConfig, ParallelConfig
from megatron_apo.model.build import build_model
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.model.precision import Precision
from megatron_apo.parallel.groups import distributed
from megatron_apo.rollout.transport.base import Ranks, heard, told
from megatron_apo.rollout.transport.collective import NUM_BUFFERS, CollectiveReader, CollectiveSender
from megatron_apo.runtime.topology import Topology
from megatron_apo.telemetry.timers import Stopwatch
from megatron_apo.telemetry.units import data_size
from megatron_apo.weights.gather import Gather
from tests import hosts
from tests.benchmarks.weight_sync import SHAPES, write_config
from tests.weights import Receiver

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="0.1B")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bucket-mib", type=int, default=32)
    parser.add_argument("--one-host", action="store_true")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part is None:
        for engines in args.engines:
            with tempfile.TemporaryDirectory() as folder:
                start(args, Path(folder), engines)
    elif args.part[0] == "rank":
        be_rank(args, Path(args.part[1]), int(args.part[2]))
    else:
        be_reader(Path(args.part[1]), int(args.part[2]), int(args.part[3]))


def start(args: argparse.Namespace, folder: Path, engines: int) -> None:
    """All parts, on their hosts, and wait for them."""
    model = args.model or write_config(folder / "model", args.shape)
    command = [sys.executable, "-m", "tests.benchmarks.transfer", *sys.argv[1:], "--engines", str(engines)]
    command += ["--model", str(model)]
    with ExitStack() as stack:
        net = None if args.one_host else stack.enter_context(hosts.network(folder, args.pp + engines))
        processes: list[subprocess.Popen] = []

        def run(host: int, *part: object, **environment: str) -> None:
            log = folder / f"{part[0]}{'-'.join(map(str, part[2:]))}.log"
            words = [*command, "--part", *map(str, part)]
            own = environment | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
            if net:
                processes.append(net.hosts[host].start(*words, log=log, **own))
            else:
                with log.open("wb") as output:
                    processes.append(subprocess.Popen(words, env=os.environ | own, stdout=output, stderr=output))
            stack.callback(processes[-1].kill)

        address = "10.77.0.1" if net else "127.0.0.1"
        job = {"WORLD_SIZE": str(args.tp * args.pp), "MASTER_ADDR": address, "MASTER_PORT": "29500"}
        for rank in range(args.tp * args.pp):
            run(rank // args.tp, "rank", folder, engines, **job, RANK=str(rank))
        for engine in range(engines):
            for worker in range(args.workers):
                run(args.pp + engine, "reader", folder, engine, worker)
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                break
            tell_bytes(folder, net, args.pp + engines)
            time.sleep(0.002)
        for log in sorted(folder.glob("*.log")):
            if log.name.startswith("rank") or any(process.returncode for process in processes):
                print("".join(line for line in log.open() if "c10d" not in line), end="", flush=True)


def tell_bytes(folder: Path, net: hosts.Network | None, count: int) -> None:
    """Rank 0 asks what the interfaces have sent, and this process, which is on no host, looks."""
    if net and (folder / "asked").exists():
        (folder / "asked").unlink()
        (folder / "told.part").write_text(str(sum(net.bytes_sent(index) for index in range(count))))
        (folder / "told.part").rename(folder / "told")


def be_rank(args: argparse.Namespace, folder: Path, engines: int) -> None:
    parallel = ParallelConfig(tp=args.tp, pp=args.pp)
    with distributed(parallel) as topology:
        model = ModelConfig(path=args.model, dtype=args.dtype)
        spec = read_hf_config(model.path)
        policy = build_model(spec, parallel, topology, Precision.of(model, parallel))
        with torch.no_grad():
            for parameter in (parameter for chunk in policy for parameter in chunk.parameters()):
                parameter.normal_(std=0.02)
        gather = Gather(policy, spec, topology, bucket_bytes=args.bucket_mib * 2**20)
        sender = CollectiveSender(gather.plan, Ranks.of(topology))
        readers = [Receiver(host=address_of(args, engine), num_workers=args.workers) for engine in range(engines)]
        if topology.is_driver:
            write(folder / "plan", told(gather.plan))
        times: dict[str, list[float]] = {"transfer": [], "broadcast": []}
        sent: list[int] = []
        for round_ in range(args.rounds + 1):
            if topology.is_driver:
                sender.open(readers)
            sender.meet()
            if topology.is_driver:
                write(folder / f"round{round_}", [sender.update_info(reader) for reader in readers])
                wait_for(folder, f"ready{round_}-*", engines * args.workers)
            before = ask_bytes(args, folder, topology)
            update: Any = SimpleNamespace(watch=Stopwatch()) if topology.is_driver else None
            with timed(topology, times["transfer"]):
                sender.send(gather, update)
                wait_for(folder, f"read{round_}-*", engines * args.workers)
            sent.append(ask_bytes(args, folder, topology) - before)
            with timed(topology, times["broadcast"]):
                broadcast(sender, gather, topology)
                wait_for(folder, f"again{round_}-*", engines * args.workers)
        if topology.is_driver:
            show(args, gather, engines, {name: median(values[1:]) for name, values in times.items()}, median(sent[1:]))
            (folder / "over").touch()
        dist.barrier(group=topology.host_group)


def broadcast(sender: CollectiveSender, gather: Gather, topology: Topology) -> None:
    """What the owners sent, bare."""
    if sender._group is None:
        return
    own = [bucket for bucket in gather.plan.buckets if bucket.pp_rank == topology.pp_rank]
    for bucket in own:
        if sender._group.num_posted == NUM_BUFFERS:
            sender._group.wait()
        sender._group.post(sender._slot(bucket))
    while sender._group.num_posted:
        sender._group.wait()


def be_reader(folder: Path, engine: int, worker: int) -> None:
    torch.set_num_threads(1)
    buckets = heard(read(folder, "plan"))
    reader = CollectiveReader(buckets, worker, torch.device("cpu"))
    round_ = 0
    while True:
        infos = read(folder, f"round{round_}", or_else=folder / "over")
        if infos is None:
            return
        (folder / f"ready{round_}-{engine}-{worker}").touch()
        for name in ("read", "again"):
            for _ in reader.buckets(infos[engine]):
                pass
            (folder / f"{name}{round_}-{engine}-{worker}").touch()
        round_ += 1


def show(args: argparse.Namespace, gather: Gather, engines: int, seconds: dict[str, float], sent: float) -> None:
    plan, count = gather.plan, engines * args.workers
    ratio = seconds["transfer"] / seconds["broadcast"]
    text = f"{args.model.name if args.model.name != 'model' else args.shape} {args.dtype}, TP {args.tp} x PP {args.pp}"
    print(
        f"{text} -> {engines} engines of {args.workers}, {data_size(plan.num_bytes)} in {len(plan.buckets)} buckets: "
        f"transfer {seconds['transfer']:.3f} s, broadcast {seconds['broadcast']:.3f} s, {ratio:.2f} x"
        + ("" if args.one_host else f"; sent {sent / (plan.num_bytes * count):.3f} x the least")
    )


@contextmanager
def timed(topology: Topology, found: list[float]) -> Iterator[None]:
    dist.barrier(group=topology.host_group)
    start = time.perf_counter()
    yield
    dist.barrier(group=topology.host_group)
    found.append(time.perf_counter() - start)


def address_of(args: argparse.Namespace, engine: int) -> str:
    return "127.0.0.1" if args.one_host else f"10.77.0.{args.pp + engine + 1}"


def ask_bytes(args: argparse.Namespace, folder: Path, topology: Topology) -> int:
    found = 0
    if topology.is_driver and not args.one_host:
        (folder / "asked").touch()
        wait_for(folder, "told", 1)
        found = int((folder / "told").read_text())
        (folder / "told").unlink()
    dist.barrier(group=topology.host_group)
    return found


def wait_for(folder: Path, pattern: str, count: int) -> None:
    while len(list(folder.glob(pattern))) < count:
        time.sleep(5e-4)


def write(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(pickle.dumps(value))
    part.rename(path)


def read(folder: Path, name: str, or_else: Path | None = None) -> Any:
    while not (folder / name).exists():
        if or_else is not None and or_else.exists():
            return None
        time.sleep(5e-4)
    return pickle.loads((folder / name).read_bytes())


if __name__ == "__main__":
    main()
