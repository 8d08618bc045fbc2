"""Both stages on one machine, as a user starts them: asked to end, interrupted, and started again."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_apo.cluster import local
from megatron_apo.runtime.signals import ENDED_EARLY
from megatron_apo.values.store import VStarStore
from tests.e2e.command import Command
from tests.runs import NUM_PROMPTS, write_run

SCRIPT = Path(__file__).parents[2] / "launch" / "run_local.sh"
PROGRAM = ("-c", "import os, sys; os.execvp('bash', ['bash', *sys.argv[1:]])")
INTERRUPTED = 130


@pytest.mark.parametrize("evaluates", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_run_on_this_machine_goes_on_where_it_was_ended(
    command: Callable[..., Command], tmp_path: Path, capsys: pytest.CaptureFixture[str], evaluates: bool
) -> None:
    """Asked to end in stage 1 it ends with 75, interrupted in stage 2 and in the evaluation with 130; then the rest is
    done, and nothing of it twice."""
    recipe = write_run(tmp_path, "train.steps=2")
    shutil.rmtree(recipe.vstar.dir)  # stage 1 is to make it
    arguments = [str(SCRIPT), str(tmp_path / "recipe.yaml")]

    asked = command(*arguments, program=PROGRAM)
    asked.wait_for(lambda: asked.processes("estimate-vstar"))
    assert asked.send(signal.SIGUSR1) == ENDED_EARLY, asked.output
    assert "estimate-vstar ended early (SIGUSR1); started again it goes on" in asked.output
    assert "estimate-vstar can start here" in asked.output  # the doctor

    interrupted = command(*arguments, program=PROGRAM)
    interrupted.wait_for(lambda: "== train" in interrupted.output)  # which may be just starting
    assert interrupted.send(signal.SIGINT) == INTERRUPTED, interrupted.output
    assert len(VStarStore.open(recipe.vstar.dir).ids) == NUM_PROMPTS
    made = {path: path.stat().st_mtime_ns for path in recipe.vstar.dir.iterdir()}

    trained = command(*arguments, program=PROGRAM)
    trained.wait_for(lambda: "== evaluate" in trained.output)
    assert trained.send(signal.SIGINT) == INTERRUPTED, trained.output
    assert [line for line in trained.output.splitlines() if line.startswith("== ")] == ["== train", "== evaluate"]
    assert {path: path.stat().st_mtime_ns for path in made} == made
    rows = [json.loads(line) for line in (recipe.run.dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert (recipe.run.dir / "checkpoints" / "hf" / "model.safetensors").is_file()
    if not evaluates:
        return

    last = command(*arguments, program=PROGRAM)
    assert last.wait() == 0, last.output
    assert [line for line in last.output.splitlines() if line.startswith("== ")] == ["== evaluate"]
    assert json.loads((recipe.run.dir / "evaluation-checkpoints-hf.json").read_text())["num_prompts"]
    local.run(arguments[1], [])
    assert capsys.readouterr().out == f"{recipe.run.dir}: all is complete\n"
