"""How a process of a job ends: by which signals, with which exit codes, and never after its parent."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

RANK_LOST = 76  # exit code of a rank that ended only because another did, or fell silent
ENDED_EARLY = 75  # of a run that was asked to end, and has saved: started again it goes on (sysexits' EX_TEMPFAIL)
TERMINATED = 128 + signal.SIGTERM
ASK = signal.SIGUSR1  # asks a run to end early (`ending.py`)
END = signal.SIGUSR2  # ends a process at once, as SIGTERM does, from who has started it
_LOOK_EVERY_S = 0.5
_UNWIND_LIMIT_S = 20.0


def unwind_on_sigterm() -> None:
    """Let SIGTERM, or `END`, unwind the stack, as Ctrl-C does, so that servers and ranks are stopped on the way out.

    The first one alone: SLURM sends it to every process of a step and torchrun passes it on, and a second would break
    into what the first has begun to tear down.
    """
    unwinding = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal unwinding
        if not unwinding:
            unwinding = True
            sys.exit(TERMINATED)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(END, handle)


def leave_sigterm_to_node() -> None:
    """Below a node's process of a SLURM job: SIGTERM comes to all processes of a step when the job is preempted or
    cancelled, and is that one's to act upon. To be called before there are threads; children inherit it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


@contextmanager
def put_off() -> Iterator[None]:
    """Within, in the main thread, Ctrl-C and SIGTERM wait until the end. For starting a process: Python runs hooks of
    its own after a fork, and what a signal's handler raises in one of them is printed and lost."""
    came: list[int] = []
    usual: dict[signal.Signals, Callable[[int, FrameType | None], Any]] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if callable(handler) and threading.current_thread() is threading.main_thread():  # an ignored one stays so
            usual[number] = handler
    for number in usual:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        for each in came:
            signal.raise_signal(each)


def on_ask(heard: Callable[[], None]) -> None:
    """Call `heard`, in a thread, whenever this process is sent SIGUSR1, whatever its main thread does: a handler of
    Python's waits until that is back from a collective. Ends a blockade of that signal (`block_ask`)."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    signal.signal(ASK, lambda number, frame: None)
    atexit.register(signal.signal, ASK, signal.SIG_IGN)  # or it would end this process as Python finishes

    def listen() -> None:
        with reader, writer:
            while numbers := reader.recv(64):
                if ASK in numbers:
                    heard()

    threading.Thread(target=listen, name="signals", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [ASK])


def block_ask() -> None:
    """In a new process that will call `on_ask`: be not ended by a signal that comes before it does."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [ASK])


def end_with_parent() -> None:
    """End this process when its parent does: as by `END`, and for good if it has not unwound after a while, such as one
    that waits in a collective, where Python handles no signal.

    Our launcher asks the kernel for a signal as well (`guard.end_with`); torchrun does not, and the kernel looks at the
    parent's thread, which a child does not know.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY_S)
        os.kill(os.getpid(), END)
        time.sleep(_UNWIND_LIMIT_S)
        end_now(TERMINATED)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def end_now(code: int, message: str = "") -> None:
    """End this process from any thread, whatever the main thread does, once `message` and output are written.

    A terminal or a pipe that takes nothing more does not keep it.
    """

    def write() -> None:
        sys.stdout.flush()
        if message:
            print(message, file=sys.stderr)
        sys.stderr.flush()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(2.0)
    os._exit(code)
