"""Joins a job: its process groups, set up through Megatron-Core, and this process's place in them."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_apo.config import ParallelConfig
from megatron_apo.model import cpu_compat
from megatron_apo.runtime.launch import RANK_LOST
from megatron_apo.runtime.topology import Topology

_PATIENCE = datetime.timedelta(days=7)  # of `host_group`: a rank that dies ends the others without it


class RankLost(RuntimeError):
    """Another rank of the job ended while this one was talking to it."""

    exit_code = RANK_LOST


@contextmanager
def distributed(parallel: ParallelConfig) -> Iterator[Topology]:
    """Join the job described by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; leave it at the end."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size != parallel.world_size:
        raise ValueError(
            f"parallel: tp={parallel.tp} x pp={parallel.pp} x cp={parallel.cp} x dp={parallel.dp} needs "
            f"{parallel.world_size} ranks, but the job has {world_size}; change the recipe or the number of ranks"
        )
    with _joined(parallel, rank, world_size, None) as topology:
        yield topology


@contextmanager
def alone() -> Iterator[Topology]:
    """A job of this process alone, which needs no port."""
    with _joined(ParallelConfig(), 0, 1, dist.HashStore()) as topology:
        yield topology


def _device_index(rank: int, num_gpus: int) -> int:
    """Which of the GPUs that this process sees is its own. torchrun says LOCAL_RANK; srun SLURM_LOCALID, and may show
    each rank its own GPU alone."""
    if "LOCAL_RANK" not in os.environ and "SLURM_LOCALID" in os.environ and num_gpus == 1:
        return 0
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", rank % num_gpus)))
    if local >= num_gpus:
        raise ValueError(
            f"rank {rank} is number {local} on its machine, counted from 0, and sees {num_gpus} GPUs; start one rank a "
            "GPU, or name more GPUs in CUDA_VISIBLE_DEVICES"
        )
    return local


@contextmanager
def _joined(parallel: ParallelConfig, rank: int, world_size: int, store: dist.Store | None) -> Iterator[Topology]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    cpu_compat.install()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(_device_index(rank, torch.cuda.device_count()))
    torch.set_num_threads(parallel.threads_per_rank)
    timeout = datetime.timedelta(seconds=parallel.timeout_s)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=timeout, store=store, rank=rank, world_size=world_size
    )
    done = False
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tp,
            pipeline_model_parallel_size=parallel.pp,
            virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
            context_parallel_size=parallel.cp,
            expert_model_parallel_size=parallel.ep,
            distributed_timeout_minutes=max(1, int(parallel.timeout_s / 60)),
        )
        # Under sequence parallelism Megatron-Core asks for its random states wherever there could be dropout. There is
        # none, so that nothing draws from them.
        model_parallel_cuda_manual_seed(0)
        topology = Topology(
            rank=rank,
            world_size=world_size,
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            dp_rank=parallel_state.get_data_parallel_rank(),
            tp=parallel.tp,
            pp=parallel.pp,
            dp=parallel.dp,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            pp_group=parallel_state.get_pipeline_model_parallel_group(),
            dp_group=parallel_state.get_data_parallel_group(),
            device=torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"),
            ep=parallel.ep,
            cp=parallel.cp,
            cp_rank=parallel_state.get_context_parallel_rank(),
            cp_group=parallel_state.get_context_parallel_group(),
            vpp=parallel.vpp,
            host_group=dist.new_group(backend="gloo", timeout=_PATIENCE),
        )
        for replica in range(topology.dp):  # every rank takes part in making every group
            group = dist.new_group(topology.replica_ranks(replica), backend="gloo", timeout=_PATIENCE)
            if replica == topology.dp_rank:
                topology = replace(topology, replica_group=group)
        assert topology.rank in topology.replica_ranks(topology.dp_rank), "Megatron-Core's rank order changed"
        assert topology.ep_rank == parallel_state.get_expert_model_parallel_rank(), "Megatron-Core's rank order changed"
        yield topology
        done = True
    except RuntimeError as error:
        if any(text in str(error) for text in ("Connection closed by peer", "Connection reset by peer")):
            raise RankLost(f"rank {rank}: the connection to another rank was lost; see what that rank said") from error
        raise
    finally:
        # NCCL's shutdown waits for collectives, in which the others may be stuck: a rank that failed leaves it to the
        # end of its process, and says why first.
        if done or not on_gpu:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
