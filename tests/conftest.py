"""For every test: how it is ended, what it costs, and `megatron-apo` commands within its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker

import psutil
import pytest

from megatron_apo import cli
from megatron_apo.runtime import guard
from megatron_apo.runtime.ending import request

# A shell starts background jobs with Ctrl-C ignored, and all that they start inherits it: a test that interrupts a
# command would wait for ever. SIGTERM ends a run of tests as Ctrl-C does, so that fixtures end what they started.
for number in (signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) in (signal.SIG_IGN, signal.SIG_DFL):
        signal.signal(number, signal.default_int_handler)

InProcess = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def in_process(capfd: pytest.CaptureFixture[str]) -> InProcess:
    """in_process(*arguments, **environment): `megatron-apo ARGUMENTS` without the seconds that a process of its own
    takes to import torch."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        handler, code = signal.getsignal(signal.SIGTERM), 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["megatron-apo", *map(str, arguments)])
            for name, value in environment.items():
                patch.setenv(name, value)
            try:
                cli.main()
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                signal.signal(signal.SIGTERM, handler)
        if code in (130, 143):  # it was the tests that were interrupted
            raise KeyboardInterrupt
        return subprocess.CompletedProcess(arguments, code, *capfd.readouterr())

    return run


class Seconds:
    """Wall and CPU seconds by tier, which is the folder of a test. CPU: of this process, and of what it started and has
    collected by then."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._tier, self._since = "start", self._now()

    def turn_to(self, tier: str) -> None:
        """What follows is this tier's."""
        if tier != self._tier:
            now = self._now()
            for i in range(2):
                self.spent[self._tier][i] += now[i] - self._since[i]
            self._tier, self._since = tier, now

    def _now(self) -> tuple[float, float]:
        cpu = os.times()
        return time.monotonic(), cpu.user + cpu.system + cpu.children_user + cpu.children_system


SECONDS = Seconds()
LEFT: list[str] = []
if "TESTS_STARTED_BY" in os.environ:  # tests/run.sh, which may be killed
    guard.end_with(int(os.environ["TESTS_STARTED_BY"]))
# Orphans of what a test killed become this process's, which counts their time and sees whether any are left.
guard.LIBC.prctl(guard.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def pytest_runtest_logstart(nodeid: str) -> None:
    SECONDS.turn_to(nodeid.split("/")[1])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown() -> Iterator[None]:
    """The run of all tests is not asked to end: each that waits for an engine after it would be interrupted."""
    try:
        yield
    finally:
        why, request.why = request.why, None
    if why:
        pytest.fail(f"this test has left this process asked to end its run ({why})")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """No process is left, but for the resource tracker that multiprocessing keeps until this one ends."""
    if forkserver._forkserver._forkserver_pid is not None:
        forkserver._forkserver._stop()
    own = resource_tracker._resource_tracker._pid
    below = [process for process in psutil.Process().children(recursive=True) if process.pid != own]
    for process in psutil.wait_procs(below, timeout=3)[1]:
        with suppress(psutil.NoSuchProcess):
            LEFT.append(f"{process.pid} {' '.join(process.cmdline())[:200]}")
            process.kill()
    SECONDS.turn_to("end")
    if LEFT:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if LEFT:
        terminalreporter.section("processes that tests left")
        terminalreporter.write_line("\n".join(LEFT))
    terminalreporter.section("seconds")
    for tier, (wall, cpu) in SECONDS.spent.items():
        terminalreporter.write_line(f"{tier + ':':6} {wall:6.0f} s, CPU {cpu:6.0f} s")
