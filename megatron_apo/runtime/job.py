"""A job: its ranks, its nodes, this process's place, where the ranks meet, and the secret that they share.

The one file that reads or writes what torchrun, SLURM and our own launcher tell a process by its environment. Standard
library only.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

SECRET = "MEGATRON_APO_SECRET"  # in the environment alone: a command line and a TCPStore can be read by others
_LAUNCHED = "MEGATRON_APO_LAUNCHED"
_NOTICE = "MEGATRON_APO_NOTICE_S"
_AGENT_STORE, _ATTEMPT = "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"
VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    SECRET,
    _LAUNCHED,
    _NOTICE,
)
_PREFIXES = ("TORCHELASTIC_",)


@dataclass(frozen=True)
class Job:
    """A rank's place in its job. Whatever nobody has said is None."""

    rank: int  # 0 is the driver
    world_size: int
    master_address: str
    master_port: int
    local_rank: int | None = None  # its number among the ranks of its node, from 0
    local_world_size: int | None = None  # ranks of its node
    node: int = 0
    num_nodes: int = 1  # launchers that started ranks; two may be on one host
    agent_has_store: bool = False  # torchrun's first agent holds the job's store, which is rank 0's otherwise
    attempt: int = 0  # torchrun has restarted the ranks so often
    launched: bool = False  # by our own launcher, which checks the recipe, and writes logs, recipe and summary
    slurm_task: bool = False  # SLURM has started this rank itself, and may show each its own GPU alone
    secret: str | None = None
    notice_s: float = math.inf  # from SIGUSR1, by which a run is asked to end, to when it is ended

    def variables(self) -> dict[str, str]:
        """What a rank is told: `read_job` of it is this job."""
        found = {
            "RANK": self.rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_world_size,
            "GROUP_RANK": self.node,
            "GROUP_WORLD_SIZE": self.num_nodes,
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": self.master_port,
            SECRET: self.secret,
            _LAUNCHED: 1 if self.launched else None,
            _AGENT_STORE: True if self.agent_has_store else None,
            _ATTEMPT: self.attempt or None,
            _NOTICE: self.notice_s if self.notice_s < math.inf else None,
        }
        return {name: str(value) for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Node:
    """What the launcher of one node starts: `num_ranks` ranks of a job, from `first_rank` on."""

    first_rank: int
    num_ranks: int
    world_size: int
    master_address: str
    master_port: int
    secret: str
    index: int = 0
    count: int = 1

    def job(self, local_rank: int) -> Job:
        """The place of its rank number `local_rank`."""
        return Job(
            rank=self.first_rank + local_rank,
            world_size=self.world_size,
            master_address=self.master_address,
            master_port=self.master_port,
            local_rank=local_rank,
            local_world_size=self.num_ranks,
            node=self.index,
            num_nodes=self.count,
            launched=True,
            secret=self.secret,
            notice_s=notice_s(),
        )


def read_job(environment: Mapping[str, str] = os.environ) -> Job | None:
    """The job of which this process is a rank; None where RANK and WORLD_SIZE do not say so.

    Raises a ValueError, one line a variable, for a job that is not fully described.
    """
    if not is_rank(environment):
        return None
    problems: list[str] = []

    def number(name: str, fallback: str = "") -> int | None:
        text = environment.get(name) or environment.get(fallback)
        if text is None:
            return None
        if not text.isdecimal():
            problems.append(f"{name}: {text!r} is no number from 0 on; start the rank with torchrun, or correct it")
            return 0
        return int(text)

    rank, world_size, port = number("RANK"), number("WORLD_SIZE"), number("MASTER_PORT")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            problems.append(f"{name}: missing; RANK and WORLD_SIZE say that this is a rank: give where rank 0 listens")
    job = Job(
        rank=rank or 0,
        world_size=world_size or 0,
        master_address=environment.get("MASTER_ADDR", ""),
        master_port=port or 0,
        local_rank=number("LOCAL_RANK", "SLURM_LOCALID"),
        local_world_size=number("LOCAL_WORLD_SIZE"),
        node=number("GROUP_RANK", "SLURM_NODEID") or 0,
        num_nodes=number("GROUP_WORLD_SIZE", "SLURM_STEP_NUM_NODES") or 1,
        agent_has_store=environment.get(_AGENT_STORE) == "True",
        attempt=number(_ATTEMPT) or 0,
        launched=_LAUNCHED in environment,
        slurm_task="LOCAL_RANK" not in environment and "SLURM_LOCALID" in environment,
        secret=given_secret(environment),
        notice_s=notice_s(environment),
    )
    if not problems and job.rank >= job.world_size:
        problems.append(f"RANK: {job.rank} of WORLD_SIZE={job.world_size} ranks, which are counted from 0; correct one")
    if problems:
        raise ValueError("\n".join(problems))
    return job


def is_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one rank of a job that someone else started."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Ranks of this process's job; 1 for a process that is none."""
    return int(environment["WORLD_SIZE"]) if is_rank(environment) else 1


def num_local_ranks(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many of a rank's job are on its node; None where nobody says."""
    return int(environment["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in environment else None


def num_nodes(environment: Mapping[str, str] = os.environ) -> int | None:
    """Of a rank's job; None where nobody says."""
    given = environment.get("GROUP_WORLD_SIZE") or environment.get("SLURM_STEP_NUM_NODES")
    return int(given) if given else None


def is_later_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a rank other than rank 0, whose output is a log."""
    return is_rank(environment) and environment["RANK"] != "0"


def without_job(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is no rank, and must neither take itself for one nor know the secret."""
    return {
        name: value for name, value in environment.items() if name not in VARIABLES and not name.startswith(_PREFIXES)
    }


def slurm_tasks(environment: Mapping[str, str] = os.environ) -> int:
    """Tasks of the SLURM step that this process belongs to; 1 outside of SLURM."""
    return int(environment.get("SLURM_STEP_NUM_TASKS", 1))


def given_secret(environment: Mapping[str, str] = os.environ) -> str | None:
    """The secret of this process's job, without blanks around it; None where nobody has given it one."""
    return environment.get(SECRET, "").strip() or None


def notice_s(environment: Mapping[str, str] = os.environ) -> float:
    """Seconds from being asked to end a run to being ended, as its launcher has said; without a word, infinite."""
    return float(environment.get(_NOTICE, math.inf))


def new_secret() -> str:
    return secrets.token_urlsafe(32)
