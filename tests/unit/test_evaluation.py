"""An evaluation by several workers: every sample is asked for once, with the seed of its prompt and number, whoever
works and whoever is lost; and one that was made otherwise is refused. vLLM and graders are stood in for."""

from __future__ import annotations

import shutil
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress

from megatron_apo.config import Recipe, load_recipe
from megatron_apo.data.order import sample_seeds
from megatron_apo.preflight import check_evaluation, open_evaluation, open_sampling
from megatron_apo.rewards.pool import Grade
from megatron_apo.rollout import server
from megatron_apo.rollout.client import Sampling
from megatron_apo.rollout.evaluation import evaluation_of, evaluation_result
from megatron_apo.rollout.filling import Sampler, SamplingJob, Worker, sample_all
from megatron_apo.rollout.offline import Sample
from megatron_apo.runtime import launch
from megatron_apo.stages import evaluate, start
from megatron_apo.values.fingerprint import StoreError
from megatron_apo.values.store import VStarStore
from tests.runs import NUM_EVAL, write_run

SAMPLES, SHARD = 5, 3  # 8 prompts: the last shard of each store is smaller
TOKEN = 7  # a character of the text
ALONE = Worker()


def drawn(token_ids: Sequence[int], seed: int, temperature: float) -> int:
    """The length of a response: as good as random, and by prompt alone where it is greedy."""
    key = [*token_ids, *([] if temperature == 0 else [seed])]
    return 1 + int(np.random.default_rng(key).integers(24))


class Engine:
    """Finishes one request at a time, the last first."""

    def __init__(self) -> None:
        self._open: list[tuple[Hashable, list[Sample]]] = []

    @property
    def num_samples_open(self) -> int:
        return sum(len(samples) for _, samples in self._open)

    def add(self, key: Hashable, token_ids: Sequence[int], sampling: Sampling, *, num_samples: int, seed: int) -> None:
        lengths = [drawn(token_ids, seed + number, sampling.temperature) for number in range(num_samples)]
        self._open.append((key, [Sample([TOKEN] * n, "length" if n == 24 else "stop") for n in lengths]))

    def step(self) -> list[tuple[Hashable, list[Sample]]]:
        return [self._open.pop()]


class Pool:
    def submit(self, request, *, masks: bool) -> Future[Grade]:
        assert not masks  # an evaluation grades every response
        done: Future[Grade] = Future()
        done.set_result(Grade(reward_of(len(request.response))))
        return done

    def poll(self, wait_s: float) -> None:
        pass


def reward_of(length: int) -> float:
    return length % 7 / 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    write_run(folder, f"eval.samples={SAMPLES}", f"eval.prompts_per_shard={SHARD}", "rollout.max_num_seqs=4")
    return folder


def recipe_of(folder: Path, run: Path, *overrides: str) -> Recipe:
    return load_recipe(str(folder / "recipe.yaml"), [f"run.dir={run}", *overrides])


def sampler(job: SamplingJob, worker: Worker = ALONE) -> Sampler:
    return Sampler(job, worker, Engine(), Pool(), 0.0)  # type: ignore[arg-type]


def work(job: SamplingJob, worker: Worker = ALONE) -> None:
    """Until all is written."""
    with job.claims(worker) as claims:
        sample_all(job, sampler(job, worker), claims, claims.take(), Progress(disable=True))
        claims.remove()


def finished(job: SamplingJob) -> dict:
    return asdict(evaluation_of(*(one.finish() for one in job.stores), job.inputs.evaluation.prompts))


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder of an evaluation by one worker."""
    run = tmp_path_factory.mktemp("undisturbed")
    job = open_evaluation(recipe_of(folder, run))
    work(job)
    finished(job)
    return run


def test_the_result_is_what_its_requests_come_to(folder: Path, undisturbed: Path) -> None:
    """Computed directly: samples 0 to k - 1 of each prompt by the seeds of stage 2's evaluations, and one greedy."""
    job = open_evaluation(recipe_of(folder, undisturbed))
    rewards, greedy, cut = [], [], []
    for prompt in job.inputs.evaluation.prompts:
        seeds = sample_seeds(job.recipe.run.seed, "eval", 0, [prompt.prompt_id] * SAMPLES)
        lengths = [drawn(prompt.token_ids, seed, 1.0) for seed in seeds]
        rewards.append([reward_of(length) for length in lengths])
        cut += [length == 24 for length in lengths]
        greedy.append(reward_of(drawn(prompt.token_ids, 0, 0.0)))
    means = [sum(row) / SAMPLES for row in rewards]

    def error(values: list[float]) -> float:
        mean = sum(values) / NUM_EVAL
        return (sum((value - mean) ** 2 for value in values) / (NUM_EVAL - 1) / NUM_EVAL) ** 0.5

    assert finished(job) == {
        "mean": pytest.approx(sum(means) / NUM_EVAL),
        "stderr": pytest.approx(error(means)),
        "greedy": pytest.approx(sum(greedy) / NUM_EVAL),
        "greedy_stderr": pytest.approx(error(greedy)),
        "sources": {},
        "samples_per_prompt": SAMPLES,
        "num_prompts": NUM_EVAL,
        "truncated": pytest.approx(sum(cut) / len(cut)),
    }
    sampled, greedy_store = (VStarStore.open(one.writer.folder) for one in job.stores)
    assert sampled.rewards.flat.reshape(NUM_EVAL, SAMPLES).tolist() == rewards
    assert greedy_store.rewards.flat.tolist() == greedy


def test_shards_are_shared_out_over_both_stores(folder: Path, tmp_path: Path) -> None:
    job = open_evaluation(recipe_of(folder, tmp_path))
    assert (job.num_shards, job.num_prompts) == (6, 2 * NUM_EVAL)
    with job.claims(Worker(0, 2)) as one, job.claims(Worker(1, 2)) as other:
        taken = [claims.take() for _ in range(3) for claims in (one, other)]
        assert sorted(taken) == list(range(6)) and taken[:2] == [0, 3]
        assert one.take() is None and other.take() is None
    parts = [(job.place(index)[0].sampling.temperature, prompt.row) for index in taken for prompt in job.prompts(index)]
    assert sorted(parts) == [(temperature, row) for temperature in (0.0, 1.0) for row in range(NUM_EVAL)]


@pytest.mark.parametrize("lost", [1, 2, 4])
def test_workers_and_interruptions_change_nothing(lost: int, folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    """One of three takes `lost` shards and is lost before it has finished all, then others do the rest."""
    job = open_evaluation(recipe_of(folder, tmp_path))
    gone = sampler(job, Worker(2, 3))
    with job.claims(Worker(2, 3)) as claims:
        for _ in range(lost):
            gone.open(claims.take())
        while len(job.written()) < lost - 1:
            gone.advance()
        for _ in range(2):
            gone.advance()
        claims.remove()  # as if they had expired
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("shard-*.parquet")}
    assert len(before) == lost - 1
    again = open_evaluation(recipe_of(folder, tmp_path))
    work(again, Worker(1, 3))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert finished(again) == finished(open_evaluation(recipe_of(folder, undisturbed)))


def test_a_worker_takes_no_more_than_its_share(folder: Path, tmp_path: Path) -> None:
    """48 samples, fewer than an engine holds."""
    job = open_evaluation(recipe_of(folder, tmp_path, "rollout.max_num_seqs=256"))
    for count, shards in ((1, 6), (4, 1), (3, 2)):
        one, opened = sampler(job, Worker(0, count)), 0
        while opened < job.num_shards and one.wants_more:
            one.open(opened)
            opened += 1
        assert opened == shards, count


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sampling.temperature=0.5", "temperature: store has 1.0, this run has 0.5; set by sampling.temperature"),
        ("sampling.max_response_tokens=20", "max_response_tokens: store has 24, this run has 20; set by sampling.max"),
        ("eval.samples=4", "samples_per_prompt: store has 5, this run has 4; set by eval.samples"),
        ("run.seed=1", "seed: store has 0, this run has 1; set by run.seed"),
        ("eval.max_prompts=7", "dataset_hash: store has .* data.eval, eval.max_prompts"),
        ("reward.failure_reward=-1", "failure_reward: store has 0.0, this run has -1.0; set by reward.failure_reward"),
        ("eval.prompts_per_shard=4", "one of 3 shards where this store has 2; keep eval.prompts_per_shard as it was"),
        ("rollout.dtype=bfloat16", "made with rollout.dtype=float32 where this store has bfloat16"),
    ],
)
def test_an_evaluation_that_was_made_otherwise_is_refused(
    override: str, says: str, folder: Path, undisturbed: Path
) -> None:
    with pytest.raises(StoreError, match=says) as caught:
        open_evaluation(recipe_of(folder, undisturbed, override))
    head, *fields = str(caught.value).splitlines()
    assert "use another run.dir" in head and "vstar" not in str(caught.value)
    assert len(fields) == (": store has" in says)


def test_other_weights_are_refused(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    """In the same place, as an export that was made anew."""
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.copytree(folder / "model", tmp_path / "run" / "hf")
    recipe = recipe_of(folder, tmp_path / "run", f"model.path={tmp_path / 'run' / 'hf'}")
    work(open_evaluation(recipe))
    open_evaluation(recipe)
    path = tmp_path / "run" / "hf" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="another evaluation.*\nmodel_hash: .* set by --model, model.path$"):
        open_evaluation(recipe)


def test_an_evaluation_is_no_store_of_v_star(folder: Path, undisturbed: Path) -> None:
    (sampled,) = undisturbed.glob("evaluation-*/sampled")
    with pytest.raises(StoreError, match="purpose: store has 'eval', this run has 'vstar'"):
        open_sampling(recipe_of(folder, undisturbed, f"vstar.dir={sampled}"))


def test_a_shard_that_is_there_twice_is_not_counted(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    job = open_evaluation(recipe_of(folder, tmp_path / "run"))
    sampled = job.stores[0].writer
    for name in ("manifest.json", "shard-00000.parquet", "shard-00001.parquet"):
        (sampled.folder / name).unlink()
    write = sampled.write_shard

    def write_twice(index: int, *rest) -> None:
        for number in (0, 1):
            write(number, *rest)

    sampled.write_shard = write_twice  # type: ignore[method-assign, assignment]
    work(job)
    with pytest.raises(StoreError, match="stored twice"):
        finished(job)


def test_without_a_number_it_is_all_workers_that_fit(
    folder: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[list[str], dict]] = []
    monkeypatch.setattr(launch, "run_commands", lambda commands: started.extend(commands))
    monkeypatch.setattr(launch, "run_guarded", lambda arguments, environment: started.append((arguments, {})))
    recipe = recipe_of(folder, tmp_path, "rollout.replicas=2", "rollout.threads=null")
    start.evaluate(recipe)
    assert [arguments[-4:] for arguments, _ in started] == [["--worker", str(k), "--workers", "2"] for k in (0, 1)]
    assert load_recipe(started[0][0][2]).rollout.threads is not None  # a share of the cores
    started.clear()
    start.evaluate(recipe, 1, 2)
    assert [arguments[-4:] for arguments, _ in started] == [["--worker", "1", "--workers", "2"]]
    started.clear()
    with pytest.raises(StoreError, match="set by eval.samples"):
        start.evaluate(recipe_of(folder, undisturbed, "rollout.replicas=2", "eval.samples=4"))
    assert not started
    monkeypatch.setattr(server, "visible_gpus", lambda: ["a", "b", "c", "d", "e"])
    monkeypatch.setattr(server, "drivers_gpus", lambda: ["a", "b", "c", "d", "e"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    start.evaluate(recipe_of(folder, tmp_path, "rollout.tp=2", "rollout.replicas=7"))
    assert [own for _, own in started] == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]


def test_a_number_and_a_count_go_together(folder: Path, in_process) -> None:
    for arguments, says in (
        (["--worker", "1"], "give both or none"),
        (["--workers", "2"], "give both or none"),
        (["--worker", "2", "--workers", "2"], "counted from 0"),
    ):
        found = in_process("evaluate", "-r", folder / "recipe.yaml", *arguments)
        assert found.returncode == 2 and says in " ".join(found.stderr.replace("│", " ").split())


def test_what_an_evaluation_needs_is_asked_first(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.eval: missing; give held-out prompts"):
        check_evaluation(recipe_of(folder, tmp_path, "data.eval=null"))
    with pytest.raises(ValueError, match="rollout.python: .* is for a server, and this command's workers have vLLM"):
        check_evaluation(recipe_of(folder, tmp_path, "rollout.python=python3"))


def test_the_result_of_a_finished_evaluation_is_written_again(folder: Path, undisturbed: Path, capsys) -> None:
    """Without an engine. It is told by worker 0, and by another that is the first to know."""
    recipe = recipe_of(folder, undisturbed)
    path = evaluation_result(undisturbed, recipe.model.path)
    told = []
    for worker in (Worker(1, 2), Worker(1, 2), Worker(0, 2)):
        evaluate.run(recipe, worker)
        told.append(capsys.readouterr().out.count(str(path)))
    assert told == [1, 0, 1]
    assert not list(undisturbed.rglob("claims")) and not list(undisturbed.rglob("*.partial"))
