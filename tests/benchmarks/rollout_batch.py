"""The hand-out of a rollout batch to the ranks, beside a bare scatter of as many bytes over the same group.

    python -m tests.benchmarks.rollout_batch [--prompts 256] [--tokens 16384] [--dp 4] [--pp 1] [--rounds 7]

Real ranks over gloo on this machine. The driver has a batch of random responses of exactly so many tokens; both ways
take turns, each between barriers, and medians are shown. The bare scatter gives every replica's first rank an equal
part of the bytes; with further ranks in a replica it broadcasts them there. Memory is what a rank that is not the
driver holds of the batch, by its arrays and by the growth of its private memory. Targets: 2 x the bare scatter; the
share + 1 %.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections import defaultdict
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

from megatron_apo.config import ParallelConfig, build_recipe
from megatron_apo.data.layout import plan_batch
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.data.sequences import Sequences
from megatron_apo.parallel.groups import distributed
from megatron_apo.parallel.scatter import scatter
from megatron_apo.runtime.topology import Topology
from megatron_apo.telemetry.memory import private_bytes
from tests.benchmarks.ranks import run_ranks

PROMPT_TOKENS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--dp", type=int, default=4)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    run_ranks(args.dp * args.pp, be_rank, args)


def be_rank(args: argparse.Namespace) -> None:
    with distributed(ParallelConfig(dp=args.dp, pp=args.pp)) as topology:
        measure(topology, args)


def measure(topology: Topology, args: argparse.Namespace) -> None:
    recipe = build_recipe(
        {}, ["model.path=m", "data.train=t", "vstar.dir=v", f"train.tokens_per_micro_batch={args.tokens}"]
    )

    def rows_of(batch: RolloutBatch) -> list[list[int]]:
        plan = plan_batch(recipe, batch.sequences, num_minibatches=2, dp=topology.dp)
        return [plan.rows_of(replica) for replica in range(topology.dp)]

    whole = random_batch(args.prompts, args.tokens) if topology.is_driver else None
    num_bytes = 4 * args.prompts * (2 * args.tokens - PROMPT_TOKENS)  # token ids, and log-probs of responses
    share = num_bytes // topology.dp
    found: defaultdict[str, list[float]] = defaultdict(list)
    held = grown = 0
    for _ in range(args.rounds + 1):
        gc.collect()
        before = private_bytes(os.getpid())
        part = timed(found, "scatter", lambda: scatter(topology, whole, rows_of))
        grown = max(grown, private_bytes(os.getpid()) - before)
        held = part.sequences.token_ids_T.nbytes + part.log_prob_R.nbytes + everyones(part)
        del part
        parts = list(torch.zeros(topology.dp, share, dtype=torch.uint8)) if topology.is_driver else None
        timed(found, "bare", lambda parts=parts: bare(topology, parts, share))
        del parts
    told = [None] * topology.world_size
    dist.all_gather_object(told, (held / share, grown / share))
    if topology.is_driver:
        ours, theirs = (median(found[name][1:]) for name in ("scatter", "bare"))
        others = [pair for rank, pair in enumerate(told) if rank]
        print(
            f"dp {topology.dp} x pp {topology.pp}, {args.prompts} x {args.tokens:,} tokens, {num_bytes / 1e6:.1f} MB: "
            f"scatter {ours:.3f} s, bare {theirs:.3f} s, {ours / theirs:.2f} x; a rank holds at most "
            f"{max(arrays for arrays, _ in others):.4f} of its share, its memory grew by at most "
            f"{max(grown for _, grown in others):.3f} of it"
        )


def timed(found: dict[str, list[float]], name: str, work):
    dist.barrier()
    start = time.perf_counter()
    value = work()
    dist.barrier()
    found[name].append(time.perf_counter() - start)
    return value


def bare(topology: Topology, parts: list[torch.Tensor] | None, share: int) -> None:
    """`share` bytes to each replica's first rank, and within the replica to the others."""
    leaders = [topology.replica_ranks(replica)[0] for replica in range(topology.dp)]
    data = torch.empty(share, dtype=torch.uint8)
    if topology.pp == 1:
        dist.scatter(data, parts, src=0, group=topology.host_group)
        return
    if parts is not None:
        pairs = zip(leaders[1:], parts[1:], strict=True)
        sent = [dist.isend(part, dst=leader, group=topology.host_group) for leader, part in pairs]
        data = parts[0]
        for work in sent:
            work.wait()
    elif topology.rank in leaders:
        dist.recv(data, src=0, group=topology.host_group)
    dist.broadcast(data, src=leaders[topology.dp_rank], group=topology.replica_group)


def random_batch(prompts: int, tokens: int) -> RolloutBatch:
    """Sequences of exactly `tokens` tokens."""
    draw, ids = np.random.default_rng(0), tuple(f"{row:032x}" for row in range(prompts))
    lengths = np.full(prompts, PROMPT_TOKENS, dtype=np.int32), np.full(prompts, tokens - PROMPT_TOKENS, dtype=np.int32)
    return RolloutBatch(
        prompt_ids=ids,
        group_B=np.arange(len(ids), dtype=np.int32),
        sequences=Sequences(*lengths, np.arange(prompts), draw.integers(0, 150_000, prompts * tokens, dtype=np.int32)),
        log_prob_R=-draw.random(prompts * (tokens - PROMPT_TOKENS), dtype=np.float32),
        reward_B=draw.random(prompts),
        finish_reason_B=np.zeros(prompts, dtype=np.uint8),
        weight_version_B=np.zeros(prompts, dtype=np.int64),
        seconds_B=draw.random(prompts),
        wave_B=np.zeros(prompts, dtype=np.int32),
    )


def everyones(part: RolloutBatch) -> int:
    """Bytes of what every rank has of all rows."""
    arrays = [part.group_B, part.reward_B, part.finish_reason_B, part.weight_version_B, part.seconds_B, part.wave_B]
    arrays += [part.sequences.prompt_lengths_B, part.sequences.response_lengths_B, part.sequences.held_H]
    return sum(array.nbytes for array in arrays) + sum(map(len, part.prompt_ids))


if __name__ == "__main__":
    main()
