"""Starts this node's trainer ranks, watches them, and leaves none behind.

A stage's command run by hand starts the ranks itself, all of them on this machine; under `torchrun` the same command is
a rank. Rank 0 writes to the terminal, the others to RUN/logs/rank<k>.log.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

from megatron_apo.config import Recipe
from megatron_apo.runtime import guard
from megatron_apo.runtime.ending import EndedEarly, request
from megatron_apo.runtime.files import write_whole
from megatron_apo.runtime.gpus import visible_gpus
from megatron_apo.runtime.job import (
    Job,
    Node,
    given_secret,
    is_below_node,
    new_secret,
    notice,
    slurm_tasks,
    without_job,
)
from megatron_apo.runtime.ports import free_port
from megatron_apo.runtime.signals import (
    ASK,
    END,
    ENDED_EARLY,
    RANK_LOST,
    block_ask,
    end_with_parent,
    on_ask,
    put_off,
)

_STOP_LIMIT_S = 10.0
_TOGETHER_S = 3.0
_LOG_TAIL_LINES = 20
_GUARDED = "MEGATRON_APO_GUARDED"


class RankFailed(RuntimeError):
    """A rank ended with an error. `exit_code` is its status; the message is empty where it has said why itself."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def spawn_stage(command: str, recipe: Recipe) -> None:
    """Run `megatron-apo COMMAND` with this recipe as the recipe's ranks on this machine.

    Raises `ValueError` as one of several tasks of a SLURM step: each would start a run of its own in the same folder.
    """
    if (tasks := slurm_tasks()) > 1:
        raise ValueError(
            f"srun --ntasks={tasks}: {command} starts its ranks itself, one task a machine; use --ntasks=1, or run "
            f"`torchrun ... -m megatron_apo.cli {command} ...` in one task on each machine"
        )
    spawn(stage_arguments(command, recipe), world_size=recipe.parallel.world_size, log_dir=recipe.run.dir / "logs")


def stage_arguments(command: str, recipe: Recipe, suffix: str = "") -> list[str]:
    """The command line of a stage with exactly this recipe, which is written into the run."""
    return [command, "--recipe", str(write_recipe(command, recipe, suffix))]


def write_recipe(command: str, recipe: Recipe, suffix: str = "") -> Path:
    """Write RUN/COMMAND<suffix>.yaml, once the recipe is checked; under torchrun it is rank 0 that has checked it."""
    path = recipe.run.dir / f"{command}{suffix}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, recipe.as_yaml())  # others may read it, and write the same
    return path


def be_rank(job: Job, log_dir: Path | None = None) -> None:
    """Be a rank, before torch is imported: one that torchrun has started does itself what our launcher does for others.

    log_dir: where all ranks but rank 0 write from now on; None: they write where they do.
    """
    end_with_parent()
    on_ask(lambda: request.ask(*notice()))
    if job.launched:
        return
    for name, value in _defaults().items():
        os.environ.setdefault(name, value)
    if job.rank and log_dir is not None:
        log_dir.mkdir(parents=True, exist_ok=True)
        write_to(rank_log(log_dir, job.rank), appending=job.attempt > 0)


def write_to(path: Path, *, appending: bool) -> None:
    """This process's output goes there from now on."""
    with path.open("ab" if appending else "wb") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())


def spawn(arguments: Sequence[str], *, world_size: int, log_dir: Path) -> None:
    """Run `megatron-apo ARGUMENTS` as `world_size` ranks on this machine and wait for them."""
    address = "127.0.0.1"
    secret = given_secret() or new_secret()
    spawn_node(arguments, Node(0, world_size, world_size, address, free_port(address), secret), log_dir)


def spawn_node(arguments: Sequence[str], node: Node, log_dir: Path) -> None:
    """Run `megatron-apo ARGUMENTS` as the ranks of this node and wait for them.

    The first rank to fail ends the others here; then `RankFailed` is raised. Also when this process is interrupted,
    every process that the ranks started is gone before this returns.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    logs: list[Path | None] = [
        rank_log(log_dir, node.first_rank + local_rank, node.label) for local_rank in range(node.num_ranks)
    ]
    if node.first_rank == 0 and not node.label:
        logs[0] = None  # the terminal
    failed, code = _supervise(
        [partial(_start_rank, arguments, node.job(local_rank), log) for local_rank, log in enumerate(logs)],
        leads=node.first_rank == 0,
    )
    if failed is not None:
        raise RankFailed(_describe(node.first_rank + failed, code, logs[failed]), code)


def run_command(arguments: Sequence[str], log: Path | None = None) -> None:
    """Run `megatron-apo ARGUMENTS` in a process of its own and wait for it, as `spawn` does for ranks.

    log: where it writes, the end of which is told when it fails; None: to this process's terminal.
    """
    failed, code = _supervise([partial(_start, arguments, dict(os.environ), log)])
    if failed is not None:
        raise _command_failed(arguments, code, log)


def run_commands(commands: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> None:
    """`run_command` of several at once: (arguments, what differs in the environment)."""
    failed, code = _supervise([partial(_start, arguments, {**os.environ, **own}, None) for arguments, own in commands])
    if failed is not None:
        raise _command_failed(commands[failed][0], code)


def _command_failed(arguments: Sequence[str], code: int, log: Path | None = None) -> RankFailed:
    worker = arguments[list(arguments).index("--worker") :] if "--worker" in arguments else []
    message = f"megatron-apo {' '.join([arguments[0], *worker])} ended with status {code}"
    return RankFailed(last_lines(message, log), code)


def is_guarded() -> bool:
    """Whether this process was started by `run_guarded`."""
    return _GUARDED in os.environ


def run_guarded(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """`run_command` in this environment and under `guard.py`: none of the processes that the command starts outlives
    this one, even when this one is killed, nor does what they leave in TMPDIR."""
    scratch = guard.unused_name("apo-")
    own = {**environment, _GUARDED: "1", "TMPDIR": str(scratch)}
    watch = [sys.executable, "-I", guard.__file__, f"--parent={os.getpid()}", f"--folder={scratch}"]
    watch += [*(["--deaf"] if is_below_node() else []), "--"]
    try:
        failed, code = _supervise([partial(_start, arguments, own, None, watch)])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # as the guard does: either may be killed
    if failed is not None and request.why is not None:
        raise EndedEarly(f"{arguments[0]} ended early, as it was asked to; started again it goes on with what is left")
    if failed is not None:
        raise RankFailed(_killed(f"megatron-apo {arguments[0]}", code), code)


def _supervise(starts: Sequence[Callable[[], subprocess.Popen[bytes]]], leads: bool = False) -> tuple[int | None, int]:
    """Start processes, wait for all (`_wait`). Returns (index of the first to fail or None, its exit code as a shell
    has it)."""
    guard.LIBC.prctl(guard.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what a killed child leaves becomes ours
    processes: list[subprocess.Popen[bytes]] = []
    callers_own, others = set(guard.descendants(os.getpid())), guard.shared_memory()
    try:
        with _heard_ask():
            for start in starts:
                processes.append(start())
            failed = _wait(processes, leads)
        code = processes[failed].returncode if failed is not None else 0
    finally:
        _stop(processes, callers_own, others)
    return failed, code if code >= 0 else 128 - code


@contextmanager
def _heard_ask() -> Iterator[None]:
    """SIGUSR1 asks this process to end its run early (`ending.py`), unless it means something else here already."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(ASK) is not signal.SIG_DFL:
        yield
        return
    signal.signal(ASK, lambda number, frame: request.ask(*notice()))
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, [ASK])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(ASK, signal.SIG_DFL)


def _start_rank(arguments: Sequence[str], job: Job, log: Path | None) -> subprocess.Popen[bytes]:
    environment = _defaults() | without_job(os.environ) | job.variables()
    return _start(arguments, environment, log)


def _defaults() -> dict[str, str]:
    """A rank's environment where the user says nothing else."""
    found = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not visible_gpus():
        # Megatron-Core asks torch to compile functions that no CPU rank calls: importing the compiler for it takes a
        # quarter of a rank's start.
        found["TORCHDYNAMO_DISABLE"] = "1"
    return found


def _start(
    arguments: Sequence[str], environment: Mapping[str, str], log_path: Path | None, watch: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """`log_path` None: write to this process's terminal. watch: the command that starts this one."""
    with put_off(), open(log_path, "wb") if log_path else nullcontext() as log:
        return subprocess.Popen(
            [*watch, sys.executable, "-m", "megatron_apo.cli", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log and subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the others in order
            preexec_fn=partial(_prepare, os.getpid()),
        )


def _prepare(parent: int) -> None:
    block_ask()
    guard.end_with(parent, END)  # SIGTERM may be blocked, and is then its children's as well


def _wait(ranks: list[subprocess.Popen[bytes]], leads: bool) -> int | None:
    """Index of the first rank that failed; None when all ended well. They are told once if the run is to end early.

    An error that all ranks raise together is the first's to tell, which writes to the terminal where it is rank 0: it
    has a moment to end as well. leads: the first is rank 0, and leaves last where all end early; who is still there a
    moment later waits for what it has not come to, such as the end of stage 1.
    """
    is_told, end_s = False, math.inf
    while True:
        codes = [rank.poll() for rank in ranks]
        if not is_told and (is_told := request.why is not None):
            for rank in ranks:
                rank.send_signal(ASK)
        failed = [index for index, code in enumerate(codes) if code not in (None, 0, ENDED_EARLY)]
        if failed:
            with suppress(subprocess.TimeoutExpired):
                ranks[0].wait(_TOGETHER_S)
            return failed[0] if ranks[0].returncode in (None, 0, RANK_LOST) else 0
        if leads and codes[0] == ENDED_EARLY:
            end_s = min(end_s, time.monotonic() + _TOGETHER_S)
        if None not in codes or time.monotonic() > end_s:
            return codes.index(ENDED_EARLY) if ENDED_EARLY in codes else None
        time.sleep(0.05)


def _stop(processes: list[subprocess.Popen[bytes]], callers_own: set[int], others: set[int]) -> None:
    """End what is still running. The first process (rank 0) has servers to stop and is asked; the others hold nothing,
    and their sudden end wakes a first one that waits for them in a collective.

    callers_own, others: processes and shared memory (inodes) that are not theirs.
    """
    end = time.monotonic()  # at once for what was being started when this process was interrupted
    if processes:
        first, *rest = processes
        if first.poll() is None:
            first.send_signal(END)
        for process in rest:
            process.kill()
            process.wait()
        try:
            first.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            first.kill()
            first.wait()
        end = time.monotonic() + _STOP_LIMIT_S  # guards of its servers see only now that it is gone

    def left() -> list[int]:
        return list(set(guard.descendants(os.getpid())) - callers_own)

    mapped: set[Path] = set()
    while below := left():  # a server's guard ends its tree by itself, unless it was killed
        mapped |= guard.mapped_shared_memory(below, others)
        if time.monotonic() > end:
            guard.end_all(left, mapped, others)
        time.sleep(0.05)
    for path in mapped:
        path.unlink(missing_ok=True)


def _describe(rank: int, code: int, path: Path | None) -> str:
    if path is None:
        return _killed(f"rank {rank}", code)
    return last_lines(f"rank {rank} ended with status {code}", path)


def last_lines(message: str, path: Path | None) -> str:
    """A message, and what a process wrote last into its log, if it has one."""
    if path is None:
        return message
    lines = path.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    return "\n".join([f"{message}; the end of {path}:", *lines])


def _killed(what: str, code: int) -> str:
    """What is left to say of a process that writes to this terminal: nothing, if it could say it itself."""
    if code <= 128:
        return ""
    hint = " (out of memory?)" if code == 128 + signal.SIGKILL else ""
    return f"{what} was ended by signal {code - 128}{hint}"


def rank_log(log_dir: Path, rank: int, label: str = "") -> Path:
    return log_dir / f"{label}rank{rank}.log"
