"""`megatron-apo` as a user starts it, and what becomes of its processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import psutil

from megatron_apo.runtime import guard

LIMIT_S = 600
LOOK_EVERY_S = 2.0  # looking through all processes takes a hundredth of a second
GONE_S = 20.0  # for guards and ranks to see that who started them was killed, and to end
CACHE = f"{tempfile.gettempdir()}/torchinductor"  # of torch, which makes it on import and leaves it
ENGINE = "EngineCore"  # vLLM's engine, by the name that it gives itself


class Command:
    """A `megatron-apo` command in a folder of its own; what it starts inherits that folder, which tells orphans.

    Whoever waits for it sees that it leaves nothing behind: none of its processes, none of the files in /dev/shm that
    they had mapped when last looked at, none of the folders that their guards made, and nothing in
    TMPDIR, which is its own.
    """

    def __init__(
        self, folder: Path, *arguments: str, program: Sequence[str] = ("-m", "megatron_apo.cli"), **environment: str
    ):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "output.log"
        self.temporary = Path(tempfile.mkdtemp(prefix="apo-test-"))  # its sockets need a short path
        self._files: set[Path] = set()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                cwd=folder,
                env=os.environ | {"TMPDIR": str(self.temporary), "TORCHINDUCTOR_CACHE_DIR": CACHE} | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=partial(guard.end_with, os.getpid()),
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def processes(self, *words: str) -> list[psutil.Process]:
        """Live processes that this command started, itself included; if `words`, those whose command line has one."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    line = " ".join(process.cmdline())
                    if not words or any(word in line for word in words):
                        found.append(process)
            except psutil.Error:
                continue
        return found

    def wait_for(self, what: Callable[[], object]) -> None:
        """Until `what` is true; fails if the command ends before."""
        end = time.monotonic() + LIMIT_S
        while not what():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < end, f"nothing happened:\n{self.output}"
            time.sleep(0.1)

    def wait(self, within_s: float = 0.0) -> int:
        """Its exit status. Fails if anything of it is there `within_s` after its end."""
        end = time.monotonic() + LIMIT_S
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it does not end:\n{self.output}"
            self.look()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(LOOK_EVERY_S)
        end = time.monotonic() + within_s
        while left := self._left():
            assert time.monotonic() < end, f"still there: {left}\n{self.output}"
            time.sleep(0.05)
        return self.process.returncode

    def send(self, number: signal.Signals) -> int:
        """Send a signal and `wait`; a command that is killed leaves the rest to those it started."""
        self.look()
        self.process.send_signal(number)
        return self.wait(GONE_S if number == signal.SIGKILL else 0.0)

    def look(self) -> set[Path]:
        """What its processes have in /dev/shm now, and their guards' folders; they must go with them."""
        processes = self.processes()
        found = guard.mapped_shared_memory([process.pid for process in processes])
        for process in processes:
            with contextlib.suppress(psutil.Error):
                found |= {Path(word.removeprefix("--folder=")) for word in process.cmdline() if "--folder=" in word}
        self._files |= found
        return found

    def kill(self, *words: str) -> bool:
        """kill -9 of what `processes` finds and is still there by now, but no guard; whether anything was."""
        killed = False
        for process in self.processes(*words):
            with contextlib.suppress(psutil.NoSuchProcess):
                if not any(word.endswith("guard.py") for word in process.cmdline()):
                    process.kill()
                    killed = True
        return killed

    def stop(self) -> None:
        """At a test's end, however it ended. Fails where `wait` would."""
        try:
            if self.process.poll() is None:
                self.send(signal.SIGKILL)
        finally:
            for process in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()
            for path in (*self._files, self.temporary):
                shutil.rmtree(path, ignore_errors=True)
                with contextlib.suppress(OSError):
                    path.unlink()

    def _left(self) -> list[object]:
        files = [path for path in self._files if path.exists()]
        return [*self.processes(), *files, *self.temporary.iterdir()]
