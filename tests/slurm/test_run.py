"""Runs through `sbatch launch/run_apo.sh` on a real SLURM: both stages on three nodes, preempted in each, and what
becomes of runs that are cancelled, fail, or have a bad node. One cluster for all; runs of stage 2 use the store of the
first."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import math_verify
import pytest
import torch
from safetensors.torch import load_file

from megatron_apo.config import Recipe, load_recipe
from megatron_apo.data.order import step_prompts
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.rollout.inputs import load_inputs
from megatron_apo.values.store import VStarStore
from tests.dist.ranks import start_ranks
from tests.hosts import Host
from tests.runs import write_run
from tests.slurm import cluster as harness
from tests.slurm.cluster import Cluster, cluster

SKIPPED = harness.why_skipped()
pytestmark = pytest.mark.skipif(bool(SKIPPED), reason=SKIPPED)
SCRIPT = Path(__file__).parents[2] / "launch" / "run_apo.sh"
LIMIT_S = 240.0
GRACE_S = 30  # from the preemption of a job to its end
STEPS = 6
LAYOUT = ["parallel.tp=2", "parallel.pp=2", "parallel.ranks_per_node=2"]
DEDICATED = ["rollout.placement=dedicated", "rollout.driver=127.0.0.1:1"]
SAMPLED = ["reward.name=parity:Parity", "vstar.samples_per_prompt=32", "vstar.prompts_per_shard=8"]
# A user's reward, which an untrained model earns about half of the time.
PARITY = """
class Parity:
    name, version = "parity", "1"
    def __call__(self, request):
        return float(len(request.response) % 2)
"""
# Put in from outside, in every process: the ranks of one node take long over their part of a checkpoint.
SLOW_SAVE = """
import os, sys, time
if os.environ.get("SLOW_SAVE") == os.environ.get("SLURMD_NODENAME", "none") and "cli train" in " ".join(sys.orig_argv):
    fsync = os.fsync
    def slowly(file):
        time.sleep(10)
        fsync(file)
    os.fsync = slowly
"""


@dataclass
class Job:
    """A submitted run."""

    slurm: Cluster
    id: str
    run: Path
    out: Path

    def until(self, true: Callable[[], object], within_s: float = LIMIT_S) -> None:
        end = time.monotonic() + within_s
        while not true():
            assert time.monotonic() < end, f"{self.slurm.show(self.id)}\n{self.everything()}"
            time.sleep(0.1)

    def wait(self, state: str, within_s: float = LIMIT_S) -> dict[str, str]:
        self.until(lambda: self.slurm.state(self.id) in harness.FINAL, within_s)
        found = self.slurm.show(self.id)
        assert found["JobState"] == state, f"{found}\n{self.everything()}"
        return found

    @property
    def output(self) -> str:
        return self.out.read_text() if self.out.exists() else ""

    def rows(self) -> list[dict]:
        path = self.run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows() if "loss" in row]

    @property
    def recipe(self) -> Recipe:
        """As it ran."""
        return load_recipe(str(self.run / "logs" / "latest" / "recipe.yaml"), [])

    def everything(self) -> str:
        logs = [f"== {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.run.glob("logs/attempt-*/*.log"))]
        return "\n".join([self.output, *logs])


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "parity.py").write_text(PARITY)
    (folder / "sitecustomize.py").write_text(SLOW_SAVE)
    with cluster(folder, 4, grace_s=GRACE_S, KillWait=20) as made:
        yield made


def secret_of(slurm: Cluster, node: Host) -> str:
    """That the job's processes on a node have in their environment, and none on its command line."""
    found = set()
    for pid in slurm.pids(node):
        try:
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            command = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        secrets = {line.partition("=")[2] for line in variables if line.startswith("MEGATRON_APO_SECRET=")}
        assert not any(secret in command for secret in secrets)
        found |= secrets
    (secret,) = found
    return secret


def submit(slurm: Cluster, name: str, *arguments: str, options: list[str], **environment: str) -> Job:
    out = slurm.folder / f"{name}.out"
    words = ["--time=30", f"--output={out}", *options, str(SCRIPT), str(slurm.folder / "recipe.yaml")]
    run = slurm.folder / name
    path = {"PYTHONPATH": str(slurm.folder)}
    return Job(slurm, slurm.sbatch(*words, f"run.dir={run}", *arguments, **(path | environment)), run, out)


@pytest.fixture(scope="module")
def whole(slurm: Cluster) -> Job:
    """Both stages, preempted once in each; an engine is killed as well."""
    overrides = ["train.record=true", f"train.steps={STEPS}", "sync.timeout_s=30", "eval.every=2", "eval.max_prompts=4"]
    recipe = write_run(slurm.folder, *LAYOUT, *DEDICATED, *overrides)
    shutil.rmtree(recipe.vstar.dir)
    job = submit(slurm, "whole", *SAMPLED, options=["--nodelist=h0,h1,h2", "--nodes=3"])
    job.until(lambda: list(recipe.vstar.dir.glob("shard-*.parquet")))
    slurm.preempt(slurm.nodes[1], for_s=0.1)
    job.until(lambda: slurm.show(job.id)["Restarts"] == "1")
    job.until(lambda: len(job.steps()) >= 1)
    slurm.nodes[2].kill("EngineCore")
    job.until(lambda: "serves again" in job.output)
    slurm.preempt(slurm.nodes[0], for_s=0.1)
    job.until(lambda: slurm.show(job.id)["Restarts"] == "2")
    found = job.wait("COMPLETED")
    slurm.wait_until_empty()
    assert found["Restarts"] == "2"
    return job


def test_a_run_that_is_preempted_in_both_stages_finishes(whole: Job) -> None:
    assert "estimate-vstar ended early: the job is preempted, and waits to be requeued by SLURM" in whole.output
    assert "train ended early: the job is preempted, and waits to be requeued by SLURM" in whole.output
    assert whole.output.count("== estimate-vstar on") == 2 and whole.output.count("== train on") == 2
    assert whole.output.count("== evaluate on") == 1
    assert whole.steps() == list(range(1, STEPS + 1))
    assert [row["step"] for row in whole.rows() if "eval/avg_at_k" in row] == [0, 2, 4, 6]
    assert (whole.run / "evaluation-checkpoints-hf.json").is_file()
    attempts = sorted(path.name for path in (whole.run / "logs").glob("attempt-*"))
    assert attempts == ["attempt-001", "attempt-002", "attempt-003"]
    logs = {path.name for path in (whole.run / "logs" / "latest").glob("*.log")}
    assert {"h0-rank0.log", "h0-rank1.log", "h1-rank2.log", "h1-rank3.log", "h2-engines.log", "h2-vllm.log"} <= logs


def test_nothing_is_sampled_twice_or_left_out(whole: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(whole.slurm.folder))
    recipe = whole.recipe
    prompts = load_inputs(recipe).training.prompts
    for step in range(STEPS):
        batch = RolloutBatch.read(whole.run / "rollouts" / f"step-{step + 1:06d}.parquet")
        chosen = step_prompts(
            step, num_prompts=len(prompts), prompts_per_step=recipe.train.prompts_per_step, seed=recipe.run.seed
        )
        assert list(batch.prompt_ids) == [prompts[index].prompt_id for index in chosen], step


@pytest.fixture(scope="module")
def undisturbed(whole: Job) -> Path:
    """The same store, by one worker on a host beside the nodes."""
    folder = whole.slurm.folder / "alone"
    whole.recipe.save(folder / "recipe.yaml")
    words = ["estimate-vstar", "-r", folder / "recipe.yaml", f"run.dir={folder}", f"vstar.dir={folder / 'vstar'}"]
    command = [sys.executable, "-m", "megatron_apo.cli", *map(str, words)]
    whole.slurm.controller.run(*command, PYTHONPATH=str(whole.slurm.folder))
    return folder / "vstar"


def same_store(one: Path, other: Path) -> None:
    """Prompts in the same order, each with the same rewards of its samples."""
    left, right = VStarStore.open(one), VStarStore.open(other)
    assert left.prompt_ids == right.prompt_ids
    assert left.rewards.flat.tolist() == right.rewards.flat.tolist()
    assert str(left.rewards.samples) == str(right.rewards.samples) == "32" and 0 < left.rewards.flat.mean() < 1


def test_the_store_is_that_of_an_undisturbed_run(whole: Job, undisturbed: Path) -> None:
    same_store(whole.recipe.vstar.dir, undisturbed)


def test_the_weights_are_those_of_an_undisturbed_run_on_the_same_batches(
    whole: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(whole.slurm.folder))
    monkeypatch.syspath_prepend(str(whole.slurm.folder))
    recipe = whole.recipe
    recipe.save(tmp_path / "recipe.yaml")
    replay = [
        f"run.dir={tmp_path / 'replay'}",
        f"train.replay={whole.run / 'rollouts'}",
        "parallel.ranks_per_node=null",
    ]
    start_ranks("tests.dist.replay_worker", tmp_path, "tp2-pp2", *replay)
    same_weights(whole.run, tmp_path / "replay")


def same_weights(one: Path, other: Path) -> None:
    left, right = (load_file(run / "checkpoints" / "hf" / "model.safetensors") for run in (one, other))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], tensor) for name, tensor in right.items())


# Runs of stage 2 on the store of the first, two nodes each, the engine beside the ranks.

SHORT = ["rollout.placement=colocated", "rollout.driver=null", "eval.max_prompts=2", *SAMPLED, "--stage", "2"]


@pytest.fixture(scope="module")
def bad_node(whole: Job, slurm: Cluster) -> Host:
    """One that has lost a package."""
    node = slurm.nodes[3]
    (place,) = Path(math_verify.__file__).parents[1].glob("math_verify-*.dist-info")
    node.run("mount", "-t", "tmpfs", "tmpfs", str(place))
    return node


def test_a_bad_node_is_named_before_anything_is_spent(bad_node: Host, slurm: Cluster) -> None:
    job = submit(slurm, "bad", *SHORT, options=["--nodelist=h1,h2,h3", "--nodes=3"])
    assert job.wait("FAILED")["ExitCode"] == "1:0"
    assert (
        "\nerror: 2 of 3 nodes can be used, 3 are needed:\nh3: versions: nothing in place of math-verify" in job.output
    )
    assert "==" not in job.output and not (job.run / "checkpoints").exists()
    slurm.wait_until_empty(within_s=30)


def files_with(text: str, node: Host, slurm: Cluster) -> list[str]:
    """Those that a node sees and that have the text, of what jobs write."""
    looked = f"grep -rlF -e '{text}' /tmp /run {slurm.folder} 2> /dev/null; [ $? -le 2 ]"
    return node.run("sh", "-c", looked).split()


@pytest.fixture(scope="module")
def cancelled() -> list[tuple[Job, float]]:
    """A run, and when it was."""
    return []


def test_a_cancelled_run_leaves_nothing(bad_node: Host, slurm: Cluster, cancelled: list[tuple[Job, float]]) -> None:
    """A node that is held back has taken a bad one's place."""
    options = ["--nodelist=h0,h1,h3", "--nodes=3"]
    job = submit(slurm, "cancelled", *SHORT, "--spare", "1", "train.steps=50", options=options)
    job.until(lambda: job.steps())
    secret = secret_of(slurm, slurm.nodes[0])
    slurm.cancel(job.id)
    job.wait("CANCELLED")
    slurm.wait_until_empty(within_s=30)
    for node in slurm.nodes[:2]:
        assert node.run("ls", "/dev/shm").split() == []
        assert files_with(secret, node, slurm) == []
        assert files_with("prompts_per_step", node, slurm) != []  # it is looked for where it would be found
    assert "== train on h0, h1" in job.output
    assert re.search(r"^train ended early: the job is \w+, and is not requeued from here$", job.output, re.MULTILINE)
    cancelled.append((job, time.monotonic()))


def test_a_killed_rank_is_told_at_the_end_of_the_output(whole: Job, slurm: Cluster) -> None:
    job = submit(slurm, "killed", *SHORT, "train.steps=50", options=["--nodelist=h1,h2", "--nodes=2"])
    job.until(lambda: job.steps())
    slurm.nodes[2].kill("cli train")
    assert job.wait("FAILED")["ExitCode"] == "137:0"
    slurm.wait_until_empty(within_s=30)
    tail = job.output.splitlines()[-30:]
    assert any(line.startswith("error: train failed on h2: rank ") and "status 137" in line for line in tail), (
        job.output
    )
    assert tail[-1].startswith("logs: ") and tail[-1].endswith("attempt-001")


def test_no_node_leaves_before_a_slow_one_has_saved(whole: Job, slurm: Cluster) -> None:
    """And the job is requeued once, by its script, since it was told of its limit."""
    options = ["--nodelist=h0,h1", "--nodes=2"]
    job = submit(slurm, "slow", *SHORT, "train.steps=4", options=options, SLOW_SAVE="h1")
    job.until(lambda: job.steps())
    slurm.cancel(job.id, "--signal=USR1", "--batch")
    job.until(lambda: slurm.show(job.id)["Restarts"] == "1")
    job.wait("COMPLETED")
    assert "train ended early (SIGUSR1): requeueing the job" in job.output
    assert "resuming from" in job.output and job.steps() == [1, 2, 3, 4]
    assert slurm.show(job.id)["Restarts"] == "1"
    saved = [row["checkpoint/save_s"] for row in job.rows() if "checkpoint/save_s" in row]
    assert saved and saved[0] > 10
    ended = {path.name: path for path in (job.run / "logs" / "attempt-001").glob("*.train.ended")}
    assert {name: path.read_text() for name, path in ended.items()} == dict.fromkeys(
        ("h0.train.ended", "h1.train.ended"), "75"
    )
    times = [path.stat().st_mtime for path in ended.values()]
    assert max(times) - min(times) < 10, "one left while the other saved"
    slurm.wait_until_empty(within_s=30)


def test_a_cancelled_run_is_not_requeued(cancelled: list[tuple[Job, float]], slurm: Cluster) -> None:
    """Not in a minute. The runs of the tests between have used its nodes."""
    ((job, at_s),) = cancelled
    time.sleep(max(0.0, at_s + 60 - time.monotonic()))
    found = slurm.show(job.id)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0")
    assert [path.name for path in (job.run / "logs").glob("attempt-*")] == ["attempt-001"]


# Under --full.


@pytest.mark.full
def test_what_training_would_refuse_ends_the_job_before_stage_1(whole: Job, slurm: Cluster) -> None:
    options = ["--nodelist=h0,h1", "--nodes=2", "--export=NONE"]  # as some sites have it
    job = submit(slurm, "refused", *SHORT[:-2], "data.eval=null", f"vstar.dir={slurm.folder}/none", options=options)
    assert job.wait("FAILED")["ExitCode"] == "2:0"
    assert "error: prepare failed on h0: data.eval: missing; training reports on held-out prompts" in job.output
    assert "== estimate-vstar" not in job.output


@pytest.mark.full
def test_a_node_that_cannot_be_reached_is_told_from_those_that_can(whole: Job, slurm: Cluster) -> None:
    """And another takes its place."""
    options = ["--nodelist=h0,h1,h2", "--nodes=3"]
    job = submit(slurm, "cut", *SHORT, "--spare", "1", "train.steps=1", options=options)
    job.until(lambda: slurm.state(job.id) == "RUNNING")
    slurm.network.cut(2)
    try:
        job.until(lambda: "== train on h0, h1" in job.output)
        assert re.search(
            r"^│ h2 .*(it has told nothing|it and h0, h1 do not reach each other)", job.output, re.MULTILINE
        )
    finally:
        slurm.network.mend(2)
    slurm.cancel(job.id)
    slurm.wait_until_empty(within_s=60)


@pytest.mark.full
def test_an_undisturbed_run_comes_to_the_same(whole: Job, slurm: Cluster) -> None:
    """Through the same commands: store, responses, and weights to the last bit."""
    store = slurm.folder / "twin-vstar"
    job = submit(slurm, "twin", f"vstar.dir={store}", *SAMPLED, options=["--nodelist=h0,h1,h2", "--nodes=3"])
    assert job.wait("COMPLETED")["Restarts"] == "0"
    same_store(whole.recipe.vstar.dir, store)
    for step in range(1, STEPS + 1):
        one, other = (RolloutBatch.read(run / "rollouts" / f"step-{step:06d}.parquet") for run in (whole.run, job.run))
        assert one.prompt_ids == other.prompt_ids, step
        assert one.sequences.token_ids_T.tolist() == other.sequences.token_ids_T.tolist(), step
    same_weights(whole.run, job.run)


@pytest.mark.full
def test_a_limit_of_our_own(whole: Job, slurm: Cluster) -> None:
    """As often as it takes, and each time once."""
    options = ["--nodelist=h0,h1", "--nodes=2"]
    job = submit(slurm, "limit", *SHORT, "train.steps=24", "--limit", "1", options=options)
    restarts = int(job.wait("COMPLETED", 2 * LIMIT_S)["Restarts"])
    assert restarts and job.output.count("ended early (--limit): requeueing the job") == restarts
    assert len(list((job.run / "logs").glob("attempt-*"))) == restarts + 1
    assert job.steps() == list(range(1, 25))


@pytest.mark.full
def test_asked_twice_it_ends_at_once(whole: Job, slurm: Cluster) -> None:
    """In the midst of a save, of which nothing is left; requeued once, it begins again."""
    options = ["--nodelist=h0,h1", "--nodes=2"]
    job = submit(slurm, "twice", *SHORT, "train.steps=3", options=options, SLOW_SAVE="h1")
    job.until(lambda: job.steps())
    slurm.cancel(job.id, "--signal=USR1", "--batch")
    job.until(lambda: list((job.run / "checkpoints").glob(".*.partial")))
    time.sleep(3)
    slurm.cancel(job.id, "--signal=USR1", "--batch")
    job.until(lambda: slurm.show(job.id)["Restarts"] == "1")
    assert list((job.run / "checkpoints").glob("step-*")) == []
    assert job.wait("COMPLETED")["Restarts"] == "1"
    assert "resuming from" not in job.output and job.steps() == [1, 2, 3]
    slurm.wait_until_empty(within_s=30)


@pytest.mark.full
def test_stage_1_by_arrays_that_come_and_go(whole: Job, slurm: Cluster, undisturbed: Path) -> None:
    """Of a Megatron checkpoint, which one of their tasks converts. A task is cancelled, and another array joins."""
    megatron, run = slurm.folder / "megatron", slurm.folder / "arrays"
    converts = ["convert", "hf-to-megatron", "--hf", str(whole.recipe.model.path), "--out", str(megatron)]
    slurm.controller.run(sys.executable, "-m", "megatron_apo.cli", *converts)
    overrides = [f"run.dir={run}", f"vstar.dir={run / 'vstar'}", f"model.path={megatron}", *SAMPLED, "--stage", "1"]

    def array(tasks: str) -> str:
        words = [f"--array={tasks}", "--nodes=1", "--exclude=h3", "--time=30", f"--output={slurm.folder}/array-%a.out"]
        path = {"PYTHONPATH": str(slurm.folder)}
        return slurm.sbatch(*words, str(SCRIPT), str(slurm.folder / "recipe.yaml"), *overrides, **path)

    first = array("0-1")
    slurm.wait(f"{first}_1", "RUNNING")
    second = array("5-6")
    end = time.monotonic() + LIMIT_S
    while not list((run / "vstar").glob("shard-*.parquet")):
        assert time.monotonic() < end
        time.sleep(0.1)
    slurm.cancel(f"{first}_1")
    for task in (f"{first}_0", f"{second}_5", f"{second}_6"):
        slurm.wait(task, "COMPLETED", within_s=LIMIT_S)
    assert slurm.state(f"{first}_1") == "CANCELLED"
    same_store(run / "vstar", undisturbed)
    output = "".join(path.read_text() for path in slurm.folder.glob("array-*.out"))
    assert output.count("qwen3, ") == 1, output  # the conversion's closing line
    slurm.wait_until_empty(within_s=30)


@pytest.mark.full
def test_a_preemption_of_which_slurm_tells_the_script(tmp_path: Path) -> None:
    """By SIGUSR1; the requeue is SLURM's all the same, and happens once."""
    settings = {"KillWait": 20, "SlurmctldParameters": "preempt_send_user_signal"}
    with cluster(tmp_path, 2, grace_s=GRACE_S, **settings) as slurm:
        write_run(tmp_path, *LAYOUT, "train.steps=4", "eval.max_prompts=2")
        job = submit(slurm, "told", "--stage", "2", options=["--nodes=2"])
        job.until(lambda: job.steps())
        slurm.preempt(slurm.nodes[1], for_s=0.1)
        job.until(lambda: slurm.show(job.id)["Restarts"] == "1")
        assert job.wait("COMPLETED")["Restarts"] == "1"
        assert job.output.count("train ended early: the job is preempted, and waits to be requeued by SLURM") == 1
        assert "resuming from" in job.output and job.steps() == [1, 2, 3, 4]
        slurm.wait_until_empty(within_s=30)
