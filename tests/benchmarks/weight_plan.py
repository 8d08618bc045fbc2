"""What Python costs when weights leave the trainer: the plan of a large mixture, and each rank's part of its buckets.

    python -m tests.benchmarks.weight_plan [--tp 2] [--pp 2] [--ep 1] [--bucket-mib 256] [--rounds 5]

The shape is Qwen3-30B-A3B's: 48 layers of 128 experts, 18,867 tensors. All tensors are on the meta device, where a copy
moves nothing, so that what is left is Python and torch's bookkeeping. Medians are shown.

planning: the plan of all buckets, and from the rules every rank's part of each; done once. placing: a rank copies what
it gives to all of its buckets into their buffers and makes the views of all their tensors, as in a sync; divided by the
tensors of these buckets. Ranks are measured one after the other, of each stage the first (it gives the most). Targets:
planning 2 s, placing 30 microseconds a tensor.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median

import torch

from megatron_apo.runtime.topology import Topology
from megatron_apo.weights.families import hf_tensors
from megatron_apo.weights.gather import Gather
from megatron_apo.weights.plan import Plan
from tests.shards import QWEN3_30B_A3B, chunks_of, topologies

SPEC = QWEN3_30B_A3B
PLANNING_S = 2.0
PLACING_US = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--bucket-mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    ranks = list(topologies(device="meta", tp=args.tp, pp=args.pp, dp=args.ep, ep=args.ep))
    firsts = [ranks[ranks[0].owner_ranks(stage)[0]] for stage in range(args.pp)]
    bucket_bytes = args.bucket_mib * 2**20
    tensors = {name: torch.empty(shape, device="meta").bfloat16() for name, shape in hf_tensors(SPEC).items()}
    print(f"{len(tensors)} tensors, TP {args.tp} x PP {args.pp} x EP {args.ep}, buckets of {args.bucket_mib} MiB")
    planning_s = median(measure_planning(firsts[0], bucket_bytes) for _ in range(args.rounds))
    print(f"planning        {planning_s:10.2f} s   {verdict(planning_s, PLANNING_S)}")
    missed = planning_s > PLANNING_S
    for stage, topology in enumerate(firsts):
        gather = Gather(chunks_of(SPEC, topology, tensors), SPEC, topology, bucket_bytes=bucket_bytes)
        own = [bucket for bucket in gather.plan.buckets if bucket.pp_rank == stage]
        num_tensors = sum(len(bucket.tensors) for bucket in own)
        measure_placing(gather, stage)  # makes the parts
        placing_us = 1e6 * median(measure_placing(gather, stage) for _ in range(args.rounds)) / num_tensors
        what = f"us a tensor, {num_tensors} of them in {len(own)} buckets"
        print(f"placing, stage {stage:<3}{placing_us:8.1f} {what}   {verdict(placing_us, PLACING_US)}")
        missed |= placing_us > PLACING_US
    sys.exit(missed)


def measure_planning(topology: Topology, bucket_bytes: int) -> float:
    """Seconds for the plan, and for what each rank gives to each bucket."""
    start = time.perf_counter()
    plan = Plan.of(SPEC, torch.bfloat16, bucket_bytes, pp=topology.pp, ep=topology.ep, vpp=topology.vpp)
    for bucket in plan.buckets:
        for entry in bucket.entries:
            for tp_rank in range(topology.tp):
                entry.rule.pieces(SPEC, topology.tp, tp_rank)
    return time.perf_counter() - start


def measure_placing(gather: Gather, stage: int) -> float:
    """Seconds for a rank's part of one sync."""
    start = time.perf_counter()
    for bucket in gather.plan.buckets:
        if bucket.pp_rank == stage:
            buffer = torch.empty(bucket.num_bytes, dtype=torch.uint8, device="meta")
            gather.place(bucket, buffer)
            bucket.views(buffer)
    return time.perf_counter() - start


def verdict(found: float, target: float) -> str:
    return f"{'met' if found <= target else 'missed'}: target {target:g}"


if __name__ == "__main__":
    main()
