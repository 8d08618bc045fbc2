"""Both stages on one machine, as a user starts them: asked to end, interrupted, and started again."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_apo.cluster import local
from megatron_apo.config import Recipe, build_recipe
from megatron_apo.runtime.signals import ENDED_EARLY
from megatron_apo.telemetry.samples import read_samples
from megatron_apo.values.store import VStarStore
from tests.e2e.command import Command
from tests.runs import NUM_EVAL, NUM_PROMPTS, write_run

SCRIPT = Path(__file__).parents[2] / "launch" / "run_local.sh"
PROGRAM = ("-c", "import os, sys; os.execvp('bash', ['bash', *sys.argv[1:]])")
INTERRUPTED = 130


def of_two_sources(recipe: Recipe) -> Recipe:
    """The run's own prompts, and its held-out ones, with another reward. Its store is gone."""
    shutil.rmtree(recipe.vstar.dir)  # stage 1 is to make it
    numbers = {"name": "gsm8k", "options": {"strict": False}}
    data = recipe.data.model_dump() | {"train": None, "eval": None}
    data["train_sources"] = [
        {"name": "sums", "path": recipe.data.train, "weight": 3},
        {"name": "others", "path": recipe.data.eval, "weight": 1, "reward": numbers},
    ]
    data["eval_sources"] = [
        {"name": "held", "path": recipe.data.eval, "max_prompts": 3},
        {"name": "held-too", "path": recipe.data.eval, "reward": numbers},
    ]
    return build_recipe(recipe.model_dump() | {"data": data})


@pytest.mark.parametrize("evaluates", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_run_on_this_machine_goes_on_where_it_was_ended(
    command: Callable[..., Command], tmp_path: Path, capsys: pytest.CaptureFixture[str], evaluates: bool
) -> None:
    """Asked to end in stage 1 it ends with 75, interrupted in stage 2 and in the evaluation with 130; then the rest is
    done, and nothing of it twice. Its prompts are of two sources, each with a reward of its own."""
    recipe = of_two_sources(write_run(tmp_path, "train.steps=2"))
    recipe.save(tmp_path / "recipe.yaml")
    arguments = [str(SCRIPT), str(tmp_path / "recipe.yaml")]

    asked = command(*arguments, program=PROGRAM)
    asked.wait_for(lambda: asked.processes("estimate-vstar"))
    assert asked.send(signal.SIGUSR1) == ENDED_EARLY, asked.output
    assert "estimate-vstar ended early (SIGUSR1); started again it goes on" in asked.output
    assert "estimate-vstar can start here" in asked.output  # the doctor

    interrupted = command(*arguments, program=PROGRAM)
    interrupted.wait_for(lambda: "== train" in interrupted.output)  # which may be just starting
    assert interrupted.send(signal.SIGINT) == INTERRUPTED, interrupted.output
    assert len(VStarStore.open(recipe.vstar.dir).ids) == NUM_PROMPTS + NUM_EVAL
    made = {path: path.stat().st_mtime_ns for path in recipe.vstar.dir.iterdir()}

    trained = command(*arguments, program=PROGRAM)
    trained.wait_for(lambda: "== evaluate" in trained.output)
    assert trained.send(signal.SIGINT) == INTERRUPTED, trained.output
    assert [line for line in trained.output.splitlines() if line.startswith("== ")] == ["== train", "== evaluate"]
    assert {path: path.stat().st_mtime_ns for path in made} == made
    rows = [json.loads(line) for line in (recipe.run.dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        shares = [row[f"source/{name}/share"] for name in ("sums", "others")]
        assert shares == [0.75, 0.25]
        of_sources = [row[f"source/{name}/reward"] for name in ("sums", "others")]
        assert row["reward/mean"] == pytest.approx(0.75 * of_sources[0] + 0.25 * of_sources[1])
    samples = read_samples(recipe.run.dir)
    assert list(samples) == [0, 2] and {one.source for one in samples[2]} == {"held", "held-too"}
    assert all(one.reference == one.answer for one in samples[2] if one.source == "held-too")
    assert (recipe.run.dir / "checkpoints" / "hf" / "model.safetensors").is_file()
    if not evaluates:
        return

    last = command(*arguments, program=PROGRAM)
    assert last.wait() == 0, last.output
    assert [line for line in last.output.splitlines() if line.startswith("== ")] == ["== evaluate"]
    assert json.loads((recipe.run.dir / "evaluation-checkpoints-hf.json").read_text())["sources"].keys() == {
        "held",
        "held-too",
    }
    local.run(arguments[1], [])
    assert capsys.readouterr().out == f"{recipe.run.dir}: all is complete\n"
