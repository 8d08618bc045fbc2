"""Stage 1 by several workers, as a user starts them. Killed and begun again: nothing is lost, repeated or different."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_apo.data.arithmetic import build_tokenizer, write_model, write_task
from megatron_apo.values.store import VStarStore
from tests.e2e.command import Command

NUM_PROMPTS, NUM_SAMPLES, SHARD = 192, 4, 8
# An untrained model's length is as good as random, so every sample has a say. It says that it was asked, too.
LENGTH = """
import os
class Length:
    name, version = "length", "1"
    def __call__(self, request):
        return len(request.response) % 7 / 6
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage1")
    (folder / "length.py").write_text(LENGTH)
    write_task(folder / "data", 0, num_train=NUM_PROMPTS, num_eval=1, num_sft=0)
    write_model(folder / "model", 0, build_tokenizer())
    tree = {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "data" / "train.jsonl"), "template": "raw", "max_prompt_tokens": 16},
        "sampling": {"max_response_tokens": 48},
        "reward": {"name": "length:Length"},
        "vstar": {"dir": str(folder / "vstar"), "samples_per_prompt": NUM_SAMPLES, "prompts_per_shard": SHARD},
        "rollout": {"threads": 1, "kv_cache_gib": 0.25, "max_num_seqs": 32},
        "telemetry": {"progress": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def work(recipe: Path, command: Callable, tmp_path: Path) -> Callable:
    """Start stage 1 on this recipe, into this test's own folders."""

    def start(*arguments: str):
        own = [f"run.dir={tmp_path / 'run'}", f"vstar.dir={tmp_path / 'vstar'}"]
        return command("estimate-vstar", "-r", str(recipe), *own, *arguments, PYTHONPATH=str(recipe.parent))

    return start


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Rewards by prompt id, of one worker that nobody disturbed."""
    run = Command(
        tmp_path_factory.mktemp("command"), "estimate-vstar", "-r", str(recipe), PYTHONPATH=str(recipe.parent)
    )
    try:
        assert run.wait() == 0, run.output
        assert run.processes() == []
    finally:
        run.stop()
    return rewards(recipe.parent / "vstar")


def rewards(folder: Path) -> dict[str, list[float]]:
    store = VStarStore.open(folder)
    return dict(zip(store.prompt_ids, store.rewards.flat.reshape(-1, NUM_SAMPLES).tolist(), strict=True))


def shards(folder: Path) -> dict[str, tuple[int, bytes]]:
    """What is known of each shard that was written: when, and its bytes."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("shard-*.parquet")}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=[pytest.mark.full, pytest.mark.timeout(3600)])])
def test_killed_workers_lose_and_repeat_nothing(kills: int, work, undisturbed, tmp_path: Path) -> None:
    chance = random.Random(kills)
    start = [lambda k=k: work("--workers", "2", "--worker", str(k), "vstar.claim_expires_s=5") for k in (0, 1)]
    workers = [start[0](), start[1]()]
    written: dict[str, tuple[int, bytes]] = {}
    for kill in range(kills):
        # Some while they start, most while they sample; never all shards before the last kill.
        victim = chance.randrange(2)
        enough = len(written) + chance.randrange(1, 4)
        end = time.monotonic() + chance.uniform(1, 60)
        while time.monotonic() < end and len(shards(tmp_path / "vstar")) < min(enough, 2 + kill):
            time.sleep(0.02)
        before = shards(tmp_path / "vstar")
        processes = workers[victim].processes()
        chance.choice(processes or [workers[victim].process]).send_signal(signal.SIGKILL)
        workers[victim].process.wait(60)
        deadline = time.monotonic() + 20
        while workers[victim].processes():
            assert time.monotonic() < deadline, workers[victim].processes()
            time.sleep(0.1)
        assert written.items() <= before.items(), "a finished shard changed"
        written = before
        workers[victim] = start[victim]()
    for worker in workers:
        assert worker.process.wait(600) == 0, worker.output
        assert worker.processes() == []
    assert written.items() <= shards(tmp_path / "vstar").items(), "a finished shard changed"
    found = rewards(tmp_path / "vstar")
    assert len(found) == NUM_PROMPTS and set(found) == set(undisturbed)
    different = [prompt for prompt in found if found[prompt] != undisturbed[prompt]]
    assert not different, f"{len(different)} of {NUM_PROMPTS} prompts have other rewards than undisturbed"
    assert not list((tmp_path / "vstar").glob(".*")) and not (tmp_path / "vstar" / "claims").exists()


def test_a_dead_hosts_claim_expires_and_its_shards_are_sampled(work, undisturbed, recipe, tmp_path: Path) -> None:
    """A claim of another host, which nobody can look up, is left alone until it has been silent for long enough."""
    claims = tmp_path / "vstar" / "claims"
    claims.mkdir(parents=True)
    (claims / "shard-00000.0").write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 0.0}))
    run = work("vstar.claim_expires_s=60", "data.max_prompts=16")
    run.wait_for(lambda: "waiting for 1 shards" in run.output)
    assert set(shards(tmp_path / "vstar")) == {"shard-00001.parquet"}
    old = time.time() - 61
    os.utime(claims / "shard-00000.0", (old, old))
    assert run.wait() == 0, run.output
    assert rewards(tmp_path / "vstar").items() <= undisturbed.items()


def test_adaptive_sampling_extends_the_same_samples(work, undisturbed, tmp_path: Path) -> None:
    rule = ["vstar.adaptive.stderr=0.11", "vstar.adaptive.most=12", "vstar.adaptive.all_wrong=4"]
    run = work("data.max_prompts=32", *rule)
    assert run.wait() == 0, run.output
    store = VStarStore.open(tmp_path / "vstar")
    assert 4 <= store.rewards.counts_P.min() < store.rewards.counts_P.max() <= 12, store.rewards.samples
    first = store.rewards.first(4).flat.reshape(-1, 4).tolist()
    assert dict(zip(store.prompt_ids, first, strict=True)).items() <= undisturbed.items()


def test_merge_and_check(work, undisturbed, recipe, tmp_path: Path) -> None:
    merge = work("--merge")
    assert merge.wait() == 1 and "24 of 24 shards missing" in merge.output, merge.output
    shutil.copytree(recipe.parent / "vstar", tmp_path / "vstar", dirs_exist_ok=True)
    (tmp_path / "vstar" / "manifest.json").unlink()
    for arguments, code, says in (
        (("--check",), 1, "manifest.json: not there"),
        (("--merge",), 0, "192 prompts x 4"),
        (("--check",), 0, "and of this recipe"),
        (("--check", "sampling.temperature=0.5"), 1, "temperature: store has 1.0, this run has 0.5"),
    ):
        again = work(*arguments)
        assert again.wait() == code, again.output
        assert says in again.output
        assert len(again.output.splitlines()) <= 3, again.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--workers", "2", "--worker", "2"), "--worker: 2 of 2 workers, which are counted from 0; use 0 to 1"),
        (("--merge", "--check"), "give one of them"),
        (("rollout.quantization=fp8",), "rollout.quantization: fp8 needs a GPU"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], says: str, work) -> None:
    run = work(*arguments)
    assert run.wait() in (1, 2)
    assert says in run.output and len(run.output.splitlines()) == 1, run.output
