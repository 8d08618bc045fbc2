"""Stage 2 killed and started again, as a user does it: its own loop, real ranks, real vLLM."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.learner.checkpoint import latest
from megatron_apo.runtime.signals import ENDED_EARLY
from tests.batches import assert_same_batch
from tests.dist.ranks import start_ranks
from tests.e2e.command import Command
from tests.runs import write_run

STEPS, ASKED_AFTER, KILLED_AFTER, SAVED = 8, 1, 5, 4


def rows(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def ask_to_end(command: Callable[..., Command], arguments: list[str], run_dir: Path, notice: Path) -> int:
    """After how many steps it has ended."""
    notice.write_text("0.1 the limit is near")  # seconds, too little for the rest of any step
    asked = command(*arguments, MEGATRON_APO_NOTICE=str(notice))
    asked.wait_for(lambda: any(row["step"] == ASKED_AFTER for row in rows(run_dir)))
    assert asked.send(signal.SIGUSR1) == ENDED_EARLY
    done = max(row["step"] for row in rows(run_dir))
    said = f"ended early after {done} of {STEPS} steps, which are saved (the limit is near)"
    assert said in asked.output.splitlines(), asked.output
    assert latest(run_dir).name == f"step-{done:06d}" and done < KILLED_AFTER
    return done


OVERLAPPED = "eval.overlapped=true"
# What goes from step to step beside the policy: nothing more, a critic, a baseline's past, and how many prompts a step
# has drawn.
METHODS = {
    "apo": [],
    "ppo": ["objective.name=ppo", "objective.critic.optimizer.lr=1e-3", OVERLAPPED],
    "kernel": ["objective.baseline.source=kernel"],
    "dapo": ["objective.name=dapo", "objective.samples_per_prompt=4", "train.prompts_per_step=4"],
}


FULL = [pytest.param(method, True, marks=pytest.mark.full) for method in ("ppo", "kernel", "dapo")]


@pytest.mark.parametrize(("method", "is_asked"), [("apo", True), ("ppo", False), *FULL])
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    command: Callable[..., Command], tmp_path: Path, method: str, is_asked: bool
) -> None:
    """It may be asked to end first; it is killed, and its prompts are moved. The step that was lost is sampled again,
    and again the same; nothing is twice in the metrics; the weights are those of an undisturbed run on the same
    batches."""
    settings = ["parallel.pp=2", f"train.steps={STEPS}", "train.save_every=2", "eval.every=2", *METHODS[method]]
    recipe = write_run(tmp_path, *settings)
    run_dir, arguments = recipe.run.dir, ["train", "-r", str(tmp_path / "recipe.yaml"), "--record"]
    done = ask_to_end(command, arguments, run_dir, tmp_path / "notice") if is_asked else None
    first = command(*arguments)
    first.wait_for(lambda: any(row["step"] == KILLED_AFTER for row in rows(run_dir)))
    assert first.send(signal.SIGKILL) == -signal.SIGKILL
    before, killed_rows = tmp_path / "before", rows(run_dir)
    shutil.copytree(run_dir / "rollouts", before)
    assert done is None or f"resuming from {run_dir}/checkpoints/step-{done:06d}" in first.output
    elsewhere = f"data.train={Path(recipe.data.train).rename(tmp_path / 'elsewhere.jsonl')}"
    second = command(*arguments, elsewhere)
    assert second.wait() == 0, second.output
    assert f"resuming from {run_dir}/checkpoints/step-{SAVED:06d}" in second.output

    names = [f"step-{step:06d}.parquet" for step in range(1, STEPS + 1)]
    assert sorted(path.name for path in (run_dir / "rollouts").iterdir()) == names
    for path in before.iterdir():
        assert_same_batch(RolloutBatch.read(run_dir / "rollouts" / path.name), RolloutBatch.read(path))
    found = rows(run_dir)
    trained, evaluated = ([row["step"] for row in found if name in row] for name in ("loss", "eval/avg_at_k"))
    assert trained == list(range(1, STEPS + 1)) and evaluated == [0, 2, 4, 6, 8]
    # The batch of a step is written before it is learned, and an evaluation that is beside that once it is.
    written = [run_dir / "samples" / "step-000006.jsonl", run_dir / "rollouts" / "step-000007.parquet"]
    evaluated_at, sampled_at = (path.stat().st_mtime_ns for path in written)
    assert (evaluated_at > sampled_at) == (OVERLAPPED in METHODS[method])
    losses = {row["step"]: row["loss"] for row in found if "loss" in row}
    assert {row["step"]: row["loss"] for row in killed_rows if "loss" in row}.items() <= losses.items()

    replay = [f"run.dir={tmp_path / 'replay'}", f"train.replay={run_dir / 'rollouts'}", "train.save_every=0", elsewhere]
    start_ranks("tests.dist.replay_worker", tmp_path, "pp2", *replay)
    resumed, undisturbed = (
        load_file(folder / "checkpoints" / "hf" / "model.safetensors") for folder in (run_dir, tmp_path / "replay")
    )
    assert all(torch.equal(resumed[name], tensor) for name, tensor in undisturbed.items())
    assert [row["loss"] for row in rows(tmp_path / "replay")] == list(losses.values())
