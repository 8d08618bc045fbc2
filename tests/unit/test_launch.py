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
from megatron_apo.runtime import guard, launch
from megatron_apo.runtime.job import Node, read_job
from megatron_apo.runtime.launch import RankFailed, run_command, spawn, spawn_node, spawn_stage
from megatron_apo.runtime.signals import ENDED_EARLY, RANK_LOST


@pytest.fixture(autouse=True)
def nothing_left():
    """No process of a test outlives it."""
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]


def started(code, *arguments):
    """What `_supervise` takes: starts a process of its own session that runs Python `code`."""
    return lambda: subprocess.Popen([sys.executable, "-c", code, *arguments], start_new_session=True)


def test_a_command_runs_in_a_process_of_its_own(capfd):
    run_command(["--version"])
    assert capfd.readouterr().out.strip() == megatron_apo.__version__


def test_a_commands_failure_carries_its_exit_code(capfd, tmp_path):
    with pytest.raises(RankFailed, match="megatron-apo train ended with status 2") as error:
        run_command(["train", "--recipe", str(tmp_path / "absent.yaml")])
    assert error.value.exit_code == 2
    assert "absent.yaml" in capfd.readouterr().err


def test_a_command_that_writes_to_a_log_fails_with_its_end(capfd, tmp_path):
    with pytest.raises(RankFailed, match="ended with status 2") as error:
        run_command(["train", "--recipe", str(tmp_path / "absent.yaml")], tmp_path / "log")
    assert str(error.value).splitlines()[1:] == (tmp_path / "log").read_text().splitlines()
    assert "absent.yaml" in str(error.value) and capfd.readouterr() == ("", "")


def test_ranks_write_to_the_terminal_and_to_logs(capfd, tmp_path):
    spawn(["--version"], world_size=2, log_dir=tmp_path / "logs")
    assert capfd.readouterr().out.strip() == megatron_apo.__version__  # rank 0 alone
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["rank1.log"]
    assert (tmp_path / "logs" / "rank1.log").read_text().strip() == megatron_apo.__version__


def test_a_failed_rank_ends_the_job(tmp_path):
    with pytest.raises(RankFailed) as error:  # rank 0 has said why
        spawn(["no-such-command"], world_size=2, log_dir=tmp_path)
    assert error.value.exit_code == 2


def test_an_interrupt_while_a_process_starts_leaves_none():
    """Ctrl-C may come before the caller has what it has started."""

    def start():
        started("import time; time.sleep(60)")()
        raise KeyboardInterrupt

    begun_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch._supervise([start])
    assert time.monotonic() - begun_s < launch._STOP_LIMIT_S


def test_several_tasks_of_a_slurm_step_start_no_run_each(tmp_path, monkeypatch):
    recipe = build_recipe({}, ["model.path=m", "data.train=t.jsonl", "vstar.dir=v", f"run.dir={tmp_path / 'run'}"])
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ValueError, match="^srun --ntasks=8: train starts its ranks itself"):
        spawn_stage("train", recipe)
    assert not (tmp_path / "run").exists()


def test_what_a_rank_is_told(tmp_path, monkeypatch):
    """Its place as the launcher has it, and nothing of a job that the launcher is in itself."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("GROUP_RANK", "7")
    node = Node(2, 2, 8, "10.0.0.1", 12345, "s3cret", index=1, count=4)
    rank = launch._start_rank(["--version"], node.job(1), tmp_path / "log")
    told, command = psutil.Process(rank.pid).environ(), psutil.Process(rank.pid).cmdline()
    assert rank.wait() == 0
    job = read_job(told)
    assert job == node.job(1)
    assert (job.rank, job.local_rank, job.local_world_size, job.node, job.num_nodes) == (3, 1, 2, 1, 4)
    assert "s3cret" not in " ".join(command)


def test_a_node_names_its_ranks_by_their_place_in_the_job(capfd, tmp_path):
    """The first rank of a second node has a log as the others have, from which its failure is told."""
    with pytest.raises(RankFailed, match="^rank 2 ended with status 2; the end of ") as error:
        spawn_node(["no-such-command"], Node(2, 2, 4, "10.0.0.1", 12345, "", index=1, count=2), tmp_path)
    assert error.value.exit_code == 2 and "no-such-command" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank2.log", "rank3.log"]
    assert capfd.readouterr() == ("", "")


def test_ranks_share_a_secret_of_their_run(tmp_path, monkeypatch):
    """It is in their environment and nowhere else, and another run has another."""
    code = "import os, sys; open(f'{sys.argv[1]}/' + os.environ['RANK'], 'w').write(os.environ['MEGATRON_APO_SECRET'])"

    def start(arguments, environment, log):
        return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, start_new_session=True)

    monkeypatch.setattr(launch, "_start", start)
    secrets = []
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        spawn([str(tmp_path / run)], world_size=2, log_dir=tmp_path / run / "logs")
        first, second = ((tmp_path / run / rank).read_text() for rank in "01")
        assert first == second and len(first) >= 32
        secrets.append(first)
    assert secrets[0] != secrets[1]


def test_a_stopped_rank_is_ended_with_the_code_of_who_missed_it(monkeypatch):
    """It is rank 1, and in another job rank 0, which is asked first."""
    monkeypatch.setattr(launch, "_STOP_LIMIT_S", 1.0)
    monkeypatch.setattr(launch, "_TOGETHER_S", 0.5)
    silent = started("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)")
    assert launch._supervise([started(f"import time; time.sleep(1); exit({RANK_LOST})"), silent]) == (0, RANK_LOST)
    assert launch._supervise([silent, started(f"import time; time.sleep(1); exit({RANK_LOST})")]) == (1, RANK_LOST)


def test_who_does_not_end_early_with_rank_0_is_not_waited_for(monkeypatch, tmp_path):
    """It waits for what rank 0 has not come to, such as the end of stage 1. Of processes without a first all are."""
    monkeypatch.setattr(launch, "_TOGETHER_S", 2.0)
    early, begun_s = started(f"exit({ENDED_EARLY})"), time.monotonic()
    late = "import pathlib, sys, time; time.sleep(float(sys.argv[1])); pathlib.Path(sys.argv[2]).touch()"
    assert launch._supervise([early, started(late, "300", str(tmp_path / "a"))], leads=True) == (0, ENDED_EARLY)
    assert time.monotonic() - begun_s < 60
    assert launch._supervise([early, started(late, "0.2", str(tmp_path / "b"))], leads=True) == (0, ENDED_EARLY)
    assert launch._supervise([early, started(late, "3", str(tmp_path / "c"))]) == (0, ENDED_EARLY)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["b", "c"]


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


def test_guards_of_a_first_process_that_had_to_be_killed_remove_their_folders(monkeypatch, tmp_path):
    """It may wait for the others where no signal reaches it."""
    monkeypatch.setattr(launch, "_STOP_LIMIT_S", 1.0)
    folder = tmp_path / "of-a-server"
    command = [sys.executable, guard.__file__, "--parent", "{}", "--folder", str(folder), "--", "sleep", "300"]
    code = (
        "import os, signal, subprocess, sys, time; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2]);"
        "subprocess.Popen([part.format(os.getpid()) for part in sys.argv[1:]], start_new_session=True); time.sleep(300)"
    )
    other = f"import os, time\nwhile not os.path.exists({str(folder)!r}): time.sleep(0.1)\nexit(7)"
    assert launch._supervise([started(code, *command), started(other)]) == (1, 7)
    assert not folder.exists()


def test_a_signal_is_told_as_a_shell_tells_it():
    assert launch._supervise([started("import os; os.kill(os.getpid(), 9)")]) == (0, 137)
    assert launch._supervise([started("pass"), started("pass")]) == (None, 0)


def test_the_end_of_a_failed_ranks_log_is_shown(tmp_path):
    (tmp_path / "rank3.log").write_text("\n".join(f"line {i}" for i in range(100)))
    lines = launch._describe(3, 1, tmp_path / "rank3.log").splitlines()
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
