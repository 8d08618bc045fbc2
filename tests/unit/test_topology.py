"""Whose GPU a rank takes, and a model that is whole on its device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding

from megatron_apo.config import ParallelConfig
from megatron_apo.model.build import build_model
from megatron_apo.model.megatron_config import transformer_config
from megatron_apo.model.precision import Precision
from megatron_apo.parallel.groups import _device_index, alone
from megatron_apo.runtime.job import read_job
from tests.unit.test_precision import EXPERTS, SPEC


def job_of(rank, said):
    return read_job({"RANK": str(rank), "WORLD_SIZE": "16", "MASTER_ADDR": "n0", "MASTER_PORT": "1"} | said)


@pytest.mark.parametrize(
    ("said", "rank", "num_gpus", "index"),
    [
        ({"LOCAL_RANK": "1"}, 9, 8, 1),
        ({"LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, 9, 8, 1),  # ranks that one task of SLURM's started
        ({"SLURM_LOCALID": "3"}, 11, 8, 3),
        ({"SLURM_LOCALID": "3"}, 11, 1, 0),  # --gpus-per-task
        ({}, 11, 8, 3),
        ({}, 0, 1, 0),
    ],
)
def test_the_gpu_of_a_rank(said, rank, num_gpus, index):
    assert _device_index(job_of(rank, said), num_gpus) == index


@pytest.mark.parametrize("name", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_more_ranks_than_gpus(name):
    with pytest.raises(ValueError, match="^rank 10 is number 2 on its machine, .* sees 2 GPUs; "):
        _device_index(job_of(10, {name: "2"}), 2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("spec", [SPEC, EXPERTS], ids=["dense", "experts"])
def test_a_model_is_whole_on_its_rank_device(spec, dtype):
    """ "meta" stands for a GPU: what torch and Megatron-Core make on the CPU would stay there."""
    with alone() as topology:
        there = replace(topology, device=torch.device("meta"))
        (model,) = build_model(replace(spec, num_layers=1), ParallelConfig(), there, Precision(dtype))
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
        with torch.device("meta"):
            (model,) = build_model(replace(spec, num_layers=1), ParallelConfig(), topology, Precision(dtype))
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_sequence_parallelism_finds_its_random_state():
    """Megatron-Core forks it around the embedding and the layers, and draws nothing from it."""
    parallel = ParallelConfig(tp=2, sequence_parallel=True)
    with alone():
        config = transformer_config(SPEC, parallel, Precision("bf16", layers="te"))
        embedding = LanguageModelEmbedding(config, SPEC.vocab_size, SPEC.max_positions, "rope")
        before = torch.get_rng_state()
        hidden_SBH = embedding(torch.zeros(1, 6, dtype=torch.long), None)
        assert torch.equal(torch.get_rng_state(), before)
    assert hidden_SBH.shape == (6, 1, SPEC.hidden_size)
