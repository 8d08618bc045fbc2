"""Runs over several hosts (`tests/hosts.py`): pipeline stages on two, engines on others or beside them; who dies there,
or falls silent, is named in time, and the run goes on."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_apo.runtime.signals import RANK_LOST
from tests import hosts
from tests.e2e.command import Command
from tests.runs import write_run

NO_NAMESPACES = hosts.why_none()
needs_namespaces = pytest.mark.skipif(bool(NO_NAMESPACES), reason=NO_NAMESPACES)
LIMIT_S = 400.0
TIMEOUT_S = 15.0  # sync.timeout_s
COMMAND = [sys.executable, "-m", "megatron_apo.cli"]
SECRET = {"MEGATRON_APO_SECRET": "known to the parts of this job"}

# A user's code in rank 0, which asks the reward for its version. At some moments it says so by a file, and waits for an
# answer; at others it waits for engines that are starting.
MOMENTS = """
import os, time
from pathlib import Path

class Parity:
    name, version = "parity", "1"
    def __call__(self, request):
        return float(len(request.response) % 2)

if os.environ.get("RANK") == "0":
    from megatron_apo.rollout.fleet import Fleet
    from megatron_apo.rollout.transport.groups import Group

    folder, now = Path(os.environ["MOMENTS"]), {"activity": "", "posted": 0}
    begin, generate, post = Fleet.begin_starts, Fleet.generate, Group.post

    def moment(name):
        path = folder / name.replace(" ", "-")
        if path.with_suffix(".wanted").exists() and not path.exists():
            path.touch()
            while not path.with_suffix(".done").exists():
                time.sleep(0.01)

    def generate_at(self, queue, on_completion):
        now.update(activity=self.activity, posted=0)
        if (folder / ("waits-" + self.activity.replace(" ", "-"))).exists():
            self.finish_starts()

        def completed(index, completion):
            on_completion(index, completion)
            moment("generate " + now["activity"])

        return generate(self, queue, completed)

    def post_at(self, buffer):
        post(self, buffer)
        now["posted"] += 1
        if now["posted"] == 2:
            while not self._posted[0].is_completed():  # what receives it has begun
                time.sleep(0.001)
            moment("transfer " + now["activity"])

    Fleet.generate, Group.post = generate_at, post_at
"""


@dataclass
class Job:
    """A run of two ranks, one on each of the first two hosts, in `folder`."""

    folder: Path
    net: hosts.Network

    def start(self, host: int, *arguments: str, name: str = "", **environment: str) -> hosts.Process:
        """`name`: of its log; none: the command's."""
        log = self.log(host, name or arguments[0])
        own = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(self.folder)])}
        return self.net.hosts[host].start(*COMMAND, *arguments, log=log, **(own | environment))

    def log(self, host: int, command: str) -> Path:
        return self.folder / f"{command}-{host}.log"

    def train(self, **environment: str) -> list[hosts.Process]:
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500"}
        recipe = str(self.folder / "recipe.yaml")
        return [self.start(rank, "train", "-r", recipe, **place, RANK=str(rank), **environment) for rank in range(2)]

    def output(self, host: int, command: str) -> str:
        """Without what torch says of names that it does not find."""
        lines = self.log(host, command).read_text().splitlines()
        return "\n".join(line for line in lines if "[c10d]" not in line)

    def wants(self, *moments: str) -> None:
        for moment in moments:
            (self.folder / f"{moment}.wanted").touch()

    def at(self, moment: str, happens: Callable[[], None], ranks: list[hosts.Process]) -> None:
        """When rank 0 comes to it."""
        self.until((self.folder / moment).exists, ranks, moment)
        happens()
        (self.folder / f"{moment}.done").touch()

    def until(self, true: Callable[[], bool], ranks: list[hosts.Process], what: str) -> None:
        end = time.monotonic() + LIMIT_S
        while not true():
            assert all(rank.poll() in (None, 0) for rank in ranks), self.everything()
            assert time.monotonic() < end, f"{what}: nothing happened\n{self.everything()}"
            time.sleep(0.05)

    def everything(self) -> str:
        found = [f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log"))]
        logs = [f"== {path.name}\n{path.read_text()[-2000:]}" for path in (self.folder / "run" / "logs").glob("*")]
        return "\n".join(found + logs)

    def rows(self) -> list[dict]:
        text = (self.folder / "run" / "metrics.jsonl").read_text()
        return [row for row in map(json.loads, text.splitlines()) if "loss" in row]


def finished(ranks: list[hosts.Process], job: Job) -> None:
    job.until(lambda: all(rank.poll() == 0 for rank in ranks), ranks, "its end")


@needs_namespaces
def test_engines_on_hosts_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one worker and of two. One is killed while it is sent weights, the other while it samples; each is taken back.
    Then a host falls silent. Strangers are refused meanwhile."""
    settings = ["rollout.placement=dedicated", "rollout.driver=10.77.0.1:29600", "rollout.replicas=2"]
    settings += ["parallel.pp=2", "parallel.timeout_s=30", f"sync.timeout_s={TIMEOUT_S}", "sync.bucket_mib=1"]
    settings += ["train.steps=8", "train.record=true", "rollout.max_num_seqs=4", "eval.max_prompts=4"]
    (tmp_path / "parity.py").write_text(MOMENTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_run(tmp_path, *settings, "reward.name=parity:Parity")
    recipe = str(tmp_path / "recipe.yaml")
    with hosts.network(tmp_path, 4) as net:
        job = Job(tmp_path, net)
        job.wants("transfer-step-2", "generate-step-4", "generate-step-6")
        for step in (3, 5):
            (tmp_path / f"waits-step-{step}").touch()
        ranks = job.train(MOMENTS=str(tmp_path), **SECRET)
        one = job.start(2, "serve", "-r", recipe, **SECRET)
        two = job.start(3, "serve", "-r", recipe, "rollout.tp=2", **SECRET)
        job.at("transfer-step-2", lambda: net.hosts[3].kill("VLLM::Worker", "Worker_TP"), ranks)
        strangers_are_refused(job, recipe)
        job.at("generate-step-4", lambda: net.hosts[2].kill("api_server"), ranks)
        cut_s = []
        job.at("generate-step-6", lambda: (net.cut(3), cut_s.append(time.monotonic())), ranks)  # type: ignore[func-returns-value]
        job.until(lambda: "h3 has been silent for" in job.output(0, "train"), ranks, "silence")
        took_s = time.monotonic() - cut_s[0]
        finished(ranks, job)
        assert one.wait(20) == 0 and job.output(2, "serve") == "", job.output(2, "serve")
        assert two.wait(60) == RANK_LOST
        output = job.output(0, "train")
    print(f"a host that fell silent was named {took_s:.1f} s later, of sync.timeout_s={TIMEOUT_S:g}\n{output}")
    assert took_s < TIMEOUT_S
    numbers = {int(host): int(number) for host, number in re.findall(r"h(\d) has joined: engine (\d)", output)}
    assert sorted(numbers) == [2, 3] and sorted(numbers.values()) == [0, 1]
    # Its server may outlive its workers, and answer whatever it is asked next with an error.
    lost = (
        rf"a weight update failed in step 2 \(.*\); restarting its engine|rollout engine {numbers[3]} died in step 2 \("
    )
    assert re.search(lost, output)
    assert re.search(rf"rollout engine {numbers[3]} serves again, with the weights of version [34]; ", output)
    assert f"rollout engine {numbers[2]} died in step 4 (" in output
    assert re.search(
        rf"rollout engine {numbers[2]} serves again, with the weights of version [56]; .* by at most", output
    )
    assert re.search(rf"rollout engine {numbers[3]} died in step 6 \(h3 has been silent for 1\d\.\d s", output)
    lost = job.output(3, "serve")
    assert re.fullmatch(
        r"error: the driver at 10.77.0.1:29600 has been silent for 30 s \(.*\); .* here are ended", lost
    )
    rows = job.rows()
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert max(row["mismatch/max"] for row in rows) < 1e-4
    responses = [[row[f"rollout/engine{number}/responses"] for number in range(2)] for row in rows]
    assert all(sum(counts) == 16 for counts in responses)
    assert min(responses[0]) > 0 and responses[7][numbers[3]] == 0
    assert responses[4][numbers[3]] > 0 and responses[6][numbers[2]] > 0  # each after it was taken back


def strangers_are_refused(job: Job, recipe: str) -> None:
    """By the driver, in a line, and at once or within rollout.start_timeout_s."""
    wrong = job.start(1, "serve", "-r", recipe, MEGATRON_APO_SECRET="a stranger's")
    there = ["--driver", "10.77.0.99:1", "rollout.start_timeout_s=3"]
    nowhere = job.start(1, "serve", "-r", recipe, *there, name="nowhere", **SECRET)
    assert wrong.wait(60) == 1
    expected = "error: MEGATRON_APO_SECRET: the driver at 10.77.0.1:29600 has another one; give both the same"
    assert job.output(1, "serve") == expected
    assert nowhere.wait(60) == RANK_LOST
    said = job.output(1, "nowhere")
    assert said.startswith("error: the driver at 10.77.0.99:1 has not answered for rollout.start_timeout_s=3 s ("), said
    assert len(said.splitlines()) == 1


@needs_namespaces
def test_engines_beside_the_ranks_of_two_hosts(tmp_path: Path) -> None:
    """One on each, which the first rank there starts and ends; weights go over the network to both."""
    write_run(tmp_path, "parallel.pp=2", "rollout.replicas=2", "train.steps=3", "eval.max_prompts=4")
    with hosts.network(tmp_path, 2) as net:
        job = Job(tmp_path, net)
        ranks = job.train()
        finished(ranks, job)
        assert net.pids() == []
    assert job.output(0, "train") == "h1 has joined: engine 1"
    rows = job.rows()
    assert len(rows) == 3 and max(row["mismatch/max"] for row in rows) < 1e-4
    assert all(min(row[f"rollout/engine{number}/responses"] for number in range(2)) > 0 for row in rows)


def test_a_mixture_between_expert_and_tensor_parallel(command: Callable[..., Command], tmp_path: Path) -> None:
    """Each rank has half of the experts, each of vLLM's workers half of every expert; on one host, over the network."""
    settings = ["parallel.dp=2", "parallel.ep=2", "rollout.tp=2", "sync.transport=collective", "train.steps=3"]
    write_run(tmp_path, *settings, "eval.max_prompts=4", num_experts=8)
    run = command("train", "-r", str(tmp_path / "recipe.yaml"))
    assert run.wait() == 0, run.output
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    rows = [row for row in map(json.loads, text.splitlines()) if "loss" in row]
    assert len(rows) == 3 and max(row["mismatch/max"] for row in rows) < 1e-4
