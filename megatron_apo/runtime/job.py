"""A job: its ranks, its nodes, this process's place, where the ranks meet, and the secret that they share.

The one file that reads or writes what torchrun, SLURM and our own launcher tell a process by its environment. Standard
library only.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from megatron_apo.runtime.files import write_whole

SECRET = "MEGATRON_APO_SECRET"  # in the environment alone: a command line and a TCPStore can be read by others
_LAUNCHED = "MEGATRON_APO_LAUNCHED"
_LOGS = "MEGATRON_APO_LOGS"  # what the path of every log begins with
_NODE = "MEGATRON_APO_NODE"
_NOTICE = "MEGATRON_APO_NOTICE"  # a file: seconds from being asked to end to being ended, and why
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
    label: str = ""  # what its ranks' logs begin with; none: rank 0's is the terminal
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


@dataclass(frozen=True)
class SlurmJob:
    """The SLURM job that this process is in. node_list: as SLURM writes it, "n[1-3]"; node: this one's name; attempt:
    how often the job was requeued; array_task: of an array of `array_tasks`, this one."""

    job_id: str
    node_list: str
    node: str
    attempt: int = 0
    cpus: int | None = None
    array_task: int | None = None
    array_tasks: int = 1


def slurm_job(environment: Mapping[str, str] = os.environ) -> SlurmJob | None:
    """None outside of one."""
    if "SLURM_JOB_ID" not in environment:
        return None

    def number(name: str) -> int | None:
        return int(environment[name]) if name in environment else None

    array, task = environment.get("SLURM_ARRAY_JOB_ID"), number("SLURM_ARRAY_TASK_ID")
    return SlurmJob(
        # The id of one of an array's tasks is the array's as well.
        environment["SLURM_JOB_ID"] if array is None or task is None else f"{array}_{task}",
        environment.get("SLURM_JOB_NODELIST", ""),
        environment.get("SLURMD_NODENAME", ""),
        number("SLURM_RESTART_COUNT") or 0,
        number("SLURM_CPUS_ON_NODE"),
        task,
        number("SLURM_ARRAY_TASK_COUNT") or 1,
    )


def share_secret(secret: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Have the processes that this one starts know the job's secret."""
    environment[SECRET] = secret


def slurm_tasks(environment: Mapping[str, str] = os.environ) -> int:
    """Tasks of the SLURM step that this process belongs to; 1 outside of SLURM."""
    return int(environment.get("SLURM_STEP_NUM_TASKS", 1))


def given_secret(environment: Mapping[str, str] = os.environ) -> str | None:
    """The secret of this process's job, without blanks around it; None where nobody has given it one."""
    return environment.get(SECRET, "").strip() or None


def notice(environment: Mapping[str, str] = os.environ) -> tuple[str, float]:
    """Why this process is asked to end its run at this moment, and how long it has for it, seconds; infinite where who
    has started it knows of no limit."""
    try:
        seconds, _, why = Path(environment[_NOTICE]).read_text().partition(" ")
        return why or "SIGUSR1", float(seconds)
    except (KeyError, OSError):
        return "SIGUSR1", math.inf


def give_notice(why: str, seconds: float, environment: MutableMapping[str, str] = os.environ) -> None:
    """What `notice` is from now on, here and in the processes that have this one's environment."""
    write_whole(Path(environment[_NOTICE]), f"{seconds} {why}")


def tell_notice_in(folder: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Before processes are started: where `give_notice` will write."""
    environment[_NOTICE] = str(folder / "notice")


def log_path(run_dir: Path, name: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Where a process of this node writes the log of this name."""
    prefix = environment.get(_LOGS)
    return Path(prefix + name) if prefix else run_dir / "logs" / name


def put_logs(folder: Path, node: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Have this process, and those that it starts, write its logs there, under the node's name."""
    environment[_LOGS] = str(folder / f"{node}-")


def be_node(environment: MutableMapping[str, str] = os.environ) -> None:
    """Before processes are started: this one acts upon SLURM's signals, which come to them too."""
    environment[_NODE] = "1"


def is_below_node(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of a step whose signals its node's process acts upon (`cluster/node.py`)."""
    return _NODE in environment


def new_secret() -> str:
    return secrets.token_urlsafe(32)
