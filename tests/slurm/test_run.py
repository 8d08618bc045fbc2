"""Runs through `sbatch launch/run_apo.sh` on a real SLURM: both stages on three nodes, preempted in each, and what
becomes of runs that are cancelled, fail, or have a bad node. One cluster for all; runs of stage 2 use the store of the
first."""

from __future__ import annotations

import json
import shutil
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
    sampled = ["reward.name=parity:Parity", "vstar.samples_per_prompt=32", "vstar.prompts_per_shard=8"]
    job = submit(slurm, "whole", *sampled, options=["--nodelist=h0,h1,h2", "--nodes=3"])
    job.until(lambda: list(recipe.vstar.dir.glob("shard-*.parquet")))
    slurm.preempt(slurm.nodes[1], for_s=0.1)
    job.until(lambda: slurm.show(job.id)["Restarts"] == "1")
    job.until(lambda: len(job.steps()) >= 1)
    slurm.nodes[2].kill("EngineCore")
    job.until(lambda: "serves again" in job.output)
    slurm.preempt(slurm.nodes[0], for_s=0.1)
    job.until(lambda: slurm.show(job.id)["Restarts"] == "2")
    job.wait("COMPLETED")
    slurm.wait_until_empty()
    return job


def recipe_of(job: Job) -> Recipe:
    return load_recipe(str(job.run / "logs" / "latest" / "recipe.yaml"), [])


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
    recipe = recipe_of(whole)
    prompts = load_inputs(recipe).training.prompts
    for step in range(STEPS):
        batch = RolloutBatch.read(whole.run / "rollouts" / f"step-{step + 1:06d}.parquet")
        chosen = step_prompts(
            step, num_prompts=len(prompts), prompts_per_step=recipe.train.prompts_per_step, seed=recipe.run.seed
        )
        assert list(batch.prompt_ids) == [prompts[index].prompt_id for index in chosen], step
    store = VStarStore.open(recipe.vstar.dir)
    assert len(store) == len(prompts) and str(store.rewards.samples) == "32"
    assert 0 < float(store.rewards.flat.mean()) < 1


def test_the_weights_are_those_of_an_undisturbed_run_on_the_same_batches(
    whole: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(whole.slurm.folder))
    monkeypatch.syspath_prepend(str(whole.slurm.folder))
    recipe = recipe_of(whole)
    recipe.save(tmp_path / "recipe.yaml")
    replay = [
        f"run.dir={tmp_path / 'replay'}",
        f"train.replay={whole.run / 'rollouts'}",
        "parallel.ranks_per_node=null",
    ]
    start_ranks("tests.dist.replay_worker", tmp_path, "tp2-pp2", *replay)
    disturbed, undisturbed = (
        load_file(folder / "checkpoints" / "hf" / "model.safetensors") for folder in (whole.run, tmp_path / "replay")
    )
    assert disturbed.keys() == undisturbed.keys()
    assert all(torch.equal(disturbed[name], tensor) for name, tensor in undisturbed.items())


# Runs of stage 2 on the store of the first, two nodes each, the engine beside the ranks.

SHORT = ["rollout.placement=colocated", "rollout.driver=null", "reward.name=parity:Parity", "eval.max_prompts=2"]
SHORT += ["vstar.samples_per_prompt=32", "vstar.prompts_per_shard=8", "--stage", "2"]


@pytest.fixture(scope="module")
def bad_node(whole: Job, slurm: Cluster) -> Host:
    """One that has lost a package."""
    node = slurm.nodes[3]
    (place,) = Path(math_verify.__file__).parents[1].glob("math_verify-*.dist-info")
    node.run("mount", "-t", "tmpfs", "tmpfs", str(place))
    return node


def test_a_bad_node_is_named_before_anything_is_spent(bad_node: Host, slurm: Cluster) -> None:
    job = submit(slurm, "bad", *SHORT, options=["--nodelist=h1,h2,h3", "--nodes=3"])
    job.wait("FAILED")
    assert (
        "\nerror: 2 of 3 nodes can be used, 3 are needed:\nh3: versions: nothing in place of math-verify" in job.output
    )
    assert "==" not in job.output and not (job.run / "checkpoints").exists()
    slurm.wait_until_empty(within_s=30)


def test_a_cancelled_run_stays_cancelled_and_leaves_nothing(bad_node: Host, slurm: Cluster) -> None:
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
        assert node.run("sh", "-c", f"grep -rlF {secret} /tmp /run {slurm.folder} 2> /dev/null || true") == ""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert slurm.state(job.id) == "CANCELLED"
        time.sleep(2)
    assert "== train on h0, h1" in job.output


def test_a_killed_rank_is_told_at_the_end_of_the_output(whole: Job, slurm: Cluster) -> None:
    job = submit(slurm, "killed", *SHORT, "train.steps=50", options=["--nodelist=h1,h2", "--nodes=2"])
    job.until(lambda: job.steps())
    slurm.nodes[2].kill("cli train")
    job.wait("FAILED")
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
