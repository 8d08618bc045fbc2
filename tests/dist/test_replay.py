"""Stage 2's own loop on recorded batches, without an engine: the same bits again on the same layout, also when it was
killed and goes on; to rounding on another."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_apo.config import RecipeError, load_recipe
from megatron_apo.data.rollouts import RolloutBatch, RolloutFolder
from megatron_apo.preflight import open_training
from megatron_apo.stages.report import write_report
from megatron_apo.weights import hf_io
from tests.batches import UNSAMPLED, make_batch
from tests.dist.ranks import start_ranks
from tests.runs import random_batch, write_batches, write_run

LAYOUTS = ["dp2", "pp2"]
STEPS = 3


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    recipe = write_run(folder, "train.save_every=2", f"train.replay={folder / 'rollouts'}", *UNSAMPLED)
    write_batches(recipe, folder / "rollouts", range(STEPS))
    return folder


@pytest.fixture(scope="module")
def replayed(work: Path) -> Callable[[str], Path]:
    """The run folder of a replay on this layout, made once."""

    @cache
    def run(layout: str) -> Path:
        start_ranks("tests.dist.replay_worker", work, layout, f"run.dir={work / layout}")
        return work / layout

    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "hf" / "model.safetensors")


def rows(run: Path) -> list[dict]:
    """Of the steps; a checkpoint has one of its own."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row.keys() - {"step", "time"} != {"checkpoint/save_s"}]


def test_another_layout_replays_to_rounding(replayed) -> None:
    ours, theirs = (weights(replayed(layout)) for layout in LAYOUTS)
    start = load_file(replayed(LAYOUTS[0]).parent / "model" / "model.safetensors")
    for name, tensor in theirs.items():
        change = (tensor - start[name]).norm()
        assert change > 0 and (ours[name] - tensor).norm() <= 1e-3 * change, name
    for row, other in zip(*(rows(replayed(layout)) for layout in LAYOUTS), strict=True):
        for name in ("loss", "kl/per_sequence", "mismatch/mean", "grad_norm"):
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
        assert row["reward/mean"] == other["reward/mean"]


# Overrides, and what metrics.jsonl tells beside what it tells of A*-PO's steps.
METHODS = {
    "reinforce": (["objective.name=reinforce", "objective.baseline.source=batch_mean"], {"ratio/mean"}),
    "kernel": (["objective.name=reinforce", "objective.baseline.source=kernel"], {"ratio/mean", "value/fallbacks"}),
    "ppo": (["objective.name=ppo", "objective.kl_coefficient=0"], {"critic/loss", "critic/grad_norm", "clip/low"}),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_without_reference_and_store_ends_with_its_model(method: str, work: Path) -> None:
    """It is ended after the first of its steps, and goes on."""
    settings, told = METHODS[method]
    own = [f"run.dir={work / method}", f"vstar.dir={work / 'nowhere'}", "train.save_every=1", *settings]
    for steps in (1, STEPS):
        shutil.rmtree(work / method / "checkpoints" / "hf", ignore_errors=True)
        start_ranks("tests.dist.replay_worker", work, "dp2", *own, f"train.steps={steps}")
    start, learned = load_file(work / "model" / "model.safetensors"), weights(work / method)
    assert not any(torch.equal(learned[name], tensor) for name, tensor in start.items())
    found = [row for row in rows(work / method) if "loss" in row]
    assert [row["step"] for row in found] == [1, 2, 3]
    assert all(told <= row.keys() and not any(name.startswith("kl/") for name in row) for row in found)
    assert "kl" not in json.loads((work / method / "summary.json").read_text())
    page = write_report(work / method).read_text()
    assert "advantage r − " in page and not re.search(r"A\*-PO|V\*|KL per", page)
    missing = re.findall('<p class="missing">(.*?):', page)
    assert missing == ["samples", "share of the step with the slowest response, the slowest 1 % of responses alone"]
    start_ranks("tests.dist.replay_worker", work, "dp2", *own, f"run.dir={work / 'whole'}", f"train.steps={STEPS}")
    whole = weights(work / "whole")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in learned.items())
    shutil.rmtree(work / "whole")


def test_a_replay_is_the_same_bits_again(replayed, work: Path) -> None:
    first = replayed("pp2")
    start_ranks("tests.dist.replay_worker", work, "pp2", f"run.dir={work / 'again'}")
    again = weights(work / "again")
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights(first).items())
    quantities = ("loss", "kl/per_token", "grad_norm", "mismatch/max")
    assert [[row[name] for name in quantities] for row in rows(first)] == [
        [row[name] for name in quantities] for row in rows(work / "again")
    ]


def test_a_replay_that_was_killed_goes_on(replayed, work: Path) -> None:
    """As after a kill in step 3: the checkpoint of step 2 is there, and a row of step 3."""
    first, killed = replayed("pp2"), work / "killed"
    shutil.copytree(first, killed, ignore=shutil.ignore_patterns("hf"))
    start_ranks("tests.dist.replay_worker", work, "pp2", f"run.dir={killed}")
    assert [row["step"] for row in rows(killed)] == [1, 2, 3]
    assert all(torch.equal(tensor, weights(killed)[name]) for name, tensor in weights(first).items())


def test_rows_say_what_was_learned_and_nothing_of_sampling(replayed) -> None:
    for row in rows(replayed("dp2")):
        assert {"loss", "grad_norm", "response/mean_tokens", "layout/padding", "time/train_s"} <= row.keys()
        assert not [name for name in row if name.startswith("rollout/") or name.endswith("/generate")]
    summary = json.loads((replayed("dp2") / "summary.json").read_text())
    assert summary["skipped_steps"] == 0 and not summary.keys() & {"sync", "pass_at_1"}


def refusal(work: Path, *overrides: str) -> list[str]:
    recipe = load_recipe(work / "recipe.yaml", [f"run.dir={work / 'refused'}", *overrides])
    with pytest.raises(RecipeError) as caught:
        open_training(recipe)
    return caught.value.problems


def test_missing_batches_are_said_before_work(work: Path, tmp_path: Path) -> None:
    (line,) = refusal(work, "train.steps=5")
    assert "lacks step-000004.parquet, and 2 of 5 batches in all; use train.steps=3" in line
    (line,) = refusal(work, f"train.replay={tmp_path}")
    assert f"{tmp_path} lacks step-000001.parquet, and 3 of 3 batches in all; give the folder" in line


def test_every_batch_is_held_against_recipe_model_and_store(work: Path, tmp_path: Path) -> None:
    """One line a file, all at once, before anything starts."""
    recipe = load_recipe(work / "recipe.yaml")
    prompts = open_training(recipe).prompts
    folder, good = RolloutFolder(tmp_path / "rollouts"), random_batch(recipe, prompts, 0)
    some = [good.sequences.prompt(row).tolist() for row in range(16)]
    ids = list(good.prompt_ids)

    def with_prompts(prompt_ids: list[str]) -> RolloutBatch:
        return make_batch(some, [[5]] * 16, prompt_ids=prompt_ids)

    wrong = {
        "token ids from 5 to 5000, and model.path has 0 to": make_batch(some, [[5000]] + [[5]] * 15, prompt_ids=ids),
        "token ids from -3": make_batch(some, [[-3]] + [[5]] * 15, prompt_ids=ids),
        "15 responses do not divide into train.minibatches=2 x parallel.dp=2": make_batch(
            some[:15], [[5]] * 15, prompt_ids=ids[:15]
        ),
        "'p' is not the id of a prompt": with_prompts(["p", *ids[1:]]),
        "1 of 16 prompts have no V*": with_prompts(["0" * 32, *ids[1:]]),
        "responses have no reward, and reward.truncated=grade needs them; use reward.truncated=mask": make_batch(
            some,
            [[5]] * 16,
            prompt_ids=ids,
            rewards=[math.nan, *[0.0] * 15],
            finish_reasons=["length", *["stop"] * 15],
        ),
        "cannot hold a sequence of 3": make_batch(some, [[5] * 300] + [[5]] * 15, prompt_ids=ids),
    }
    for step, batch in enumerate(wrong.values()):
        folder.write(step, batch)
    (folder.folder / folder.path(len(wrong)).name).write_bytes(folder.path(0).read_bytes()[:-9])
    lines = refusal(work, f"train.replay={folder.folder}", f"train.steps={len(wrong) + 1}", "parallel.dp=2")
    for step, (line, message) in enumerate(zip(lines, [*wrong, "the file is damaged"], strict=True)):
        assert line.startswith("train.replay: ") and message in line and str(folder.path(step)) in line, line


def test_a_replay_needs_nothing_that_an_engine_needs(work: Path) -> None:
    recipe = load_recipe(work / "recipe.yaml", ["data.eval=null", "rollout.sleep_while_training=true", "rollout.tp=3"])
    open_training(recipe)
    recipe.train.replay = None
    with pytest.raises(RecipeError, match="sleep_while_training(.|\n)*rollout.tp: 3(.|\n)*data.eval: missing"):
        open_training(recipe)


def test_a_run_hashes_its_reference_once(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the launcher and rank 0 do, and what resumes the run."""
    computed: list[Path] = []
    usual = hf_io.model_hash
    monkeypatch.setattr(hf_io, "model_hash", lambda folder: computed.append(folder) or usual(folder))
    recipe = load_recipe(work / "recipe.yaml", [f"run.dir={work / 'hashed'}"])
    for _ in range(3):
        open_training(recipe)
    assert len(computed) == 1
