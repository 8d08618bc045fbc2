"""`megatron-apo evaluate` by several workers, as a user starts them: one that is killed loses no more than the shards
that it was at, and the result is that of one worker alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_apo.values.store import VStarStore
from tests.e2e.command import GONE_S, Command
from tests.runs import write_run

NUM_PROMPTS, NUM_SAMPLES, SHARD = 64, 4, 4
# An untrained model's length is as good as random, so every sample has a say. Each that is graded leaves a line.
LENGTH = """
import os
class Length:
    name, version = "length", "1"
    def __call__(self, request):
        if "GRADED" in os.environ:
            with open(os.environ["GRADED"], "a") as file:
                file.write(f"{os.environ['WORKER']} {request.prompt}\\n")
        return len(request.response) % 7 / 6
"""
SETTINGS = [
    "reward.name=length:Length",
    "sampling.max_response_tokens=48",
    f"eval.samples={NUM_SAMPLES}",
    f"eval.prompts_per_shard={SHARD}",
    "rollout.max_num_seqs=8",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "length.py").write_text(LENGTH)
    monkeypatch.syspath_prepend(tmp_path)
    write_run(tmp_path, *SETTINGS, num_eval=NUM_PROMPTS)
    return tmp_path


def stores(run: Path) -> dict[str, dict[str, tuple]]:
    """Rewards, lengths and finish reasons by prompt, of each of an evaluation's stores."""
    found = {}
    for manifest in run.glob("evaluation-*/*/manifest.json"):
        store = VStarStore.open(manifest.parent)
        columns = [store.column(name).to_pylist() for name in ("rewards", "lengths", "finish_reasons")]
        found[store.folder.name] = dict(zip(store.prompt_ids, zip(*columns, strict=True), strict=True))
    return found


def result(run: Path) -> dict:
    (path,) = run.glob("evaluation-*.json")
    return json.loads(path.read_text())


def shards(run: Path) -> dict[Path, tuple[int, bytes]]:
    """What is known of each shard that was written: when, and its bytes."""
    found = run.glob("evaluation-*/*/shard-*.parquet")
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def test_workers_of_which_one_is_killed_and_one_alone(folder: Path, command: Callable[..., Command]) -> None:
    run, alone, graded = folder / "run", folder / "alone", folder / "graded"

    def start(run: Path, name: str, *arguments: str) -> Command:
        environment = {"PYTHONPATH": str(folder), "GRADED": str(graded), "WORKER": name}
        return command("evaluate", "-r", str(folder / "recipe.yaml"), f"run.dir={run}", *arguments, **environment)

    def by_worker() -> Counter[str]:
        return Counter(line.split(" ")[0] for line in graded.read_text().splitlines())

    graded.touch()
    workers = [start(run, str(index), "--worker", str(index), "--workers", "2") for index in range(2)]
    workers[0].wait_for(lambda: by_worker()["0"] and shards(run))
    workers[0].look()
    for process in workers[0].processes("megatron_apo.cli"):
        if "guard.py" not in " ".join(process.cmdline()):
            process.kill()
    before = shards(run)
    assert 0 < len(before) < 2 * NUM_PROMPTS // SHARD, "it was not killed in the middle"
    assert workers[0].wait(GONE_S) != 0
    assert workers[1].wait() == 0, workers[1].output
    assert before.items() <= shards(run).items(), "a finished shard changed"
    (path,) = run.glob("evaluation-*.json")
    assert f"avg@{NUM_SAMPLES}" in workers[1].output and str(path) in workers[1].output
    assert not list(run.rglob("claims")) and not list(run.rglob("*.partial"))

    single = start(alone, "alone")
    assert single.wait() == 0, single.output
    disturbed, undisturbed = stores(run), stores(alone)
    assert {name: len(rows) for name, rows in disturbed.items()} == {"sampled": NUM_PROMPTS, "greedy": NUM_PROMPTS}
    for name, rows in undisturbed.items():
        different = [prompt for prompt, row in rows.items() if disturbed[name].get(prompt) != row]
        assert not different, f"{name}: {len(different)} of {NUM_PROMPTS} prompts have other samples"
    assert result(run) == result(alone)
    rewards = np.array([row[0] for row in undisturbed["sampled"].values()])
    found = result(alone)
    assert found["mean"] == pytest.approx(rewards.mean()) and found["model"] == str(folder / "model")
    assert (found["num_prompts"], found["samples_per_prompt"]) == rewards.shape == (NUM_PROMPTS, NUM_SAMPLES)
    assert rewards.std(axis=1).max() > 0  # samples of a prompt differ
    assert by_worker()["alone"] > 0

    # Started again, here as all of this machine's workers, it samples what is not there alone.
    kept = shards(run)
    again = start(run, "again", "rollout.replicas=2")
    assert again.wait() == 0, again.output
    assert shards(run) == kept and by_worker()["again"] == 0
    assert again.output.count(str(path)) == 1
