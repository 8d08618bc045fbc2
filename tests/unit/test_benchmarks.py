"""Benchmarks run, at sizes that show nothing else."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_apo.config import load_recipe
from megatron_apo.data.rollouts import RolloutFolder
from megatron_apo.preflight import open_training
from megatron_apo.rollout.inputs import load_inputs
from tests.batches import make_batch
from tests.benchmarks import baselines, logprob_head, long_step, mismatch, packing, real_model, weight_plan
from tests.benchmarks.noise import noise

ROOT = Path(__file__).parents[2]


def test_log_prob_head_runs_and_its_numbers_agree(monkeypatch, capsys):
    """Each variant in this process but the last, since to start them takes long."""
    child = logprob_head.child

    def here(args, tokens, variant, dtype, file):
        if tokens == args.tokens:
            return child(args, tokens, variant, dtype, file)
        return logprob_head.measure(args, variant, logprob_head.DTYPES[dtype], file)

    sizes = ["--tokens=96", "--shared-tokens=64", "--rounds=1", "--vocabulary=500", "--hidden=32", "--threads=1"]
    monkeypatch.setattr(sys, "argv", ["logprob_head", *sizes, "--dtypes", "fp32"])
    monkeypatch.setattr(logprob_head, "child", here)
    monkeypatch.chdir(ROOT)
    with suppress(SystemExit):  # of so small sizes the time says nothing
        logprob_head.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if "tiled fp32" in line]
    assert lines[0].endswith("met: target 1e-05") and lines[1].startswith("  tiled fp32: ") and len(lines) == 2


def test_packing_meets_its_targets_and_says_where_the_lengths_are_from(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["packing", "--multiples", "16", "--rounds", "1"])
    packing.main()
    printed = capsys.readouterr().out
    assert printed.startswith("lengths drawn from a lognormal distribution") and "at most 3 %: all met" in printed
    assert [line.split()[:3] for line in printed.splitlines() if line.split()[1:3] == ["16384", "16"]] == [
        ["128", "16384", "16"],
        ["256", "16384", "16"],
    ]


def test_the_drawn_lengths_are_those_that_are_told():
    import numpy as np

    drawn = np.random.default_rng(0).lognormal(np.log(1000), 1.5, 256)
    assert packing.LENGTHS == np.clip(np.floor(drawn), 10, 16384).astype(int).tolist()


def test_weight_plan_measures_all_tensors_of_each_stage(monkeypatch, capsys):
    monkeypatch.setattr(weight_plan, "SPEC", replace(weight_plan.SPEC, num_layers=2, num_experts=4))
    monkeypatch.setattr(sys, "argv", ["weight_plan", "--rounds", "1", "--ep", "2"])
    with suppress(SystemExit):  # of so few tensors the time says nothing
        weight_plan.main()
    layer = 9 + 3 * 4
    printed = capsys.readouterr().out
    assert printed.startswith(f"{3 + 2 * layer} tensors")
    assert f"{1 + layer} of them" in printed and f"{2 + layer} of them" in printed


@pytest.mark.parametrize("tokens", [64, 16384])
def test_the_long_steps_recipe_is_refused_for_nothing_but_its_missing_store(tmp_path, tokens):
    """By what `megatron-apo train` checks before it starts a rank; the store is stage 1's to make."""
    recipe = load_recipe(long_step.write_run(tmp_path, tokens, 4, []))
    with pytest.raises(ValueError) as caught:
        open_training(recipe)
    missing = f"{tmp_path / 'vstar' / 'manifest.json'}: not there;"
    assert str(caught.value).startswith(missing) and "\n" not in str(caught.value)
    assert (len(load_inputs(recipe).training.prompts), len(load_inputs(recipe).evaluation.prompts)) == (4, 1)


def test_noise_is_fixed_by_seed_and_position_and_independent_otherwise():
    import torch

    drawn = torch.stack([noise(seed, position, 50, 0.2) for seed in range(20) for position in range(20)])
    assert torch.equal(noise(3, 7, 50, 0.2), drawn[3 * 20 + 7])
    assert abs(float(drawn.std()) - 0.2) < 0.01 and abs(float(drawn.mean())) < 0.01
    assert float(torch.corrcoef(drawn).fill_diagonal_(0).abs().max()) < 0.8  # of 50 numbers by chance: 0.14 each


def test_a_finished_study_is_told_and_not_run_again(monkeypatch, capsys, tmp_path):
    """Two seeds of one setting; of the reward the last 10 steps count."""
    monkeypatch.setattr(mismatch, "prepare", lambda base: base / "recipe.yaml")
    monkeypatch.setattr(mismatch, "command", lambda *_: pytest.fail("it ran"))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "held_out.json").write_text('{"mean": 0.5, "samples_per_prompt": 8}')
    for seed, reward in enumerate((0.7, 0.8)):
        folder = mismatch.folder_of(tmp_path / "12-steps", 0.2, "token", seed)
        folder.mkdir(parents=True)
        (folder / "held_out.json").write_text(f'{{"mean": {reward + 0.1}}}')
        rows = [
            {"step": step, "loss": 1.0, "reward/mean": reward if step > 2 else 9.0, "mismatch/mean": 0.008}
            | {"mismatch/sequence_ess": 0.97, "importance/mean": 0.999, "importance/capped": 0.0125}
            for step in range(1, 13)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["--steps=12", "--seeds", "0", "1", "--stds", "0.2", "--corrections", "token"]
    monkeypatch.setattr(sys, "argv", ["mismatch", f"--out={tmp_path}", *settings])
    mismatch.main()
    printed = capsys.readouterr().out
    for cell in ("before: 0.500", "0.750 ± 0.071", "0.850 ± 0.071", "0.008", "0.970", "0.999", "1.25%"):
        assert cell in printed, cell


def test_runs_of_a_real_model_are_told_by_seed(monkeypatch, capsys, tmp_path):
    for seed, last in ((0, 0.5), (1, 0.7)):
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "recipe.yaml").write_text(f"run: {{seed: {seed}}}\n")
        rows = [{"step": step, "time": 0, "loss": 1.0, "reward/mean": step / 10} for step in range(1, 5)]
        rows = [row | {"time/step_s": 20 + row["step"], "tokens_per_s/generate": 50} for row in rows]
        for step, mean in ((0, 0.1), (4, last)):
            found = {"avg_at_k": mean, "avg_at_k_stderr": 0.02, "greedy": 0.3, "greedy_stderr": 0.05}
            rows.append({"step": step, "time": 0} | {f"eval/{name}": value for name, value in found.items()})
        (tmp_path / str(seed) / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    runs = [str(tmp_path / "1"), str(tmp_path / "0")]
    monkeypatch.setattr(sys, "argv", ["real_model", *runs, "--svg", str(tmp_path / "curve.svg")])
    real_model.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "seed 0: held-out 0.100 +- 0.020 -> 0.500 +- 0.020, greedy 0.300 +- 0.050 -> 0.300 +- 0.050"
    assert lines[2] == "gained: 0.500 +- 0.100 over 2 seeds" and lines[3].startswith("a step: 23.5 s (")
    assert (tmp_path / "curve.svg").read_text().count("seed ") >= 2


def test_baselines_are_held_against_the_truth_of_a_policy(monkeypatch, capsys):
    sizes = ["--prompts=12", "--steps=9", "--prompts-per-step=5", "--seeds=2", "--groups", "1", "2"]
    monkeypatch.setattr(sys, "argv", ["baselines", *sizes, "--bandwidths", "1"])
    baselines.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [line[:3] for line in lines if line[0] == "G"] == [["G", "=", "1,"], ["G", "=", "2,"]]
    found = [dict(zip(("error", "moment"), line[1:3], strict=True)) for line in lines if line[0] == "truth"]
    assert [row["error"] for row in found] == ["0.000"] * 2 and all(float(row["moment"]) < 0.25 for row in found)


def test_baselines_are_held_against_the_truth_of_a_recorded_run(monkeypatch, capsys, tmp_path):
    """Two prompts of rates 1/2 and 1, twice; another step has no truth, and the third samples are not looked at."""
    ids = [f"{1:032x}"] * 3 + [f"{2:032x}"] * 3
    for step in range(3):
        rewards = [1.0, 0.0, 9.0, 1.0, 1.0, 9.0]
        batch = make_batch([[1]] * 6, [[2]] * 6, rewards=rewards, prompt_ids=ids)
        RolloutFolder(tmp_path / "rollouts").write(step, batch)
    rows = [(step, one, value) for step in (1, 3) for one, value in ((ids[0], 0.5), (ids[3], 1.0))]
    steps, names, values = (list(column) for column in zip(*rows, strict=True))
    pq.write_table(pa.table({"step": steps, "prompt_id": names, "value": values}), tmp_path / "truth")
    settings = ["--run", str(tmp_path), "--truth", str(tmp_path / "truth"), "--groups", "2", "--bandwidths", "inf"]
    monkeypatch.setattr(sys, "argv", ["baselines", *settings])
    baselines.main()
    rows = {" ".join(line.split()[:-5]): line.split()[-5:] for line in capsys.readouterr().out.splitlines()}
    assert rows["truth"] == ["0.000", "0.125", "0.000", "0.125", "0.0%"]
    assert rows["group mean"] == ["0.000", "0.125", "0.000", "0.125", "0.0%"]
    assert rows["leave one out"] == ["0.354", "0.500", "0.354", "0.500", "0.0%"]
    # After 4 rewards of the first prompt and the other of its group: (2 + 0) / 5 and (2 + 1) / 5, 0.1 from the truth.
    assert rows["triangular inf"][2] == "0.071" == f"{(0.1**2 / 2) ** 0.5:.3f}"
