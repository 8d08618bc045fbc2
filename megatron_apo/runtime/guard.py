"""Runs one command and leaves nothing behind: `python guard.py --parent PID [--folder DIR]... [--deaf] -- COMMAND...`

A rollout server is a tree of processes (API server, engine core, workers, resource trackers) with shared memory and
sockets. The guard is its root: a subreaper, so that orphans of the tree become its children and none is lost. When the
command ends, the guard gets SIGTERM or SIGUSR1, or the parent is gone (SIGKILL included), it ends the whole tree,
unlinks the shared memory that the tree had mapped, removes the folders, and exits with the command's status.
SLURM sends its signals to every process of a step. With --deaf the guard heeds its parent's alone, and what it guards
gets none.
It looks for shared memory all along, since a process that ends in order may leave its own (vLLM's workers on a CPU do).
It makes the folders as well: a parent that made them could be killed before there is a guard.
Standard library only: it is started by path, and imports nothing of this package.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Set
from contextlib import suppress
from functools import partial
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None, use_errno=True)
POLL_S = 0.25
LOOK_EVERY_S = 1.0  # a millisecond a process
TRACKER_LIMIT_S = 2.0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--folder", type=Path, action="append", default=[])
    parser.add_argument("--deaf", action="store_true")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals | {signal.SIGCHLD})
    status, made = 1, []
    mapped: set[Path] = set()
    others = shared_memory()  # a model's files, say, which the tree only reads
    next_look = 0.0
    try:
        for folder in args.folder:
            folder.mkdir(mode=0o700)
            made.append(folder)
        prepare = partial(_prepare_child, os.getpid(), args.deaf)
        server = subprocess.Popen(args.command[1:], stdin=subprocess.DEVNULL, preexec_fn=prepare)
        while (code := server.poll()) is None and os.getppid() == args.parent:
            if time.monotonic() >= next_look:
                mapped |= mapped_shared_memory(_everyone(), others)
                next_look = time.monotonic() + LOOK_EVERY_S
            caught = signal.sigtimedwait(signals | {signal.SIGCHLD}, POLL_S)
            if caught and caught.si_signo in signals and (not args.deaf or caught.si_pid == args.parent):
                break
            _reap(server.pid)
        status = 1 if code is None else code
    except OSError as error:
        print(error, file=sys.stderr)
    finally:
        end_all(lambda: descendants(os.getpid()), mapped, others)
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
    return status if status >= 0 else 128 - status


def unused_name(prefix: str, parent: Path | None = None) -> Path:
    """A name for `--folder`: `prefix` and random letters, in `parent` (None: the folder for temporary files)."""
    return Path(parent or tempfile.gettempdir()) / (prefix + secrets.token_hex(6))


def _prepare_child(guard: int, deaf: bool) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGTERM, signal.SIGUSR1] if deaf else [])
    end_with(guard, signal.SIGKILL if deaf else signal.SIGTERM)  # for the guard's own sudden end


def end_with(parent: int, number: signal.Signals = signal.SIGTERM) -> None:
    """In a new process: be sent a signal when `parent` ends, which may have been before this."""
    LIBC.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def end_all(living: Callable[[], list[int]], mapped: Iterable[Path] = (), others: Set[int] = frozenset()) -> None:
    """End the processes that `living` finds, now and after that; unlink the shared memory that they have mapped now or
    had before (`mapped`), but not the `others`.

    SIGKILL at once: a server holds nothing worth a graceful end, and vLLM's own ends its engine the same way.
    """
    everyone = living()
    mapped = mapped_shared_memory(everyone, others).union(mapped)
    # Resource trackers unlink what their processes leaked once those are dead, so they end last, by themselves.
    kill([pid for pid in everyone if not _is_resource_tracker(pid)])
    end = time.monotonic() + TRACKER_LIMIT_S
    while time.monotonic() < end and living():
        time.sleep(0.02)
    while everyone := living():
        kill(everyone)
        time.sleep(0.02)
    for path in mapped:
        with suppress(OSError):
            path.unlink()


def _everyone() -> list[int]:
    """This process's descendants; unlike `descendants`, it collects none: the command's status is for its Popen."""
    return [pid for child in children(os.getpid()) for pid in (child, *descendants(child))]


def kill(pids: list[int]) -> None:
    """SIGKILL those that still live."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _reap(server_pid: int) -> None:
    """Collect orphans that ended; the server itself is left to its Popen."""
    for pid in children(os.getpid()):
        if pid != server_pid:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                continue


def children(pid: int) -> list[int]:
    try:
        return [
            int(child)
            for task in os.listdir(f"/proc/{pid}/task")
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return []


def descendants(pid: int) -> list[int]:
    """Live processes below `pid`; ended ones that are this process's own children are collected on the way."""
    found = []
    for child in children(pid):
        found += descendants(child)
        if is_zombie(child):
            if pid == os.getpid():
                try:
                    os.waitpid(child, os.WNOHANG)
                except ChildProcessError:
                    pass
        else:
            found.append(child)
    return found


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _is_resource_tracker(pid: int) -> bool:
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def shared_memory() -> set[int]:
    """Inodes of what is in /dev/shm."""
    return {entry.inode() for entry in os.scandir("/dev/shm")}


def mapped_shared_memory(pids: list[int], others: Set[int] = frozenset()) -> set[Path]:
    """Files in /dev/shm that one of the processes has mapped, but for those of the inodes `others`.

    Found by inode: glibc makes a semaphore under a temporary name, which is the one that its mapping shows.
    """
    inodes = set()
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/maps").read_bytes().splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        inodes |= {int(line.split()[4]) for line in lines if b" /dev/shm/" in line}
    return {Path(entry.path) for entry in os.scandir("/dev/shm") if entry.inode() in inodes - others}


if __name__ == "__main__":
    sys.exit(main())
