"""A job is what torchrun, SLURM or our launcher say, read in one place."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

import megatron_apo
from megatron_apo.runtime import job as module
from megatron_apo.runtime.job import (
    SECRET,
    VARIABLES,
    Job,
    Node,
    is_later_rank,
    num_local_ranks,
    read_job,
    slurm_tasks,
    without_job,
)

LEAST = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
TORCHRUN = LEAST | {
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_RANK": "5",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "3",
    "TORCHELASTIC_RUN_ID": "none",
}


def test_no_other_file_knows_the_launchers_variables() -> None:
    root = Path(megatron_apo.__file__).parent
    readers = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if node.value in VARIABLES or re.fullmatch(r"(TORCHELASTIC|SLURM)_\w+", node.value):
                    readers.add(str(path.relative_to(root)))
    assert readers == {"runtime/job.py"}


def test_not_a_rank() -> None:
    assert read_job({}) is None
    assert read_job({"RANK": "0"}) is None
    assert read_job({"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}) is None


def test_what_torchrun_says() -> None:
    assert read_job(TORCHRUN) == Job(
        rank=5,
        world_size=8,
        master_address="n0",
        master_port=29500,
        local_rank=1,
        local_world_size=4,
        node=1,
        num_nodes=2,
        agent_has_store=True,
        attempt=3,
    )


def test_a_rank_that_srun_started() -> None:
    said = {"SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2"}
    job = read_job(LEAST | said)
    assert job == Job(5, 8, "n0", 29500, local_rank=1, node=1, num_nodes=2, slurm_task=True)
    # In one task a node, torchrun's word counts.
    assert read_job(TORCHRUN | {"SLURM_LOCALID": "0", "SLURM_NODEID": "0"}) == read_job(TORCHRUN)


def test_a_rank_reads_what_it_was_told() -> None:
    node = Node(
        first_rank=4, num_ranks=4, world_size=8, master_address="n0", master_port=1, secret="s", index=1, count=2
    )
    job = node.job(3)
    assert (job.rank, job.local_rank, job.launched, job.secret) == (7, 3, True, "s")
    for each in (job, replace(job, agent_has_store=True, attempt=2, launched=False, secret=None), Job(0, 1, "h", 1)):
        assert read_job(each.variables()) == each


@pytest.mark.parametrize(
    ("said", "problems"),
    [
        ({"RANK": "one"}, ["RANK: 'one' is no number"]),
        ({"RANK": "8"}, ["RANK: 8 of WORLD_SIZE=8 ranks"]),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, ["MASTER_ADDR: missing", "MASTER_PORT: missing"]),
        ({"LOCAL_RANK": "-1", "MASTER_PORT": "x"}, ["MASTER_PORT: 'x' is", "LOCAL_RANK: '-1' is"]),
    ],
)
def test_a_job_that_is_not_one(said: dict[str, str], problems: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        read_job(LEAST | said)
    lines = str(error.value).splitlines()
    assert len(lines) == len(problems)
    assert all(line.startswith(problem) and "; " in line for line, problem in zip(lines, problems, strict=True))


def test_an_engine_is_no_rank_and_does_not_know_the_secret() -> None:
    others = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0", "SLURM_JOB_ID": "7", "NCCL_SOCKET_IFNAME": "=eth0"}
    assert without_job(TORCHRUN | {SECRET: "s"} | others) == {"ROLE_RANK": "5"} | others


def test_small_words() -> None:
    assert (num_local_ranks({}), num_local_ranks(TORCHRUN)) == (None, 4)
    assert (slurm_tasks({}), slurm_tasks({"SLURM_STEP_NUM_TASKS": "8"})) == (1, 8)
    assert [is_later_rank(said) for said in ({}, LEAST, LEAST | {"RANK": "0"})] == [False, True, False]
    assert module.new_secret() != module.new_secret()
