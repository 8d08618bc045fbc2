"""What a step takes at the paper's scale, by a model and numbers that can be worked out by hand."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_apo.config import Recipe, build_recipe
from megatron_apo.model.hf_config import read_hf_config
from tests.benchmarks import paper_scale
from tests.benchmarks.paper_scale import (
    HBM_BYTES_PER_S,
    PEAK_FLOPS,
    WORKSPACE_BYTES,
    Assumptions,
    Work,
    activation_bytes,
    decode_steps,
    generate_s,
    objective_of,
    peak_bytes,
    step_s,
)
from tests.unit.test_flops import DENSE  # 15,104 FLOPs for a prompt of 3 and a response of 2; 3 layers

# q and output 8 x 8 each, k and v 8 x 4 each, and gate, up and down 8 x 16 each; embedding and head 10 x 8 each.
WEIGHTS = 3 * (2 * 64 + 2 * 32 + 3 * 128) + 2 * 80
KV_TOKEN = 2 * 3 * 1 * 4 * 2  # keys and values, layers, groups, head size, bytes
EXACT = Assumptions(mfu=0.5, hbm_share=1.0, length_cv=0.0)
WORK = Work(DENSE, gpus=2, prompts=8, samples=1, prompt_tokens=3, response_tokens=2, longest=5, max_num_seqs=100,
            kv_cache_bytes=1e9)  # fmt: skip
PASS = 8 * 15_104 / (2 * PEAK_FLOPS * 0.5)


def test_decoding_goes_on_to_the_longest_response_or_until_all_had_room() -> None:
    assert decode_steps(WORK) == 5
    assert decode_steps(replace(WORK, samples=10)) == 5  # 40 sequences of an engine, 80 tokens, all at once
    assert decode_steps(replace(WORK, samples=10, max_num_seqs=10)) == 8
    assert decode_steps(replace(WORK, samples=10, kv_cache_bytes=8 * KV_TOKEN * 5)) == 10


def test_generation_reads_weights_and_what_came_before() -> None:
    """Of 4 responses: tokens 1 and 2 read 3 and 4, and the half that the sum P L + L^2 / 2 is rounded by."""
    assert DENSE.num_weights == WEIGHTS
    num_bytes = 5 * 2 * WEIGHTS + KV_TOKEN * 4 * (3 * 2 + 2)
    one_prompt = 3 * (3 * (384 + 768) + 6 * 32) + 160  # three positions of each layer, six pairs, one row of logits
    prefill_s = 8 * one_prompt / (2 * PEAK_FLOPS * 0.5)
    assert generate_s(WORK, EXACT) == pytest.approx(num_bytes / HBM_BYTES_PER_S + prefill_s)
    slower = replace(EXACT, hbm_share=0.5, decode_overhead_s=1e-3)
    assert generate_s(WORK, slower) == pytest.approx(2 * num_bytes / HBM_BYTES_PER_S + prefill_s + 5e-3)
    # Lengths 1 and 3 in place of 2 and 2: the squares are 5 on average.
    spread = num_bytes + KV_TOKEN * 4 * 0.5
    assert generate_s(WORK, replace(EXACT, length_cv=0.5)) == pytest.approx(spread / HBM_BYTES_PER_S + prefill_s)


def test_generation_computes_a_prompt_once_and_may_be_bound_by_its_products() -> None:
    many = replace(WORK, samples=10**6, max_num_seqs=10**9, kv_cache_bytes=1e18)
    one_prompt = 3 * (3 * (384 + 768) + 6 * 32) + 160
    flops = 4 * 10**6 * (15_104 - one_prompt)
    slow = replace(EXACT, mfu=1e-6)
    expected = flops / (PEAK_FLOPS * 1e-6) + 8 * one_prompt / (2 * PEAK_FLOPS * 1e-6)
    assert generate_s(many, slow) == pytest.approx(expected)


def of(method: str, splits: bool = False, samples: int | None = None) -> dict[str, float]:
    """Parts of a step but generation, in passes of the policy over its responses."""
    objective = objective_of(method, samples)
    found = step_s(replace(WORK, samples=objective.samples_per_prompt), objective, splits, EXACT)
    assert found.pop("generate") > 0
    return {name: value / (PASS * objective.samples_per_prompt) for name, value in found.items()}


def test_a_step_is_what_the_method_declares() -> None:
    """The second of two minibatches needs the old policy's log-probs, PPO both; its critic has one row in place of ten,
    so that two positions of logits cost 16 x 2 in place of 160 x 2."""
    assert of("apo") == pytest.approx({"reference forward": 1, "policy training": 3})
    grpo = {"reference forward": 1, "old_policy forward": 0.5, "policy training": 3}
    assert of("grpo") == pytest.approx(grpo) == of("grpo", samples=2)
    assert of("rebel") == pytest.approx({"old_policy forward": 0.5, "policy training": 3})
    assert of("rebel", splits=True) == pytest.approx(
        {"old_policy forward": 0.5, "present forward": 0.5, "policy training": 3}
    )
    critic = (15_104 - 2 * 160 + 2 * 16) / 15_104
    assert of("ppo") == pytest.approx(
        {"reference forward": 1, "old_policy forward": 1, "policy training": 3}
        | {"critic forward": critic, "critic training": 3 * critic}
    )


def test_what_is_the_same_for_all_is_added() -> None:
    assert step_s(WORK, objective_of("apo"), False, replace(EXACT, fixed_s=7.0))["fixed"] == 7


def recipe_of(*settings: str) -> Recipe:
    needed = ["model.path=unused", "data.train=unused", "vstar.dir=unused", "train.tokens_per_micro_batch=1000"]
    needed += ["data.max_prompt_tokens=3", "sampling.max_response_tokens=5"]
    return build_recipe({}, [*needed, "train.log_prob_chunk_tokens=7", "rollout.kv_cache_gib=0.5", *settings])


def test_activations_are_the_tensors_of_a_layer() -> None:
    """Norms 4 x 8, queries, keys, values and attention's output 8 + 4 + 4 + 8, feed-forward 3 x 16; the head's tile of
    7 x 10 and its gradient of 8."""
    head = 4 * 7 * 10 + 4 * 1000 * 8
    assert activation_bytes(recipe_of(), DENSE) == 2 * 1000 * 3 * (32 + 24 + 48) + head
    again = recipe_of("train.recompute=selective")
    assert activation_bytes(again, DENSE) == 2 * 1000 * (3 * (32 + 24) + 48) + head
    assert activation_bytes(recipe_of("parallel.tp=2"), DENSE) == 1000 * 3 * (32 + 24 + 48) + head


def test_the_recipes_own_arithmetic_is_the_same() -> None:
    """Bytes that a token keeps, from the comments of the recipes: 28 layers of 73, 19 and 159 kB."""
    for name, setting, kilobytes in (("1.5b", "none", 73), ("1.5b", "selective", 19), ("7b", "none", 159)):
        spec = read_hf_config(Path(f"shape:qwen2.5-{name}"))
        recipe = recipe_of(f"train.recompute={setting}")
        head = 4 * 7 * 4096 + 4 * 1000 * spec.hidden_size
        one_layer = 2 * 1000 * 3 * spec.ffn_size * (setting == "selective")
        kept = (activation_bytes(recipe, spec) - head - one_layer) / 1000 / 28
        assert kept == pytest.approx(1000 * kilobytes, rel=0.03)


def test_the_peak_is_in_training_or_in_sampling() -> None:
    recipe = recipe_of("parallel.dp=4", "train.prompts_per_step=256")
    policy = WEIGHTS * (2 + 4 + 12 / 4)
    engine = 2 * WEIGHTS + 0.5 * 2**30 + WORKSPACE_BYTES
    assert peak_bytes(recipe, DENSE, objective_of("apo")) == {
        "policy": policy,
        "reference": 2 * WEIGHTS,
        "engine": engine,
    }
    assert peak_bytes(recipe, DENSE, objective_of("rebel")) == {"policy": policy, "engine": engine}
    critic = (WEIGHTS - 80 + 8) * 9  # one row in place of the head
    assert peak_bytes(recipe, DENSE, objective_of("ppo"))["critic"] == critic
    recipe = recipe_of("parallel.dp=4", "train.prompts_per_step=256", f"train.tokens_per_micro_batch={10**8}")
    assert peak_bytes(recipe, DENSE, objective_of("rebel")) == {
        "policy": policy,
        "activations": activation_bytes(recipe, DENSE),
    }


def test_the_papers_numbers_and_ours_stand_side_by_side(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["paper_scale", "--settings", "1.5B", "--groups", "4"])
    paper_scale.main()
    printed = capsys.readouterr().out
    assert printed.startswith("COMPUTED, not measured: Assumptions(mfu=0.4, ")
    times, memory, ranges = ({} for _ in range(3))
    for line in printed.splitlines():
        method, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if method in ("ppo", "rebel", "grpo G=4"):
            table = next(table for table in (times, memory, ranges) if method not in table)
            table[method] = cells
    assert times["ppo"][-2:] == ["10.84", "1.57"] and times["grpo G=4"][-2:] == ["15.01", "2.17"]
    assert memory["rebel"][-2:] == ["63 %", "1.52"]
    low, high = (float(text) for text in ranges["ppo"][-1].split(" to "))
    assert low <= float(times["ppo"][-4]) <= high


def test_stage_1_has_paid_off_after_as_many_passes() -> None:
    """After so many passes over the prompts as are told, both have taken the same time."""
    setting = paper_scale.SETTINGS["16k"]
    apo, ppo, *_ = paper_scale.rows_of(setting, [], Assumptions())
    passes = apo.stage1_s / paper_scale.extra_s(setting, ppo, apo)
    steps = passes * setting.stage1_prompts / paper_scale.PROMPTS
    assert steps * ppo.step_s == pytest.approx(apo.stage1_s + steps * apo.step_s) and ppo.stage1_s == 0


def test_the_shapes_are_the_papers() -> None:
    names = {"1.5B": 1.54e9, "3B": 3.09e9, "7B": 7.61e9, "16k": 1.78e9}
    for name, setting in paper_scale.SETTINGS.items():
        recipe = paper_scale.recipe_of(setting)
        assert read_hf_config(Path(recipe.model.path)).num_weights == pytest.approx(names[name], rel=0.01)
        assert recipe.parallel.world_size == recipe.rollout.replicas == setting.gpus
        assert recipe.train.prompts_per_step == paper_scale.PROMPTS and recipe.train.minibatches == 2
