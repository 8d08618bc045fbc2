"""`megatron-apo` as a user starts it, and what becomes of its processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

LIMIT_S = 600
ENGINE = "EngineCore"  # vLLM's engine, by the name that it gives itself


class Command:
    """A `megatron-apo` command in a folder of its own; what it starts inherits that folder, which tells orphans."""

    def __init__(
        self, folder: Path, *arguments: str, program: Sequence[str] = ("-m", "megatron_apo.cli"), **environment: str
    ):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "output.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                cwd=folder,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> int:
        return self.process.wait(LIMIT_S)

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
        end = time.monotonic() + LIMIT_S
        while not what():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < end, f"nothing happened:\n{self.output}"
            time.sleep(0.1)

    def kill(self, *words: str) -> bool:
        """kill -9 of what `processes` finds and is still there by now; whether anything was."""
        killed = False
        for process in self.processes(*words):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                killed = True
        return killed

    def stop(self) -> None:
        self.kill()
        self.process.wait()
