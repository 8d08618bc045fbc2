"""SLURM as it is: what jobs, their batch scripts and their steps see of it, which scripts for it build on; and that its
clusters know nothing of each other and leave nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest

from tests import hosts
from tests.slurm import cluster as harness
from tests.slurm.cluster import Cluster, cluster, munged

SKIPPED = harness.why_skipped()
pytestmark = pytest.mark.skipif(bool(SKIPPED), reason=SKIPPED)
RECORDER = Path(__file__).with_name("recorder.py")
LOOKS_EVERY_S = 30  # slurmctld, at limits and at the end of a grace
GRACE_S = 2
SLACK_S = 10.0  # of a busy machine


@dataclass(frozen=True)
class Event:
    """A line of the recorder's."""

    at_s: float
    attempt: int
    node: str
    role: str
    what: str


@dataclass(frozen=True)
class Recorded:
    """A job that records."""

    slurm: Cluster
    job: str
    log: Path

    @property
    def events(self) -> list[Event]:
        lines = [line.split(" ", 4) for line in self.log.read_text().splitlines()] if self.log.exists() else []
        return [Event(float(at), int(attempt), *rest) for at, attempt, *rest in lines]

    def wait_for_starts(self, number: int) -> None:
        """Wait until that many of its processes record."""
        wait_until(lambda: sum(event.what == "start" for event in self.events) >= number, lambda: self.events)

    def signals(self, role: str) -> list[Event]:
        """All but SIGCONT, which comes before or after any of SLURM's own."""
        found = [event for event in self.events if event.role == role and event.what.startswith("SIG")]
        return [event for event in found if event.what != "SIGCONT"]

    def of_batch(self, what: str) -> list[Event]:
        """What happened to the script and begins so."""
        return [event for event in self.events if event.role == "batch" and event.what.startswith(what)]

    def seen(self, event: Event) -> dict[str, str]:
        """What the script saw of its job when that had happened to it."""
        sees = next(found for found in self.of_batch("sees") if found.at_s >= event.at_s)
        return dict(word.split("=", 1) for word in sees.what.split()[1:])


def wait_until(happened: Callable[[], bool], otherwise: Callable[[], object], within_s: float = 30) -> None:
    """Wait for it, and fail with something that tells why it has not."""
    end = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < end, otherwise()
        time.sleep(0.05)


def record(slurm: Cluster, *options: str, steps: bool = True, **environment: str) -> Recorded:
    """Submit a job that records: its script, and a step on each node."""
    log = slurm.folder / f"{time.time_ns()}.events"
    recorder = f"{sys.executable} -I {RECORDER} {log}"
    script = f"#!/bin/sh\nexec {recorder} batch {f'srun {recorder} step' if steps else ''}\n"
    return Recorded(slurm, slurm.sbatch("--exclusive", "--time=10", *options, script=script, **environment), log)


@dataclass(frozen=True)
class Jobs:
    """To each of them something has been done."""

    told: Recorded  # preempted; its steps are told so
    left: Recorded  # the same, but the script leaves when its steps have
    limited: Recorded  # has a limit and a signal before it, at which it asks to be requeued
    requeued: Recorded  # asks to be requeued
    cancelled: Recorded  # cancelled, and then requeued
    script_told: Recorded  # preempted where this is told by users' own signal
    steps_told: Recorded  # the same


@pytest.fixture(scope="module", autouse=True)  # some take half a minute, in which the other tests run
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    folder = tmp_path_factory.mktemp("jobs")
    user_signal = {"SlurmctldParameters": "preempt_send_user_signal"}
    with (
        cluster(folder / "plain", 6, grace_s=GRACE_S) as plain,
        cluster(folder / "user_signal", 4, grace_s=GRACE_S, **user_signal) as signalling,
    ):
        jobs = Jobs(
            told=record(plain, "--nodelist=h0,h1"),
            left=record(plain, "--nodelist=h2", LEAVES="1"),
            limited=record(plain, "--nodelist=h3", "--time=1", "--signal=B:USR1@10", steps=False, REQUEUES="1"),
            requeued=record(plain, "--nodelist=h4", steps=False, REQUEUES="1"),
            cancelled=record(plain, "--nodelist=h5", steps=False),
            script_told=record(signalling, "--nodelist=h0,h1", "--signal=B:USR1@60"),
            steps_told=record(signalling, "--nodelist=h2,h3", "--signal=USR1@60"),
        )
        for job in (jobs.told, jobs.script_told, jobs.steps_told):
            job.wait_for_starts(3)
        jobs.left.wait_for_starts(2)
        for job in (jobs.limited, jobs.requeued, jobs.cancelled):
            job.wait_for_starts(1)
        plain.preempt(plain.nodes[0], plain.nodes[2], for_s=0.1)
        signalling.preempt(signalling.nodes[0], signalling.nodes[2], for_s=0.1)
        plain.cancel(jobs.requeued.job, "--signal=USR1", "--batch")
        plain.cancel(jobs.cancelled.job)
        plain.run("scontrol", "requeue", jobs.cancelled.job)
        yield jobs


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("quick"), 4, KillWait=2) as slurm:
        yield slurm


def test_a_job_sees_four_machines(slurm: Cluster) -> None:
    see = "hostname; hostname --all-ip-addresses; hostname > /dev/shm/$(hostname); ls /dev/shm"
    job = slurm.sbatch("--nodes=4", script=f"#!/bin/sh\nsrun --output=%N sh -c '{see}'\necho done\n")
    slurm.wait(job, "COMPLETED")
    assert slurm.output(job) == "done\n"
    for node in slurm.nodes:
        assert (slurm.folder / node.name).read_text().split() == [node.name, node.address, node.name]


def test_clusters_side_by_side_know_nothing_of_each_other(slurm: Cluster, jobs: Jobs) -> None:
    clusters = {"quick": slurm, "plain": jobs.told.slurm, "user_signal": jobs.script_told.slurm}
    held = {name: each.sbatch("--hold", f"--comment={name}", script="#!/bin/sh\n") for name, each in clusters.items()}
    for name, each in clusters.items():
        assert each.show(held[name])["Comment"] == name
        assert not {*clusters} - {name} & {*each.run("squeue", "--noheader", "--format=%k").split()}
        each.cancel(held[name])


def test_an_array_is_a_job_for_each_task(slurm: Cluster) -> None:
    script = "#!/bin/sh\necho $SLURM_ARRAY_JOB_ID $SLURM_ARRAY_TASK_ID $SLURM_ARRAY_TASK_COUNT\n"
    job = slurm.sbatch("--array=0-2", script=script)
    for task in range(3):
        slurm.wait(f"{job}_{task}", "COMPLETED")
        assert slurm.output(f"{job}_{task}") == f"{job} {task} 3\n"
    assert [found["ArrayJobId"] for found in slurm.show_all(job)] == 3 * [job]


def test_scancel_reaches_script_and_steps(slurm: Cluster) -> None:
    recorded = record(slurm, "--nodes=2")
    recorded.wait_for_starts(3)
    slurm.cancel(recorded.job)
    slurm.wait(recorded.job, "CANCELLED")
    (event,) = recorded.signals("batch")
    assert event.what == "SIGTERM"
    seen = recorded.seen(event)
    assert (seen["JobState"], seen["Reason"], seen["Restarts"]) == ("COMPLETING", "None", "0")
    assert seen["PreemptTime"] == "None"
    steps = recorded.signals("step")
    assert {event.what for event in steps} == {"SIGTERM"} and len({event.node for event in steps}) == 2
    slurm.wait_until_empty()


def test_scancel_leaves_a_process_whose_parent_has_ended(slurm: Cluster) -> None:
    """That is no child of the job's any more; a session of its own is no escape. Its output is its own, or SLURM would
    wait for its end, for a minute."""
    task = "(setsid sleep 1001 > /dev/null 2>&1 &); setsid sleep 1002 & sleep 1003 & wait"
    job = slurm.sbatch("--nodes=2", script=f"#!/bin/sh\nsrun sh -c '{task}'\n")
    slurm.wait(job, "RUNNING")

    def sleepers() -> list[str]:
        return sorted(line for node in slurm.nodes for line in slurm.commands(node) if line.startswith("sleep"))

    wait_until(lambda: len(sleepers()) == 6, sleepers)
    slurm.cancel(job)
    slurm.wait(job, "CANCELLED")
    with pytest.raises(AssertionError, match="h[0-3]: sleep 1001\nh[0-3]: sleep 1001$"):
        slurm.wait_until_empty(within_s=1)
    for node in slurm.nodes:
        for pid in slurm.pids(node):
            os.kill(pid, 9)
    slurm.wait_until_empty()


def test_a_bad_exit_ends_the_other_tasks_where_it_is_to(slurm: Cluster) -> None:
    """The greatest code of all is srun's: it hides the bad one if a task was ended by a signal."""
    task = "[ $SLURM_PROCID = 1 ] && sleep 0.3 && exit 7; sleep $0 && echo finished"
    runs = [f"srun --kill-on-bad-exit={kill} sh -c '{task}' {s}; echo code $?" for kill, s in ((1, 30), (0, 1))]
    job = slurm.sbatch("--nodes=2", "--error=/dev/null", script="\n".join(["#!/bin/sh", *runs]))
    slurm.wait(job, "COMPLETED")
    assert slurm.output(job).splitlines() == ["code 143", "finished", "code 7"]


def test_srun_hands_sigusr1_on_and_kills_its_tasks_at_sigterm(slurm: Cluster) -> None:
    log = slurm.folder / "srun.events"
    lines = [
        f"srun {sys.executable} -I {RECORDER} {log} step & srun=$!",
        f"until [ $(grep -c start {log}) = 2 ]; do sleep 0.05; done",
        f"kill -USR1 $srun; until [ $(grep -c SIGUSR1 {log}) = 2 ]; do sleep 0.05; done",
        "kill -TERM $srun; wait $srun; echo code $?",
    ]
    job = slurm.sbatch("--nodes=2", "--error=/dev/null", script="\n".join(["#!/bin/sh", *lines]))
    slurm.wait(job, "COMPLETED")
    assert slurm.output(job) == "code 137\n"
    assert {event.what for event in Recorded(slurm, job, log).events} == {"start", "SIGUSR1"}


@pytest.mark.parametrize("same", [True, False])
def test_whoever_has_another_key_is_refused(same: bool, slurm: Cluster) -> None:
    name = f"key-{same}"
    key, folder = slurm.folder / name, Path("/run") / name
    key.touch(0o600)
    key.write_bytes((slurm.folder / "slurm" / "munge.key").read_bytes() if same else bytes(128))
    configuration = slurm.folder / f"{name}.conf"
    text = slurm.configuration.read_text()
    configuration.write_text(text.replace("AuthInfo=", f"AuthInfo=socket={folder}/munge.socket.2,"))
    process = slurm.controller.start(*munged(key, folder), log=slurm.folder / f"{name}.log")
    try:
        if same:
            assert slurm.run("sinfo", SLURM_CONF=str(configuration)) == slurm.run("sinfo")
        else:
            with pytest.raises(RuntimeError, match="Zero Bytes"):
                slurm.run("sinfo", SLURM_CONF=str(configuration))
            log = slurm.folder / "slurm" / "controller.slurmctld.log"
            assert "Munge decode failed: Invalid credential" in log.read_text()
    finally:
        process.send(15)
        process.wait(10)


def test_a_job_that_ends_otherwise_is_told_with_its_last_lines(slurm: Cluster) -> None:
    job = slurm.sbatch(script="#!/bin/sh\nseq 100\nexit 3\n")
    began = time.monotonic()
    with pytest.raises(AssertionError) as caught:
        slurm.wait(job, "COMPLETED")
    assert time.monotonic() - began < 30, "it waited for what cannot come"
    said = str(caught.value).splitlines()
    assert said[0].startswith(f"job {job} is FAILED (Reason=NonZeroExitCode ExitCode=3:0), not COMPLETED; ")
    assert said[-1] == "100" and said[1] == str(100 - harness.NUM_LAST_LINES + 1)
    with pytest.raises(RuntimeError, match="Invalid partition"):
        slurm.sbatch("--partition=none", script="#!/bin/sh\n")


def test_nothing_is_left_of_a_cluster(tmp_path: Path) -> None:
    before = _machine()
    with cluster(tmp_path, 1) as slurm:
        job = slurm.sbatch(script="#!/bin/sh\nsetsid sleep 1000 &\nsleep 1000\n")
        slurm.wait(job, "RUNNING")
        wait_until(lambda: slurm.commands(slurm.nodes[0]).count("sleep 1000") == 2, lambda: slurm.output(job))
        pids = slurm.network.pids()
    wait_until(lambda: not hosts.alive(pids), lambda: hosts.alive(pids))
    assert _machine() == before


def _machine() -> list[str]:
    interfaces = subprocess.run(["ip", "-oneline", "link"], check=True, capture_output=True, text=True).stdout
    found = [
        path for top in ("/run", "/etc", "/tmp", "/var/log", "/var/spool") for path in Path(top).glob("*[lm]u[rn]*")
    ]
    times = [f"{path} {path.stat().st_mtime_ns}" for path in found if "slurm" in path.name or "munge" in path.name]
    return [interfaces, Path("/proc/self/mounts").read_text(), *sorted(times)]


def test_a_daemon_that_ends_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match=r"(?s)^ended: .*unrecognized key: Unheard"),
        cluster(tmp_path, 1, Unheard=1),
    ):
        pass


def test_a_node_that_does_not_come_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = hosts.network

    @contextmanager
    def without_one(*arguments: object) -> Iterator[hosts.Network]:
        with made(*arguments) as network:
            network.cut(1)
            yield network

    monkeypatch.setattr(hosts, "network", without_one)
    monkeypatch.setattr(harness, "START_S", 3.0)
    with pytest.raises(AssertionError, match="(?s)^not ready: h1[.]munged, h1[.]slurmd\n.*h1[.]slurmd:\n.*slurmd-h1:"):
        with cluster(tmp_path, 2):
            pass


def test_without_slurm_tests_are_skipped_but_in_ci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "PROGRAMS", ("slurmctld", "slurmd-of-none"))
    monkeypatch.delenv("CI", raising=False)
    assert harness.why_skipped() == "slurmd-of-none not installed (slurm-wlm, munge)"
    monkeypatch.setenv("CI", "true")
    assert not harness.why_skipped()
    with pytest.raises(AssertionError, match="^slurmd-of-none not installed"), cluster(tmp_path, 1):
        pass


# What `jobs` has begun.


def test_a_script_requeues_its_own_job_once(jobs: Jobs) -> None:
    job = jobs.requeued
    assert job.slurm.wait(job.job, "COMPLETED")["Restarts"] == "1"
    assert [event.what for event in job.of_batch("requeue")] == ["requeue 0", "requeue 1"]
    before, after = (job.seen(event) for event in job.signals("batch"))
    assert (before["JobState"], before["Restarts"]) == ("RUNNING", "0")
    assert (after["JobState"], after["Restarts"]) == ("COMPLETING", "1")
    assert [event.attempt for event in job.of_batch("start")] == [0, 1]


def test_a_cancelled_job_that_is_requeued_runs_again(jobs: Jobs) -> None:
    """So a script has to look at its job's state before it asks for that."""
    job = jobs.cancelled
    assert job.slurm.wait(job.job, "COMPLETED")["Restarts"] == "1"
    assert [event.attempt for event in job.of_batch("start")] == [0, 1]


def test_a_script_that_leaves_when_preempted_is_not_requeued(jobs: Jobs) -> None:
    job = jobs.left
    found = job.slurm.wait(job.job, "COMPLETED")
    assert found["Restarts"] == "0" and found["PreemptTime"] != "None"
    assert not job.signals("batch") and [event.what for event in job.signals("step")] == ["SIGTERM"]


def test_steps_alone_are_told_of_preemption(jobs: Jobs) -> None:
    """The script sees it when its steps have left; it is ended with the grace, up to half a minute late."""
    job = jobs.told
    assert job.slurm.wait(job.job, "COMPLETED")["Restarts"] == "1"
    assert sorted((event.node, event.what) for event in job.signals("step")) == [("h0", "SIGTERM"), ("h1", "SIGTERM")]
    (told,), (ended,) = job.of_batch("ended"), job.signals("batch")
    _preempted_and_ended(job, told, ended)


def test_users_signal_comes_with_preemption_in_place_of_sigterm(jobs: Jobs) -> None:
    for job, role, num_told in ((jobs.script_told, "batch", 1), (jobs.steps_told, "step", 2)):
        assert job.slurm.wait(job.job, "COMPLETED")["Restarts"] == "1"
        signals = job.signals("batch") + job.signals("step")
        told = [event for event in signals if event.what == "SIGUSR1"]
        assert {event.role for event in told} == {role} and len({event.node for event in told}) == num_told
        assert {event.what for event in signals} == {"SIGUSR1", "SIGTERM"}
        ended = [event for event in job.signals("batch") if event.what == "SIGTERM"]
        if role == "batch":
            _preempted_and_ended(job, told[0], ended[0])
        assert min(event.at_s for event in signals if event.what == "SIGTERM") > told[0].at_s + 0.5 * GRACE_S


def _preempted_and_ended(job: Recorded, told: Event, ended: Event) -> None:
    first, then = job.seen(told), job.seen(ended)
    assert (first["JobState"], first["Reason"], first["Restarts"]) == ("RUNNING", "None", "0")
    preempted_s, end_s = (datetime.fromisoformat(first[name]).timestamp() for name in ("PreemptTime", "EndTime"))
    assert end_s - preempted_s == GRACE_S and abs(told.at_s - preempted_s) < SLACK_S
    assert end_s <= ended.at_s < end_s + LOOKS_EVERY_S + SLACK_S
    assert (then["JobState"], then["Restarts"]) == ("COMPLETING", "1") and "PreemptTime" not in then


def test_a_signal_before_the_limit_is_early(jobs: Jobs) -> None:
    """10 s were asked for; it was at least as much, and less than a minute more."""
    job = jobs.limited
    assert job.slurm.wait(job.job, "COMPLETED")["Restarts"] == "1"
    (event,) = [event for event in job.signals("batch") if event.what == "SIGUSR1"]
    seen = job.seen(event)
    assert (seen["JobState"], seen["PreemptTime"]) == ("RUNNING", "None")
    assert 10 <= datetime.fromisoformat(seen["EndTime"]).timestamp() - event.at_s <= 10 + 2 * LOOKS_EVERY_S
    assert [event.what for event in job.of_batch("requeue")] == ["requeue 0", "requeue 1"]
