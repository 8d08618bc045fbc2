"""A real SLURM whose nodes are hosts of this machine (`tests/hosts.py`).

    with cluster(folder, nodes=4) as slurm:
        job = slurm.sbatch("--nodes=4", script="#!/bin/sh\\nsrun hostname\\n")
        slurm.wait(job, "COMPLETED")
        print(slurm.output(job))

slurmctld runs on a host of its own, slurmd on each node, munged on all. All that they write is in the folder or in the
hosts' own /run, so that clusters can be side by side and nothing of one is left. Jobs run as root.

A job of the partition `low`, which is the default, makes way for one of `high` by being requeued.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tests import hosts
from tests.hosts import Host, Network, Process

START_S = 60.0  # a machine that is busy takes a few seconds
LOOK_EVERY_S = 0.1
NUM_LAST_LINES = 15
PROGRAMS = ("slurmctld", "slurmd", "munged")
# What a job does not come back from.
FINAL = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"),
)


def why_none() -> str:
    """Why there can be no cluster here; empty if there can."""
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    return hosts.why_none() or (f"{', '.join(missing)} not installed (slurm-wlm, munge)" if missing else "")


def why_skipped() -> str:
    """Why tests that take a cluster are skipped here; empty if they run. In CI as root they fail instead."""
    return "" if os.environ.get("CI") == "true" and os.geteuid() == 0 else why_none()


@dataclass(frozen=True)
class Cluster:
    """`sbatch` and its like run on the controller's host and in `folder`, where jobs leave their output."""

    folder: Path
    network: Network
    nodes: list[Host]
    controller: Host
    configuration: Path
    daemons: frozenset[int]

    def run(self, *command: object, given: str = "", **environment: str) -> str:
        """Run one of SLURM's commands; its output.

        Raises:
            RuntimeError: it failed, with what it said.
        """
        words, environment = [str(word) for word in command], {"SLURM_CONF": str(self.configuration)} | environment
        try:
            return self.controller.run(*words, cwd=self.folder, given=given, **environment)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{' '.join(words)}: {error.stdout}{error.stderr}") from None

    def sbatch(self, *arguments: object, script: str = "", **environment: str) -> str:
        """Submit a script, which is among the arguments or given as text; the job's id."""
        return self.run("sbatch", "--parsable", *arguments, given=script, **environment).strip()

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, or of one task of an array ("7_0")."""
        (found,) = self.show_all(job)
        return found

    def show_all(self, job: str) -> list[dict[str, str]]:
        """The same of all tasks of an array; those that have not started are together one."""
        lines = self.run("scontrol", "--oneliner", "show", "job", job).splitlines()
        return [dict(re.findall(r"(\S+?)=(.*?)\s*(?= \S+?=|$)", line)) for line in lines if line]

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def output(self, job: str) -> str:
        """What the job's script has written by now."""
        path = Path(self.show(job)["StdOut"])
        return path.read_text() if path.exists() else ""

    def wait(self, job: str, *states: str, within_s: float = 60, **fields: str) -> dict[str, str]:
        """Wait until the job is in one of these states, and `show` has these fields; what that shows.

        Raises:
            AssertionError: it ended in another way, or time was up.
        """
        end = time.monotonic() + within_s
        while True:
            found = self.show(job)
            if found["JobState"] in states and fields.items() <= found.items():
                return found
            if found["JobState"] in FINAL or time.monotonic() > end:
                told = " ".join(f"{key}={found.get(key)}" for key in ["Reason", "ExitCode", *fields])
                wanted = " ".join([" or ".join(states), *(f"{key}={value}" for key, value in fields.items())])
                said = _end_of(self.output(job))
                raise AssertionError(f"job {job} is {found['JobState']} ({told}), not {wanted}; it said\n{said}")
            time.sleep(LOOK_EVERY_S)

    def cancel(self, job: str, *options: str) -> None:
        self.run("scancel", *options, job)

    def preempt(self, *nodes: Host, for_s: float) -> str:
        """Take nodes away from jobs in `low`, by a job which is as long as that; its id."""
        names = ",".join(node.name for node in nodes)
        options = ["--partition=high", f"--nodelist={names}", "--exclusive", "--output=/dev/null"]
        return self.sbatch(*options, script=f"#!/bin/sh\nexec sleep {for_s}\n")

    def pids(self, node: Host) -> list[int]:
        """Processes on a node beside the daemons: jobs', with what SLURM runs for them, and what they left. Their
        numbers on this machine."""
        return [pid for pid in node.pids() if pid not in self.daemons]

    def commands(self, node: Host) -> list[str]:
        """Their command lines."""
        found = []
        for pid in self.pids(node):
            with suppress(OSError):
                found.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip())
        return [line for line in found if line]

    def wait_until_empty(self, within_s: float = 10) -> None:
        """Wait until there is nothing on the nodes but the daemons.

        Raises:
            AssertionError: time was up; names nodes and commands.
        """
        end = time.monotonic() + within_s
        while left := [f"{node.name}: {line}" for node in self.nodes for line in self.commands(node)]:
            if time.monotonic() > end:
                raise AssertionError("left on nodes:\n" + "\n".join(left))
            time.sleep(LOOK_EVERY_S)


@contextmanager
def cluster(
    folder: Path,
    nodes: int = 4,
    *,
    cpus: int = 2,
    memory_mb: int = 4000,
    grace_s: int = 5,
    **settings: str | int,
) -> Iterator[Cluster]:
    """A cluster that is ready: `nodes` nodes h0, h1 .. that seem to have so many CPUs and so much memory each.

    Args:
        folder: all hosts see it.
        grace_s: what a job that is preempted has to end by itself.
        settings: further lines of slurm.conf, or others in place of ours.
    """
    assert not (reason := why_none()), reason
    own = folder / "slurm"
    own.mkdir(parents=True)
    processes: dict[str, Process] = {}
    try:
        with hosts.network(folder, nodes, ["controller"]) as network:
            *workers, controller = network.hosts
            rows = [
                *(f"{key}={value}" for key, value in (_settings(controller) | settings).items()),
                *(f"NodeName={x.name} NodeAddr={x.address} CPUs={cpus} RealMemory={memory_mb}" for x in workers),
                f"PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s}",
                "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF",
            ]
            configuration = own / "slurm.conf"
            configuration.write_text("\n".join(rows) + "\n")
            (own / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # which runs whatever cgroups there are
            key = own / "munge.key"
            key.touch(0o600)
            key.write_bytes(secrets.token_bytes(128))
            for host in network.hosts:
                slurm = ["slurmctld", "-D"] if host is controller else ["slurmd", "-D", "-N", host.name]
                for name, command in (("munged", munged(key)), (slurm[0], slurm)):
                    log = own / f"{host.name}.{name}.log"
                    processes[log.stem] = host.start(*command, log=log, SLURM_CONF=str(configuration))
            made = Cluster(folder, network, workers, controller, configuration, frozenset())
            _wait_until_ready(made, processes)
            yield replace(made, daemons=frozenset(network.pids()))
    finally:
        for process in processes.values():
            process.wait(10)


def munged(key: Path, folder: Path = Path("/run/munge")) -> list[str]:
    """The command that runs a munged with a key and, in a folder of the host's own, all else that it has."""
    files = [f"--{name}={folder}/{name}" for name in ("pid-file", "seed-file")]
    start = ["munged", "--foreground", f"--key-file={key}", f"--socket={folder}/munge.socket.2", *files]
    return ["sh", "-c", f"mkdir -p {folder} && exec {' '.join(start)}"]


def _settings(controller: Host) -> dict[str, str | int]:
    return {
        "ClusterName": "tests",
        "SlurmctldHost": f"{controller.name}({controller.address})",
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": "cred_expire=5",  # a job that is requeued waits as long, 120 s by default
        "StateSaveLocation": "/run/slurmctld",
        "SlurmctldPidFile": "/run/slurmctld.pid",
        "SlurmdSpoolDir": "/run/slurmd",
        "SlurmdPidFile": "/run/slurmd.pid",
        "SlurmdParameters": "config_overrides",  # nodes have what is written here, whatever the machine has
        "ProctrackType": "proctrack/linuxproc",  # the others take cgroups
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SchedulerParameters": "batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1",
        "KillWait": 5,
        "ReturnToService": 2,
    }


def _wait_until_ready(slurm: Cluster, processes: dict[str, Process]) -> None:
    end = time.monotonic() + START_S
    waiting_for = {"controller"}
    while waiting_for:
        ended = [name for name, process in processes.items() if process.poll() is not None]
        late = time.monotonic() > end
        if ended or late:
            names = ended or [name for name in processes if name.split(".")[0] in waiting_for]
            ends = [f"{name}:\n{_end_of((slurm.folder / 'slurm' / f'{name}.log').read_text())}" for name in names]
            raise AssertionError(f"{'not ready' if late else 'ended'}: {', '.join(names)}\n" + "\n".join(ends))
        time.sleep(LOOK_EVERY_S)
        try:
            states = dict(line.split() for line in slurm.run("sinfo", "-hN", "-plow", "-o%N %T").splitlines())
            waiting_for = {node.name for node in slurm.nodes if states.get(node.name) != "idle"}
        except RuntimeError:
            continue


def _end_of(text: str) -> str:
    return "\n".join(text.splitlines()[-NUM_LAST_LINES:])
