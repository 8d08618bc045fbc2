"""What a guarded command leaves, however it and its parent end: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

import pytest

from megatron_apo.runtime import guard

# A child that maps shared memory as C++ does, which nobody unlinks but the guard; both run until they are ended.
COMMAND = """
import subprocess, sys, time
child = "import mmap, os, sys, time; os.posix_fallocate(file := os.open(sys.argv[1], os.O_CREAT | os.O_RDWR), 0, 4096);"
child += "memory = mmap.mmap(file, 4096); os.close(file); print(flush=True); time.sleep(300)"
worker = subprocess.Popen([sys.executable, "-c", child, sys.argv[1]], start_new_session=True, stdout=subprocess.PIPE)
worker.stdout.readline()
time.sleep(float(sys.argv[2]))
worker.kill()
worker.wait()
"""


@contextmanager
def guarded(folder: Path, shared: Path, seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """COMMAND below a guard, once its child has mapped memory; it ends by itself so many seconds after that."""
    command = [sys.executable, "-I", guard.__file__, f"--parent={os.getpid()}", f"--folder={folder}", "--"]
    with subprocess.Popen([*command, sys.executable, "-c", COMMAND, str(shared), str(seconds)]) as process:
        try:
            end = time.monotonic() + 30
            while not (mapped := guard.mapped_shared_memory(guard.descendants(process.pid))):
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.02)
            assert mapped == {shared} and folder.is_dir()
            yield process
        finally:
            process.terminate()


@pytest.fixture
def shared() -> Iterator[Path]:
    """A name for shared memory."""
    path = Path("/dev/shm") / f"apo-test-{token_hex(6)}"
    yield path
    is_left = path.exists()
    path.unlink(missing_ok=True)
    assert not is_left


def test_memory_of_a_process_that_ended_before_the_command(shared: Path, tmp_path: Path) -> None:
    with guarded(tmp_path / "made", shared, seconds=2 * guard.LOOK_EVERY_S) as process:
        assert process.wait(30) == 0
        assert not shared.exists() and not (tmp_path / "made").exists()


def test_a_command_that_is_ended(shared: Path, tmp_path: Path) -> None:
    with guarded(tmp_path / "made", shared, seconds=300) as process:
        below = guard.descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 1
        assert len(below) == 2 and all(guard.is_zombie(pid) for pid in below)
        assert not shared.exists() and not (tmp_path / "made").exists()


def test_a_parent_that_was_gone_before_the_guard_looked(tmp_path: Path) -> None:
    parent = subprocess.Popen(["true"])
    parent.wait()
    command = [sys.executable, "-I", guard.__file__, f"--parent={parent.pid}", f"--folder={tmp_path / 'made'}", "--"]
    assert subprocess.run([*command, "sleep", "300"], timeout=30).returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    command = [sys.executable, "-I", guard.__file__, f"--parent={os.getpid()}", f"--folder={tmp_path}", "--", "true"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert result.returncode == 1 and result.stderr == f"[Errno 17] File exists: '{tmp_path}'\n"
    assert (tmp_path / "note.txt").read_text() == "mine"
