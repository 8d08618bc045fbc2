"""Which prompts a step uses and the seeds of their samples."""

from __future__ import annotations

from collections import Counter

from megatron_apo.data.order import sample_seed, sample_seeds, step_prompts


def test_an_epoch_uses_every_prompt_once():
    steps = [step_prompts(step, num_prompts=12, prompts_per_step=4, seed=3) for step in range(6)]
    first, second = [p for step in steps[:3] for p in step], [p for step in steps[3:] for p in step]
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_a_step_is_a_function_of_its_number():
    assert step_prompts(5, num_prompts=7, prompts_per_step=3, seed=1) == step_prompts(
        5, num_prompts=7, prompts_per_step=3, seed=1
    )
    assert step_prompts(5, num_prompts=700, prompts_per_step=3, seed=1) != step_prompts(
        5, num_prompts=700, prompts_per_step=3, seed=2
    )


def test_fewer_prompts_than_a_step_holds():
    assert Counter(step_prompts(0, num_prompts=2, prompts_per_step=6, seed=0)) == {0: 3, 1: 3}


def test_a_repeated_prompt_gets_other_samples():
    seeds = sample_seeds(7, "train", 4, ["a", "b", "a", "a"])
    base = sample_seed(7, "train", 4, "a")
    assert seeds == [base, sample_seed(7, "train", 4, "b"), base + 1, base + 2]
    assert base != sample_seed(7, "eval", 4, "a") != sample_seed(8, "eval", 4, "a")
    assert all(0 <= seed < 2**31 + 3 for seed in seeds)
    assert sample_seeds(7, "train", 4, ["a", "b", "a"], 4) == [base, sample_seed(7, "train", 4, "b"), base + 4]
