"""How processes end: once, with a code, and after their parent."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

UNWIND = """
import signal, time
from megatron_apo.runtime.signals import unwind_on_sigterm
unwind_on_sigterm()
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    time.sleep(1)
    print("unwound", flush=True)
"""
CHILD = """
import os, time
from megatron_apo.runtime import signals
signals._UNWIND_LIMIT_S = 1.0
signals.unwind_on_sigterm()
signals.end_with_parent()
print(os.getpid(), flush=True)
try:
    {wait}
finally:
    open({left!r}, "w").close()
"""
# A mutex that its own thread has locked: no signal ends this wait.
IN_C = (
    "import ctypes; lock = ctypes.create_string_buffer(64); [ctypes.CDLL(None).pthread_mutex_lock(lock) for _ in '12']"
)


def started(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


INTERRUPTED_FORK = """
import os, signal
from megatron_apo.runtime import launch
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT))
try:
    launch._start(["--help"], dict(os.environ), None)
except KeyboardInterrupt:
    print("heard", flush=True)
"""


@pytest.mark.parametrize("is_ignored", [False, True])
def test_ctrl_c_as_a_process_is_started_is_heard(is_ignored: bool) -> None:
    """Python prints and drops what is raised in a hook of its fork, such as logging's."""
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" if is_ignored else ""
    run = subprocess.run([sys.executable, "-c", ignore + INTERRUPTED_FORK], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and ("heard" in run.stdout) is not is_ignored, run.stderr
    assert "Exception ignored" not in run.stderr


def test_a_second_sigterm_does_not_break_into_the_first() -> None:
    process = started(UNWIND)
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        process.terminate()
        time.sleep(0.3)
    assert process.communicate(timeout=30)[0] == "unwound\n"
    assert process.returncode == 143


@pytest.mark.parametrize(("wait", "unwinds"), [("time.sleep(60)", True), (IN_C, False)], ids=["python", "c"])
def test_a_process_does_not_outlive_its_parent(wait: str, unwinds: bool, tmp_path: Path) -> None:
    """The parent is killed, and has asked the kernel for nothing; the child may be where Python handles no signal."""
    code = CHILD.format(wait=wait, left=str(tmp_path / "unwound"))
    parent = started(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])")
    child = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.3)
    parent.kill()
    parent.communicate()
    assert psutil.wait_procs([child], timeout=10)[1] == []
    assert (tmp_path / "unwound").exists() == unwinds


def test_a_process_ends_from_any_thread_though_nobody_reads_its_output() -> None:
    """The pipe is full."""
    code = (
        "import os, threading, time; from megatron_apo.runtime.signals import end_now;"
        "os.set_blocking(2, False); os.write(2, b'x' * 2**20); os.set_blocking(2, True);"
        "threading.Thread(target=end_now, args=(76, 'lost')).start(); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as process:
        assert process.wait(timeout=20) == 76
