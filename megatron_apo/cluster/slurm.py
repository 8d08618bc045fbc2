"""What SLURM is asked and told, by its own commands. Seen with 22.05; the tests run it."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime

PATIENCE_S = 180.0  # with a controller that restarts
_ANSWER_S, _AGAIN_S = 20.0, 3.0  # with one that is busy


class SlurmError(RuntimeError):
    """A command of SLURM's failed, or did not answer."""


@dataclass(frozen=True)
class JobState:
    """What `scontrol show job` says of a job. end_s: when it is ended, seconds since the epoch: at its limit, or, once
    it is preempted, with the grace. restarts: how often it was requeued."""

    name: str
    end_s: float | None
    is_preempted: bool
    restarts: int

    @property
    def runs(self) -> bool:
        """Not cancelled, requeued or over."""
        return self.name == "RUNNING"


def run(*command: str, patience_s: float = 0.0) -> str:
    """The output of one of SLURM's commands; asked again for `patience_s` where it fails. Raises SlurmError."""
    end = time.monotonic() + patience_s
    while True:
        try:
            return subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=_ANSWER_S, preexec_fn=_ignore_sigterm
            ).stdout
        except subprocess.CalledProcessError as error:
            why = error.stderr.strip() or str(error.returncode)
        except (OSError, subprocess.TimeoutExpired) as error:
            why = str(error)
        if time.monotonic() > end:
            raise SlurmError(f"{' '.join(command)}: {why}")
        time.sleep(_AGAIN_S)


def _ignore_sigterm() -> None:
    """In the command: what it asks for may end the job with all of its processes, and itself before it has answered."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def job_state(job_id: str, patience_s: float = 0.0) -> JobState:
    return read_job_state(run("scontrol", "--oneliner", "show", "job", job_id, patience_s=patience_s))


def read_job_state(text: str) -> JobState:
    """Of the line that `scontrol --oneliner show job` prints."""
    found = dict(re.findall(r"(\S+?)=(.*?)\s*(?= \S+?=|$)", text.splitlines()[0]))
    return JobState(
        found["JobState"],
        _seconds(found.get("EndTime")),
        _seconds(found.get("PreemptTime")) is not None,
        int(found.get("Restarts", 0)),
    )


def _seconds(text: str | None) -> float | None:
    try:
        return datetime.fromisoformat(text or "").timestamp()
    except ValueError:  # None, Unknown
        return None


def kill_wait_s() -> float:
    """Seconds from SIGTERM to SIGKILL of a job that is cancelled or at its limit."""
    found = re.search(r"^KillWait\s*=\s*(\d+)", run("scontrol", "show", "config"), re.MULTILINE)
    return float(found[1]) if found else 30.0


def requeue(job_id: str) -> None:
    run("scontrol", "requeue", job_id, patience_s=PATIENCE_S)


def node_names(node_list: str) -> list[str]:
    """Of "n[1-3,7]", as SLURM writes it, each."""
    return run("scontrol", "show", "hostnames", node_list).split()
