"""Stage 1 by several workers, as a user starts them. Killed and begun again: nothing is lost, repeated or different."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path

import pytest
import yaml

from megatron_apo.data.arithmetic import build_tokenizer, write_model, write_task
from megatron_apo.values.store import VStarStore
from tests.e2e.command import GONE_S, Command

NUM_PROMPTS, NUM_SAMPLES, SHARD = 192, 4, 8
NUM_ROWS = 1280  # for --full
# An untrained model's length is as good as random, so every sample has a say. Each that is asked for leaves a line.
LENGTH = """
import os, time
class Length:
    name, version = "length", "1"
    def __call__(self, request):
        if "ASKED" in os.environ:
            with open(os.environ["ASKED"], "a") as file:
                file.write(f"{os.environ['WORKER']} {request.prompt}\\n")
        time.sleep(float(os.environ.get("SECONDS_EACH", 0)))
        return len(request.response) % 7 / 6
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage1")
    (folder / "length.py").write_text(LENGTH)
    write_task(folder / "data", 0, num_train=NUM_ROWS, num_eval=1, num_sft=0)
    write_model(folder / "model", 0, build_tokenizer())
    tree = {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(folder / "model")},
        "data": {
            "train": str(folder / "data" / "train.jsonl"),
            "max_prompts": NUM_PROMPTS,
            "template": "raw",
            "max_prompt_tokens": 16,
        },
        "sampling": {"max_response_tokens": 48},
        "reward": {"name": "length:Length"},
        "vstar": {"dir": str(folder / "vstar"), "samples_per_prompt": NUM_SAMPLES, "prompts_per_shard": SHARD},
        "rollout": {"threads": 1, "kv_cache_gib": 0.25, "max_num_seqs": 8},
        "telemetry": {"progress": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def work(recipe: Path, command: Callable, tmp_path: Path) -> Callable:
    """Start stage 1 on this recipe, into this test's own folders."""

    def start(*arguments: str, **environment: str) -> Command:
        own = [f"run.dir={tmp_path / 'run'}", f"vstar.dir={tmp_path / 'vstar'}"]
        environment["PYTHONPATH"] = str(recipe.parent)
        return command("estimate-vstar", "-r", str(recipe), *own, *arguments, **environment)

    return start


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The store of the first so many prompts by one worker that nobody disturbed."""

    @cache
    def store(num_prompts: int) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed")
        own = [f"vstar.dir={folder / 'vstar'}", f"data.max_prompts={num_prompts}"]
        run = Command(folder, "estimate-vstar", "-r", str(recipe), *own, PYTHONPATH=str(recipe.parent))
        try:
            assert run.wait() == 0, run.output
        finally:
            run.stop()
        return folder / "vstar"

    return store


def rewards(folder: Path) -> dict[str, list[float]]:
    """By prompt id."""
    return {prompt: found[0] for prompt, found in samples(folder).items()}


def samples(folder: Path) -> dict[str, tuple[list, ...]]:
    """Rewards, lengths and finish reasons by prompt id."""
    store = VStarStore.open(folder)
    columns = [store.column(name).to_pylist() for name in ("rewards", "lengths", "finish_reasons")]
    return dict(zip(store.prompt_ids, zip(*columns, strict=True), strict=True))


def shards(folder: Path) -> dict[str, tuple[int, bytes]]:
    """What is known of each shard that was written: when, and its bytes."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("shard-*.parquet")}


class Asked:
    """What graders were asked, as `LENGTH` writes it down."""

    def __init__(self, path: Path, data: Path):
        self.path = path
        self._prompts = [json.loads(line)["prompt"] for line in data.read_text().splitlines()]
        path.touch()

    def _lines(self) -> Iterator[list[str]]:
        return (line.split(" ") for line in self.path.read_text().splitlines())

    def by_worker(self) -> Counter[str]:
        return Counter(worker for worker, _ in self._lines())

    def by_prompt_of(self, names: Iterable[str]) -> dict[str, int]:
        """How often for each prompt of these shards."""
        counts = Counter(prompt for _, prompt in self._lines())
        starts = [SHARD * int(name.removeprefix("shard-").removesuffix(".parquet")) for name in names]
        return {prompt: counts[prompt] for start in starts for prompt in self._prompts[start : start + SHARD]}


@pytest.mark.parametrize(
    ("kills", "num_prompts"),
    [(2, NUM_PROMPTS), pytest.param(20, NUM_ROWS, marks=[pytest.mark.full, pytest.mark.timeout(3600)])],
)
def test_killed_workers_lose_and_repeat_nothing(kills, num_prompts, work, undisturbed, recipe, tmp_path: Path) -> None:
    chance, folder = random.Random(kills), tmp_path / "vstar"
    asked = Asked(tmp_path / "asked", recipe.parent / "data" / "train.jsonl")
    options = ["--workers", "2", f"data.max_prompts={num_prompts}", "vstar.claim_expires_s=30"]

    def start(worker: int, number: int) -> Command:
        return work(*options, "--worker", str(worker), ASKED=str(asked.path), WORKER=f"{worker}.{number}")

    workers, numbers = [start(0, 0), start(1, 0)], [0, 0]
    written: dict[str, tuple[int, bytes]] = {}
    done: dict[str, int] = {}
    for kill in range(kills):
        victim = chance.randrange(2)
        if kill % 4 == 0:  # mostly while it starts
            time.sleep(chance.uniform(0, 12))
        else:  # whichever is sampling
            enough, end = chance.randrange(1, 40), time.monotonic() + 300
            while asked.by_worker()[f"{victim}.{numbers[victim]}"] < enough:
                assert time.monotonic() < end and workers[victim].process.poll() is None, workers[victim].output
                time.sleep(0.02)
                victim = 1 - victim
        before = shards(folder)
        assert len(before) < num_prompts // SHARD, f"all was sampled before kill {kill}"
        assert written.items() <= before.items(), "a finished shard changed"
        written, done = before, done | asked.by_prompt_of(before.keys() - written.keys())
        workers[victim].look()
        # Not a grader, which is replaced. Each in its turn: the guard, and then the command or the worker below it.
        guards = workers[victim].processes("guard.py")
        others = [each for each in workers[victim].processes("megatron_apo.cli") if each not in guards]
        chance.choice(others if kill % 2 else guards or others).kill()
        assert workers[victim].wait(GONE_S) != 0
        numbers[victim] += 1
        workers[victim] = start(victim, numbers[victim])
    for worker in workers:
        assert worker.wait() == 0, worker.output
    assert written.items() <= shards(folder).items(), "a finished shard changed"
    assert asked.by_prompt_of(written) == done, "a finished shard was sampled again"
    found, expected = samples(folder), samples(undisturbed(num_prompts))
    assert len(found) == num_prompts and set(found) == set(expected)
    different = [prompt for prompt in found if found[prompt] != expected[prompt]]
    assert not different, f"{len(different)} of {num_prompts} prompts have other samples than undisturbed"
    assert not list(folder.glob(".*")) and not (folder / "claims").exists()
    print(f"{kills} kills, {len(written)} of {num_prompts // SHARD} shards written before the last of them")


def test_slow_graders_an_interruption_and_a_dead_host(work, undisturbed, tmp_path: Path) -> None:
    """A claim of another host, which nobody can look up, is left alone until it has been silent for long enough."""
    folder, claims = tmp_path / "vstar", tmp_path / "vstar" / "claims"
    claims.mkdir(parents=True)
    (claims / "shard-00000.0").write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 0}))
    expires_s = 3600.0  # longer than a slow machine takes until it is looked at
    few = (f"data.max_prompts={8 * SHARD}", f"vstar.claim_expires_s={expires_s}")
    slow = work(*few, SECONDS_EACH="0.3")
    slow.wait_for(lambda: shards(folder))
    # A worker that went on sampling would claim all shards, which others wait for, and an end like this one would lose.
    # Samples that the engine has or wants, and as many ungraded, are two shards; one is begun before there are enough.
    assert len(list(claims.glob("shard-*"))) <= 1 + 4
    assert slow.send(signal.SIGINT) == 130

    run = work(*few)
    run.wait_for(lambda: "waiting for 1 shards" in run.output)
    assert set(shards(folder)) == {f"shard-{index:05d}.parquet" for index in range(1, 8)}
    environments = [process.environ() for process in run.processes("megatron_apo.cli")]  # the command and its worker
    started_with = [environment for environment in environments if "MEGATRON_APO_GUARDED" in environment]
    assert {(env["OMP_NUM_THREADS"], env["OMP_WAIT_POLICY"]) for env in started_with} == {("1", "PASSIVE")}
    old = time.time() - expires_s - 1
    os.utime(claims / "shard-00000.0", (old, old))
    assert run.wait() == 0, run.output
    assert rewards(folder).items() <= rewards(undisturbed(NUM_PROMPTS)).items()


def test_adaptive_sampling_extends_the_same_samples(work, undisturbed, tmp_path: Path) -> None:
    """Whatever number a prompt is given, its samples are the first so many of those that it would have otherwise."""
    rule = ["stderr=0.22", "step=1", f"most={NUM_SAMPLES}", "all_wrong=2"]
    run = work("data.max_prompts=32", "vstar.samples_per_prompt=2", *(f"vstar.adaptive.{each}" for each in rule))
    assert run.wait() == 0, run.output
    found, every = rewards(tmp_path / "vstar"), rewards(undisturbed(NUM_PROMPTS))
    assert len(found) == 32 and {len(row) for row in found.values()} == {2, 3, 4}
    assert found == {prompt: every[prompt][: len(row)] for prompt, row in found.items()}


@pytest.fixture
def work_in_process(recipe: Path, in_process: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable:
    """As `work`, for what samples nothing."""
    monkeypatch.syspath_prepend(recipe.parent)
    own = [f"run.dir={tmp_path / 'run'}", f"vstar.dir={tmp_path / 'vstar'}"]
    return partial(in_process, "estimate-vstar", "-r", recipe, *own)


def test_merge_and_check(work_in_process, undisturbed, tmp_path: Path) -> None:
    folder = tmp_path / "vstar"
    # It needs no GPU to close a store.
    merge = work_in_process("--merge", "rollout.quantization=fp8", "rollout.dtype=bfloat16")
    assert merge.returncode == 1 and "24 of 24 shards missing" in merge.stderr, merge.stderr
    assert not folder.exists()
    shutil.copytree(undisturbed(NUM_PROMPTS), folder)
    (folder / "manifest.json").unlink()
    for arguments, code, says in (
        (("--check",), 1, "manifest.json: not there"),
        (("--merge", "vstar.prompts_per_shard=8", "rollout.dtype=bfloat16"), 1, "made with rollout.dtype=float32"),
        (("--merge",), 0, "192 prompts x 4"),
        (("--check",), 0, "and of this recipe"),
        (("--check", "sampling.temperature=0.5"), 1, "temperature: store has 1.0, this run has 0.5"),
    ):
        again = work_in_process(*arguments)
        output = again.stdout + again.stderr
        assert again.returncode == code, output
        assert says in output
        assert len(output.splitlines()) <= 3, output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["rollout.quantization=fp8", "rollout.dtype=bfloat16", "rollout.extra_args=[--seed]"]
            + ["sampling.max_response_tokens=497", "train.tokens_per_micro_batch=999", "rollout.kv_cache_gib=0.0001"],
            [
                "rollout.extra_args: ['--seed'] is for a server",
                "rollout.quantization: fp8 needs a GPU",
                "sampling.max_response_tokens: 513, but ",
            ],
        ),
        (["rollout.kv_cache_gib=0.0001"], ["rollout.kv_cache_gib: 0.0001 cannot hold one sequence"]),
    ],
)
def test_each_mistake_is_one_line(arguments: list[str], says: list[str], work_in_process) -> None:
    run = work_in_process(*arguments)
    assert (run.returncode, run.stdout) == (2, "")
    assert [line in text for line, text in zip(says, run.stderr.splitlines(), strict=True)] == [True] * len(says)


def test_an_engine_that_does_not_start_is_one_line(work) -> None:
    run = work("rollout.kv_cache_gib=1e6")
    assert run.wait() == 1
    assert "vLLM did not start: " in run.output and run.output.count("\n") == 1, run.output
