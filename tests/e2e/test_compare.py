"""A small comparison as a user runs it: interrupted in the middle and started again. Real ranks, real vLLM."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.command import Command
from tests.runs import write_run

SETTINGS = [
    "train.steps=5",
    "train.target_reward=0",
    "train.target_responses=64",
]  # of two steps


def test_an_interrupted_comparison_goes_on(command: Callable[..., Command], tmp_path: Path) -> None:
    """Ctrl-C while a run starts: it is kept, and does not count; another one is made."""
    recipe, out = write_run(tmp_path), tmp_path / "compared"
    plan = ["--methods", "grpo:objective.samples_per_prompt=2", "--seeds", "7", "--rates", "1e-3"]
    arguments = ["compare", "-r", str(tmp_path / "recipe.yaml"), "--out", str(out), *plan, "--attempts", "1", *SETTINGS]
    folder = out / "equal-prompts" / "grpo" / "seed-7"
    run = command(*arguments)
    run.wait_for(lambda: (folder / "attempt-1" / "attempt.log").exists() and run.processes("guard.py"))
    assert run.send(signal.SIGINT) == 130, run.output
    assert [path.name for path in folder.iterdir()] == ["attempt-1"] and not (
        folder / "attempt-1/attempt.json"
    ).exists()

    again = command(*arguments)
    assert again.wait() == 0, again.output
    assert {path.name for path in folder.iterdir()} == {"attempt-1", "attempt-2"}
    assert not (recipe.run.dir / "metrics.jsonl").exists()

    (line,) = json.loads((out / "results.json").read_text())["equal-prompts"]
    (found,) = line["runs"]
    measured, (attempt,) = found["measured"], found["attempts"]
    assert attempt["number"] == 2 and found["target"]["step"] == line["window"] == 2 and found["failure"] is None
    assert measured["curve"]["samples"] == [32, 64] and line["seconds"]["value"] > 0 and found["final"] is not None
    for kind in ("wall_s", "cpu_s"):
        parts = measured[kind]
        assert sum(parts.values()) == pytest.approx(attempt[kind]) and min(parts.values()) > -0.5, parts
        assert {"generate", "train", "sync", "evaluation"} <= parts.keys()
    # what was waited for has all of what the phases count in the processes themselves, and their starts
    assert measured["cpu_s"]["start-up, between steps and end"] > 5
    assert len(attempt["reference_s"]) == 2
    assert "<svg" in (out / "compare.html").read_text()
    assert "s to target" in again.output and "equal-prompts" in again.output
