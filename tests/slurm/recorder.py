"""A job's process that notes what SLURM does to it: `recorder.py LOG ROLE [COMMAND ...]`.

Each line of LOG: seconds, attempt, node, role, and what happened: `start`, a signal's name, `ended CODE` of the
command, `requeue CODE` of asking for that, `leaves`. After what happens to a batch script, `sees` says what `scontrol`
shows of its job.

It leaves, with code 0, at SIGTERM, or at once if this is not the first attempt. It starts the command and stays when
that has ended, unless LEAVES is set. With REQUEUES set it asks at SIGUSR1 to be requeued, twice.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial

SIGNALS = [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT]
FIELDS = ("JobState", "Reason", "Restarts", "PreemptTime", "EndTime")


def main() -> None:
    path, role, *command = sys.argv[1:]
    attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    received: list[str] = []

    def note(*words: object) -> None:
        line = " ".join(map(str, [f"{time.time():.3f}", attempt, os.environ["SLURMD_NODENAME"], role, *words]))
        os.write(log, f"{line}\n".encode())

    def note_signal(number: int, _: object) -> None:
        received.append(signal.Signals(number).name)
        note(received[-1])

    for number in SIGNALS:
        signal.signal(number, note_signal)
    note("start")
    child = subprocess.Popen(command) if command and not attempt else None
    leaves = bool(attempt)
    while not leaves:
        time.sleep(0.02)
        happened, received[:] = received[:], []
        if child and child.poll() is not None:
            happened.append(f"ended {child.returncode}")
            note(happened[-1])
            leaves, child = "LEAVES" in os.environ, None
        if role == "batch" and set(happened) - {"SIGCONT"}:
            note("sees", *_shown())
        if "SIGUSR1" in happened and "REQUEUES" in os.environ:
            for _ in range(2):
                note("requeue", _scontrol("requeue").returncode)
        leaves = leaves or "SIGTERM" in happened
    note("leaves")


def _shown() -> list[str]:
    return [word for word in _scontrol("--oneliner", "show", "job").stdout.split() if word.split("=")[0] in FIELDS]


def _scontrol(*words: str) -> subprocess.CompletedProcess[str]:
    """It may be about a requeue, whose signal ends whatever the script has started."""
    command = ["scontrol", *words, os.environ["SLURM_JOB_ID"]]
    ignore = partial(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=ignore)


main()
