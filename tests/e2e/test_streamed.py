"""Training by streamed steps as a user runs it: waves of a real vLLM, ended in the middle of one and taken up again."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.runtime.signals import ENDED_EARLY
from tests.dist.ranks import start_ranks
from tests.e2e.command import Command
from tests.e2e.test_resume import rows
from tests.runs import write_run

STEPS = 4


def test_a_streamed_run_is_ended_goes_on_and_is_replayed_to_the_same_bits(
    command: Callable[..., Command], tmp_path: Path
) -> None:
    """What has come of the step in which it is asked to end is dropped, with its gradients. A replay takes the recorded
    waves, so that it also shows what was in them. Evaluations are beside the learning of the next step."""
    settings = ["parallel.pp=2", f"train.steps={STEPS}", "train.save_every=1", "train.tokens_per_micro_batch=40"]
    evaluations = ["eval.max_prompts=1", "eval.every=1", "eval.overlapped=true"]
    recipe = write_run(tmp_path, *settings, *evaluations, "train.streamed=true")
    arguments = ["train", "-r", str(tmp_path / "recipe.yaml"), "--record"]
    (tmp_path / "notice").write_text("0.1 the limit is near")  # seconds, too little for the rest of any step
    first = command(*arguments, MEGATRON_APO_NOTICE=str(tmp_path / "notice"))
    first.wait_for(lambda: any("loss" in row for row in rows(recipe.run.dir)))
    assert first.send(signal.SIGUSR1) == ENDED_EARLY
    done = max(row["step"] for row in rows(recipe.run.dir))
    assert f"ended early after {done} of {STEPS} steps, which are saved" in first.output and done < STEPS
    second = command(*arguments)
    assert second.wait() == 0, second.output
    trained = [row for row in rows(recipe.run.dir) if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    for row in trained:
        batch = RolloutBatch.read(recipe.run.dir / "rollouts" / f"step-{row['step']:06d}.parquet")
        assert row["layout/waves"] == batch.wave_B.max() + 1 >= 2
        assert row["mismatch/mean"] < 1e-5 and row["time/wait_s"] < row["time/step_s"]
        assert 0 < row["time/generate_s"] < row["time/step_s"]
    evaluated = [row["step"] for row in rows(recipe.run.dir) if "eval/avg_at_k" in row]
    lost = set(range(STEPS + 1)) - set(evaluated)
    assert evaluated == sorted(set(evaluated)) and lost <= {done - 1}
    assert all(f"the evaluation after step {step} is lost: the run was asked to end" in first.output for step in lost)
    assert trained[0]["kl/per_token"] == 0, "policy and reference are one model, in the same micro-batches"

    replay = [f"run.dir={tmp_path / 'replay'}", f"train.replay={recipe.run.dir / 'rollouts'}", "train.save_every=0"]
    start_ranks("tests.dist.replay_worker", tmp_path, "pp2", *replay)
    ours, theirs = (
        load_file(folder / "checkpoints" / "hf" / "model.safetensors")
        for folder in (recipe.run.dir, tmp_path / "replay")
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert [row["loss"] for row in rows(tmp_path / "replay")] == [row["loss"] for row in trained]
