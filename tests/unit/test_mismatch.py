"""When the distance between trainer and sampler is warned of, and when it ends a run."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict

import pytest

from megatron_apo.config import MismatchConfig, ModelConfig, RecipeError, RolloutConfig, build_recipe
from megatron_apo.learner.checkpoint import RunState
from megatron_apo.learner.mismatch import BASELINE_STEPS, MismatchError, MismatchWatch

FLOOR = 0.01


def watch_after(means, config=None, floor=FLOOR) -> MismatchWatch:
    watch = MismatchWatch(config or MismatchConfig(), floor)
    for step, mean in enumerate(means):
        watch.judge(mean, step)
    return watch


def test_the_baseline_is_the_median_of_the_first_20_steps_and_then_fixed():
    means = [0.02 + 0.001 * index for index in range(BASELINE_STEPS)]  # the lower one in the middle: .029
    random.Random(0).shuffle(means)
    watch = watch_after(means)
    assert watch.limits == pytest.approx({"warn": 0.087, "stop": 0.29})
    for step in range(20, 60):
        watch.judge(0.08, step)
    assert watch.limits == pytest.approx({"warn": 0.087, "stop": 0.29}) and watch.first_means == means


def test_the_floor_is_the_least_baseline():
    assert watch_after([1e-6] * 30).limits == pytest.approx({"warn": 0.03, "stop": 0.1})


def test_the_first_step_is_judged_by_the_floor_alone():
    told, warning = MismatchWatch(MismatchConfig(), FLOOR).judge(0.03, 0)
    assert told == pytest.approx({"mismatch/warn_limit": 0.03, "mismatch/stop_limit": 0.1, "mismatch/warned": 0})
    assert warning is None
    with pytest.raises(MismatchError):
        MismatchWatch(MismatchConfig(), FLOOR).judge(0.1001, 0)


def test_a_run_that_begins_between_floor_and_limit_is_its_own_baseline_from_the_second_step_on():
    watch = MismatchWatch(MismatchConfig(), FLOOR)
    told, warning = watch.judge(0.05, 0)
    assert told["mismatch/warned"] == 1 and warning is not None
    told, warning = watch.judge(0.06, 1)
    assert told == pytest.approx({"mismatch/warn_limit": 0.15, "mismatch/stop_limit": 0.5, "mismatch/warned": 0})


@pytest.mark.parametrize("step", [1, 5, 19, 20, 500])
def test_a_sudden_rise_ends_the_run_at_any_step(step):
    watch = watch_after([0.02] * step)
    watch.judge(0.199, step)
    with pytest.raises(MismatchError):
        watch.judge(0.201, step + 1)


def test_a_rise_in_fewer_than_half_of_the_first_steps_does_not_move_the_limits():
    """All below the stop's 10 x .02."""
    watch = watch_after([0.02] * 11 + [0.19] * 9)
    assert watch.limits == pytest.approx({"warn": 0.06, "stop": 0.2})


def test_honest_runs_are_left_alone():
    """Levels from far below the floor to the warning's limit, with a spread of a third and a new draw each step."""
    draw = random.Random(1)
    for level in (1e-6, 1e-3, 0.01, 0.02):
        watch = MismatchWatch(MismatchConfig(), FLOOR)
        for step in range(300):
            assert watch.judge(level * draw.uniform(0.75, 1.33), step)[1] is None, (level, step)


def test_the_error_says_value_median_limit_key_and_meaning_in_one_line():
    watch = watch_after([0.02] * 4)
    with pytest.raises(MismatchError) as caught:
        watch.judge(0.4567, 4)
    line = str(caught.value)
    assert "\n" not in line and line.startswith("step 5: ")
    for part in ("0.457 nats", "first 4 steps 0.02", "allows 0.2", "mismatch.stop", "10 x", "weights or numerics"):
        assert part in line, part
    with pytest.raises(MismatchError, match="no step before it, floor 0.01"):
        MismatchWatch(MismatchConfig(), FLOOR).judge(0.4567, 0)


@pytest.mark.parametrize("mean", [math.nan, math.inf])
def test_no_number_is_above_every_limit(mean):
    with pytest.raises(MismatchError):
        watch_after([0.02] * 3).judge(mean, 3)
    watch = watch_after([0.02] * 3, MismatchConfig(stop=None))
    assert watch.judge(mean, 3)[0]["mismatch/warned"] == 1 and watch.first_means == [0.02] * 3


def test_a_warning_is_given_where_it_begins_and_counted_at_every_step():
    watch = watch_after([0.02] * 20)
    found = [watch.judge(mean, 20 + step) for step, mean in enumerate([0.07, 0.08, 0.02, 0.07])]
    assert [told["mismatch/warned"] for told, _ in found] == [1, 1, 0, 1]
    assert [warning is not None for _, warning in found] == [True, False, False, True]


def test_each_can_be_switched_off():
    watch = watch_after([0.02] * 20 + [1e3], MismatchConfig(warn=None, stop=None))
    assert watch.judge(1e3, 21) == ({"mismatch/warned": 0}, None)
    assert watch_after([], MismatchConfig(warn=None)).limits == {"stop": 0.1}


def test_a_resumed_run_judges_as_the_one_that_was_not_interrupted():
    """By way of a checkpoint's JSON, whatever the step it was saved at."""
    draw = random.Random(2)
    means = [0.02 * draw.random() for _ in range(40)]
    config = MismatchConfig(stop=1e9)
    straight = MismatchWatch(config, 1e-9)
    told = [straight.judge(mean, step)[0] for step, mean in enumerate(means)]
    for saved in (1, 7, 19, 20, 33):
        saving = watch_after(means[:saved], config, floor=1e-9)
        state = RunState(saved, {}, "", 0, tuple(saving.first_means))
        resumed = MismatchWatch(config, 1e-9)
        resumed.restore(RunState(**json.loads(json.dumps(asdict(state)))).first_mismatches)
        again = [resumed.judge(mean, step)[0] for step, mean in enumerate(means) if step >= saved]
        assert again == told[saved:], saved


def test_a_checkpoint_from_before_there_was_a_watch_is_read():
    assert RunState(**{"step": 3, "recipe": {}, "vstar_sha256": ""}).first_mismatches == ()


@pytest.mark.parametrize(
    ("model", "rollout", "floor"),
    [
        ({}, {}, 1e-5),
        ({"dtype": "bf16"}, {"dtype": "bfloat16"}, 0.01),
        ({}, {"dtype": "bfloat16"}, 0.01),  # the coarser of the two
        ({"dtype": "bf16", "fp8": {}}, {"dtype": "bfloat16"}, 0.05),
        ({"dtype": "bf16"}, {"dtype": "bfloat16", "quantization": "fp8"}, 0.05),
        ({"dtype": "bf16"}, {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}, 0.05),
    ],
)
def test_the_floor_is_by_precision_unless_it_is_set(model, rollout, floor):
    settings = ModelConfig(path="m", **model), RolloutConfig(**rollout)
    assert MismatchConfig().least_baseline(*settings) == floor
    assert MismatchConfig(floor=0.7).least_baseline(*settings) == 0.7


def test_a_warning_above_the_stop_is_refused():
    tree = {"model": {"path": "m"}, "data": {"train": "t"}, "vstar": {"dir": "v"}}
    with pytest.raises(RecipeError, match=r"mismatch.warn: 20.0 is above mismatch.stop=10.0"):
        build_recipe(tree, ["mismatch.warn=20"])
    with pytest.raises(RecipeError, match="mismatch.stop: 1 is not allowed; use greater than 1"):
        build_recipe(tree, ["mismatch.stop=1"])
    build_recipe(tree, ["mismatch.warn=20", "mismatch.stop=null"])
