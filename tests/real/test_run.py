"""Both stages with the real model, as a user starts them: stage 2 is killed and goes on, its weights are evaluated, and
held in another layout. What is compared: V* with its formula, sampled log-probs with transformers' at the weights of
their step, and the end with that of an undisturbed run on the same batches, bit for bit."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_apo.config import Recipe, load_recipe
from megatron_apo.data.rollouts import RolloutBatch, RolloutFolder
from megatron_apo.learner.checkpoint import exported
from megatron_apo.rollout.inputs import load_inputs
from megatron_apo.stages.convert import hf_to_megatron, megatron_to_hf
from megatron_apo.values.store import VStarStore
from tests.dist.ranks import start_ranks
from tests.e2e.command import Command
from tests.models import hf_log_probs
from tests.real.conftest import ROOT

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]
STEPS, PROMPTS, SAMPLES, HELD_OUT, BETA1 = 2, 8, 2, 4, 0.5
FILE = "model.safetensors"
SETTINGS = [
    f"data.max_prompts={PROMPTS}",
    f"vstar.samples_per_prompt={SAMPLES}",
    f"vstar.beta1={BETA1}",
    "reward.name=tests.real.parity:Parity",
    "reward.options={}",
    "parallel.pp=2",
    "parallel.threads_per_rank=1",
    f"train.steps={STEPS}",
    f"train.prompts_per_step={PROMPTS}",
    "train.save_every=1",
    f"eval.max_prompts={HELD_OUT}",
    f"eval.samples={SAMPLES}",
    "eval.every=0",
    "sync.probe_every=1",
    "optimizer.lr=1.0e-4",
    "optimizer.warmup_steps=0",
    "telemetry.progress=false",
]

# Of a token's log-prob, vLLM against transformers, both in fp32: the worst seen is 5e-5. A step of this learning rate
# moves a mean token's by a hundred times the limit.
WORST = 5e-4


@dataclass
class Run:
    """What the commands left. rows: of metrics.jsonl. killed: the output of the command that was."""

    folder: Path
    recipe: Recipe
    rows: list[dict]
    killed: str
    resumed: str

    def batch(self, step: int) -> RolloutBatch:
        return RolloutFolder(self.recipe.run.dir / "rollouts").read(step)


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("run")
    paths = [f"run.dir={folder / 'run'}", f"vstar.dir={folder / 'vstar'}", f"model.path={model}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
        recipe = load_recipe(ROOT / "megatron_apo" / "recipes" / "smollm2-sums.yaml", [*paths, *SETTINGS])
        recipe.save(folder / "recipe.yaml")
        started: list[Command] = []

        def start(*arguments: str) -> Command:
            started.append(Command(folder / f"command{len(started)}", *arguments, "-r", str(folder / "recipe.yaml")))
            return started[-1]

        try:
            sampled = start("estimate-vstar")
            assert sampled.wait() == 0, sampled.output
            killed = start("train", "--record")
            killed.wait_for(lambda: (recipe.run.dir / "checkpoints" / "step-000001").is_dir())
            assert killed.send(signal.SIGKILL) == -signal.SIGKILL
            resumed = start("train", "--record")
            assert resumed.wait() == 0, resumed.output
            evaluated = start("evaluate", f"model.path={exported(recipe.run.dir)}")
            assert evaluated.wait() == 0, evaluated.output
            rows = [json.loads(line) for line in (recipe.run.dir / "metrics.jsonl").read_text().splitlines()]
            yield Run(folder, recipe, rows, killed.output, resumed.output)
        finally:
            for command in started:
                command.stop()


def test_vstar_is_the_log_mean_exp_of_what_was_sampled(run: Run) -> None:
    store = VStarStore.open(run.recipe.vstar.dir)
    assert sorted(store.prompt_ids) == sorted(prompt.prompt_id for prompt in load_inputs(run.recipe).training.prompts)
    values = store.values(BETA1, run.recipe.vstar.estimator).lookup(list(store.prompt_ids)).tolist()
    rewards = store.column("rewards").to_pylist()
    assert len(rewards) == PROMPTS and {0.0, 1.0} == {one for each in rewards for one in each}
    for value, each in zip(values, rewards, strict=True):
        mean = sum(math.exp(reward / BETA1) for reward in each) / SAMPLES
        assert value == pytest.approx(BETA1 * math.log(mean), abs=1e-6)


def test_a_killed_run_ends_as_one_that_was_not(run: Run) -> None:
    trained = [row for row in run.rows if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2]
    assert f"resuming from {run.recipe.run.dir}/checkpoints/step-000001" in run.resumed
    assert "resuming" not in run.killed and all(row["grad_norm"] > 0 for row in trained)
    replay = [f"run.dir={run.folder / 'replay'}", f"train.replay={run.recipe.run.dir / 'rollouts'}"]
    start_ranks("tests.dist.replay_worker", run.folder, "pp2", *replay, "train.save_every=0")
    resumed, undisturbed = (load_file(exported(one) / FILE) for one in (run.recipe.run.dir, run.folder / "replay"))
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in undisturbed.items())
    rows = [json.loads(line) for line in (run.folder / "replay" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if "loss" in row] == [row["loss"] for row in trained]


def test_each_steps_responses_were_sampled_by_its_own_weights(run: Run, model: Path, tmp_path: Path) -> None:
    """The engine's log-probs are transformers' at the weights of the step before, and at no others."""
    megatron_to_hf(run.recipe.run.dir / "checkpoints" / "step-000001", tmp_path / "first", ranks=1)
    weights = [model, tmp_path / "first"]
    for step in range(STEPS):
        batch = run.batch(step)
        prompts = [batch.sequences.prompt(row).tolist() for row in range(len(batch))]
        responses = [batch.sequences.response(row).tolist() for row in range(len(batch))]
        sampled = torch.tensor(batch.log_prob_R)
        errors = [(torch.cat(hf_log_probs(folder, prompts, responses)) - sampled).abs() for folder in weights]
        print(f"step {step}: worst {errors[step].max():.1e} nats, by the other weights {errors[1 - step].mean():.1e}")
        assert errors[step].max() <= WORST
        assert errors[1 - step].mean() > 10 * WORST


def test_the_evaluation_is_the_mean_of_its_samples(run: Run) -> None:
    """Of the trained weights' samples alone; greedy ones are those of the run's own last evaluation."""
    (path,) = run.recipe.run.dir.glob("evaluation-*.json")
    found = json.loads(path.read_text())
    assert found["model"] == str(exported(run.recipe.run.dir))
    sampled, greedy = (VStarStore.open(path.with_suffix("") / name) for name in ("sampled", "greedy"))
    rewards = torch.tensor(sampled.column("rewards").to_pylist())
    assert rewards.shape == (HELD_OUT, SAMPLES) and found["mean"] == pytest.approx(float(rewards.mean()))
    (own,) = [row["eval/greedy"] for row in run.rows if row["step"] == STEPS and "eval/greedy" in row]
    assert own == pytest.approx(float(torch.tensor(greedy.column("rewards").to_pylist()).mean()))


def test_what_was_learned_is_held_by_another_layout(run: Run, model: Path, tmp_path: Path) -> None:
    """Three tensor ranks hold the export bit for bit, and it is not the model that it began with."""
    learned, begun = load_file(exported(run.recipe.run.dir) / FILE), load_file(model / FILE)
    assert learned.keys() == begun.keys() and not any(torch.equal(learned[name], begun[name]) for name in begun)
    hf_to_megatron(exported(run.recipe.run.dir), tmp_path / "megatron", ranks=1)
    hf = str(exported(run.recipe.run.dir))
    start_ranks("tests.real.worker", tmp_path, "tp3", str(tmp_path / "megatron"), hf)
    found = torch.load(tmp_path / "tp3.pt", weights_only=True)
    assert sorted(found["tensors"]) == sorted(begun) and found["differing"] == []
