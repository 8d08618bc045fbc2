"""A rollout batch from the driver, which sampled it, to the ranks that learn from it.

    batch = scatter(topology, batch, rows_of)     # the driver's batch in, this rank's out

Lengths, rewards and ids go to every rank; tokens and log-probs to the replica that computes them, once over the wire to
its first rank and from there to the others. All of it is in host memory and over gloo: nothing waits on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.data.sequences import Sequences
from megatron_apo.runtime.topology import Topology


def scatter(
    topology: Topology, batch: RolloutBatch | None, rows_of: Callable[[RolloutBatch], Sequence[Sequence[int]]]
) -> RolloutBatch:
    """The driver's `batch` on every rank, with the tokens of its replica's rows; the driver keeps all. Collective.

    rows_of(batch): the rows that each replica computes, if any, ascending; a function of what every rank has.
    """
    shared: RolloutBatch = topology.broadcast(batch.select([]) if batch is not None else None)
    leaders = [topology.replica_ranks(replica)[0] for replica in range(topology.dp)]
    rows = rows_of(shared)
    own_rows = rows[topology.dp_rank]
    if batch is not None:
        sent = []
        for leader, part in zip(leaders[1:], rows[1:], strict=True):
            if part:
                data = _packed(batch, part)
                sent.append((dist.isend(data, dst=leader, group=topology.host_group), data))
        if own_rows and len(topology.replica_ranks(0)) > 1:
            dist.broadcast(_packed(batch, own_rows), src=topology.rank, group=topology.replica_group)
        for work, _ in sent:
            work.wait()
        return batch
    data = torch.empty(_num_bytes(shared, own_rows), dtype=torch.uint8)
    leader = leaders[topology.dp_rank]
    if own_rows and topology.rank == leader:
        dist.recv(data, src=0, group=topology.host_group)
    if own_rows and len(topology.replica_ranks(topology.dp_rank)) > 1:
        dist.broadcast(data, src=leader, group=topology.replica_group)
    return _unpacked(shared, own_rows, data.numpy())


def _num_bytes(batch: RolloutBatch, rows: Sequence[int]) -> int:
    """Of the tokens and log-probs of `rows`."""
    lengths = batch.sequences
    return 4 * int(lengths.num_tokens_B[list(rows)].sum() + lengths.response_lengths_B[list(rows)].sum())


def _packed(batch: RolloutBatch, rows: Sequence[int]) -> torch.Tensor:
    """Token ids of `rows`, then their log-probs, as bytes: each is copied once."""
    data = np.empty(_num_bytes(batch, rows), dtype=np.uint8)
    split = 4 * int(batch.sequences.num_tokens_B[list(rows)].sum())
    np.concatenate([batch.sequences.row(row) for row in rows], out=data[:split].view(np.int32))
    np.concatenate([batch.log_probs_of(row) for row in rows], out=data[split:].view(np.float32))
    return torch.from_numpy(data)


def _unpacked(batch: RolloutBatch, rows: Sequence[int], data: NDArray[np.uint8]) -> RolloutBatch:
    """`batch`, of which nothing was held, with tokens and log-probs of `rows`."""
    held, lengths = np.asarray(rows, dtype=np.int64), batch.sequences
    split = 4 * int(lengths.num_tokens_B[held].sum())
    sequences = Sequences(lengths.prompt_lengths_B, lengths.response_lengths_B, held, data[:split].view(np.int32))
    return replace(batch, sequences=sequences, log_prob_R=data[split:].view(np.float32))
