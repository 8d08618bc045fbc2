"""Starting ranks: exit codes arrive, logs are where they should be, and nothing is left running."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

import megatron_apo
from megatron_apo.config import build_recipe
from megatron_apo.runtime import launch
from megatron_apo.runtime.launch import RankFailed, is_rank, run_command, spawn, spawn_stage


@pytest.fixture(autouse=True)
def nothing_left():
    """No process of a test outlives it."""
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]


def started(code, *arguments):
    """What `_supervise` takes: a process of its own session that runs Python `code`."""
    return lambda: subprocess.Popen([sys.executable, "-c", code, *arguments], start_new_session=True)


def test_a_command_runs_in_a_process_of_its_own(capfd):
    run_command(["--version"])
    assert capfd.readouterr().out.strip() == megatron_apo.__version__


def test_a_commands_failure_carries_its_exit_code(capfd, tmp_path):
    with pytest.raises(RankFailed, match="megatron-apo train ended with status 2") as error:
        run_command(["train", "--recipe", str(tmp_path / "absent.yaml")])
    assert error.value.exit_code == 2
    assert "absent.yaml" in capfd.readouterr().err


def test_ranks_write_to_the_terminal_and_to_logs(capfd, tmp_path):
    spawn(["--version"], world_size=2, log_dir=tmp_path / "logs")
    assert capfd.readouterr().out.strip() == megatron_apo.__version__  # rank 0 alone
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["rank1.log"]
    assert (tmp_path / "logs" / "rank1.log").read_text().strip() == megatron_apo.__version__


def test_a_failed_rank_ends_the_job(tmp_path):
    with pytest.raises(RankFailed) as error:  # rank 0 has said why
        spawn(["no-such-command"], world_size=2, log_dir=tmp_path)
    assert error.value.exit_code == 2


def test_several_tasks_of_a_slurm_step_start_no_run_each(tmp_path, monkeypatch):
    recipe = build_recipe({}, ["model.path=m", "data.train=t.jsonl", "vstar.dir=v", f"run.dir={tmp_path / 'run'}"])
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ValueError, match="^srun --ntasks=8: train starts its ranks itself"):
        spawn_stage("train", recipe)
    assert not (tmp_path / "run").exists()


def test_what_a_rank_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert not is_rank()
    rank = launch._start_rank(["--version"], 3, 8, 12345, tmp_path)
    told = psutil.Process(rank.pid).environ()
    assert rank.wait() == 0
    wanted = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "MASTER_PORT": "12345"}
    assert wanted.items() <= told.items() and told["MASTER_ADDR"] == "127.0.0.1"
    for name in ("RANK", "WORLD_SIZE"):
        assert not is_rank()
        monkeypatch.setenv(name, told[name])
    assert is_rank()


def test_the_first_failure_ends_the_others_and_what_they_started(monkeypatch):
    monkeypatch.setattr(launch, "_STOP_LIMIT_S", 1.0)
    sleeper = "import subprocess, sys; subprocess.Popen(['sleep', '300'], start_new_session=True); {}"
    begin = time.monotonic()
    failed, code = launch._supervise(
        [
            started(sleeper.format("import time; time.sleep(300)")),
            started(sleeper.format("sys.exit(7)")),
            started(sleeper.format("import time; time.sleep(300)")),
        ]
    )
    assert (failed, code) == (1, 7)
    assert time.monotonic() - begin < 10


def test_a_signal_is_told_as_a_shell_tells_it():
    assert launch._supervise([started("import os; os.kill(os.getpid(), 9)")]) == (0, 137)
    assert launch._supervise([started("pass"), started("pass")]) == (None, 0)


def test_the_end_of_a_failed_ranks_log_is_shown(tmp_path):
    (tmp_path / "rank3.log").write_text("\n".join(f"line {i}" for i in range(100)))
    lines = launch._describe(3, 1, tmp_path).splitlines()
    assert lines[0] == f"rank 3 ended with status 1; the end of {tmp_path / 'rank3.log'}:"
    assert lines[1:] == [f"line {i}" for i in range(80, 100)]


def test_the_callers_own_children_are_not_touched():
    own = subprocess.Popen(["sleep", "300"])
    try:
        begin = time.monotonic()
        run_command(["--version"])
        assert own.poll() is None
        assert time.monotonic() - begin < 8
    finally:
        own.kill()
        own.wait()


def test_ranks_end_with_their_parent():
    code = (
        "import functools, os, subprocess; from megatron_apo.runtime import guard;"
        "child = subprocess.Popen(['sleep', '300'], preexec_fn=functools.partial(guard.end_with, os.getpid()));"
        "print(child.pid, flush=True); child.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, 9)
    parent.wait()
    parent.stdout.close()
    assert psutil.wait_procs([child], timeout=5)[1] == []
