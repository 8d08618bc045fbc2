"""Joins a job: its process groups, set up through Megatron-Core, and this process's place in them."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_apo.config import ParallelConfig
from megatron_apo.model import cpu_compat
from megatron_apo.runtime.heartbeat import Heartbeat, announce
from megatron_apo.runtime.hosts import join_store, meet
from megatron_apo.runtime.job import Job, read_job
from megatron_apo.runtime.signals import RANK_LOST
from megatron_apo.runtime.topology import Topology

_PATIENCE = datetime.timedelta(days=7)  # of `host_group`: a rank that dies ends the others without it


class RankLost(RuntimeError):
    """Another rank of the job ended while this one was talking to it."""

    exit_code = RANK_LOST


@contextmanager
def distributed(parallel: ParallelConfig) -> Iterator[Topology]:
    """Join the job that this process is a rank of (`runtime/job.py`); leave it at the end.

    A rank of it that falls silent meanwhile ends the run within `parallel.timeout_s` (`runtime/heartbeat.py`).
    """
    job = read_job()
    if job is None:
        raise ValueError("RANK, WORLD_SIZE: missing; start the ranks with megatron-apo or torchrun")
    if job.world_size != parallel.world_size:
        raise ValueError(
            f"parallel: tp={parallel.tp} x pp={parallel.pp} x cp={parallel.cp} x dp={parallel.dp} needs "
            f"{parallel.world_size} ranks, but the job has {job.world_size}; change the recipe or the number of ranks"
        )
    store = join_store(job, parallel.timeout_s)
    announce(job, store)
    places = meet(job, store, parallel.timeout_s)
    with ExitStack() as stack:
        if job.world_size > 1:
            stack.enter_context(Heartbeat(job, [place.name for place in places], parallel.timeout_s))
        topology = stack.enter_context(_joined(parallel, job, dist.PrefixStore("groups", store)))
        yield replace(topology, hosts=tuple(place.host for place in places))


@contextmanager
def alone() -> Iterator[Topology]:
    """A job of this process alone, which needs no port."""
    with _joined(ParallelConfig(), Job(0, 1, "", 0), dist.HashStore()) as topology:
        yield topology


def _device_index(job: Job, num_gpus: int) -> int:
    """Which of the GPUs that this process sees is its own. srun may show each rank its own GPU alone."""
    if job.slurm_task and num_gpus == 1:
        return 0
    local = job.rank % num_gpus if job.local_rank is None else job.local_rank
    if local >= num_gpus:
        raise ValueError(
            f"rank {job.rank} is number {local} on its machine, counted from 0, and sees {num_gpus} GPUs; start one "
            "rank a GPU, or name more GPUs in CUDA_VISIBLE_DEVICES"
        )
    return local


@contextmanager
def _joined(parallel: ParallelConfig, job: Job, store: dist.Store) -> Iterator[Topology]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    cpu_compat.install()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(_device_index(job, torch.cuda.device_count()))
    torch.set_num_threads(parallel.threads_per_rank)
    timeout = datetime.timedelta(seconds=parallel.timeout_s)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=timeout, store=store, rank=job.rank, world_size=job.world_size
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
            rank=job.rank,
            world_size=job.world_size,
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
            raise RankLost(
                f"rank {job.rank}: the connection to another rank was lost; see what that rank said"
            ) from error
        raise
    finally:
        # NCCL's shutdown waits for collectives, in which the others may be stuck: a rank that failed leaves it to the
        # end of its process, and says why first.
        if done or not on_gpu:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
