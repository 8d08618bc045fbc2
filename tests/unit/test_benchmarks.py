"""Benchmarks run, at sizes that show nothing else."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_apo.config import load_recipe
from megatron_apo.preflight import open_training
from megatron_apo.rollout.inputs import load_inputs
from tests.benchmarks import logprob_head, long_step, packing, weight_plan

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
    assert (len(load_inputs(recipe).training.prompts), len(load_inputs(recipe).evaluation)) == (4, 1)
