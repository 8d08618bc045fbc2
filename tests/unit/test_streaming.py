"""A step that comes in waves: what is in a wave, when it comes, where its rows go, and what becomes of engines that die
or a run that ends in the middle. The counterparts of engines are HTTP servers without a model."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_apo.config import ParallelConfig, RecipeError, build_recipe
from megatron_apo.data.layout import WavePlanner, plan_batch
from megatron_apo.data.packing import plan_wave
from megatron_apo.data.rollouts import RolloutBatch, Wave
from megatron_apo.objectives import OBJECTIVES, build_objective
from megatron_apo.rollout.rollouts import Rollouts
from megatron_apo.rollout.server import ServerDied
from megatron_apo.runtime.ending import Interrupted
from tests.batches import assert_same_batch, make_batch
from tests.engines import GENERATE, until
from tests.unit.test_data_layout import batch_of, recipe_of
from tests.unit.test_packing import LENGTHS, MULTIPLES, size
from tests.unit.test_rollouts import PROMPTS, Job, start  # noqa: F401 (a fixture)

Start = Callable[..., tuple[Rollouts, Job]]
PATHS = ["model.path=m", "data.train=t", "vstar.dir=v", "train.streamed=true"]


# ---- what is in a wave


def groups_batch(seed: int, num_groups: int, samples: int) -> RolloutBatch:
    draw = random.Random(seed)
    count = num_groups * samples
    responses = [[draw.randrange(99) for _ in range(draw.randint(1, 9))] for _ in range(count)]
    made = make_batch(
        [[row // samples] * 2 for row in range(count)],
        responses,
        rewards=[draw.random() for _ in range(count)],
        log_probs=[[-draw.random() for _ in response] for response in responses],
        prompt_ids=[f"{row // samples}" for row in range(count)],
        seconds=[draw.random() for _ in range(count)],
    )
    made.wave_B[:] = np.repeat([draw.randrange(3) for _ in range(num_groups)], samples)
    return made


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), num_groups=st.integers(1, 9), samples=st.integers(1, 3))
def test_a_batch_is_what_its_waves_are_put_together_to(seed: int, num_groups: int, samples: int) -> None:
    whole = groups_batch(seed, num_groups, samples)
    waves = whole.waves
    assert sorted(row for wave in waves for row in wave.rows) == list(range(len(whole)))
    for wave in waves:
        assert [wave.batch.prompt_ids[at] for at in range(len(wave.rows))] == [whole.prompt_ids[r] for r in wave.rows]
        assert len({*wave.batch.group_B.tolist()}) * samples == len(wave.rows), "whole groups"
        for at, row in enumerate(wave.rows):
            assert wave.batch.sequences.response(at).tolist() == whole.sequences.response(row).tolist()
    again = RolloutBatch.of_waves(waves)
    numbers = {number: place for place, number in enumerate(sorted({*whole.wave_B.tolist()}))}
    whole.wave_B[:] = [numbers[number] for number in whole.wave_B.tolist()]
    assert_same_batch(again, whole)
    assert again.seconds_B.tolist() == whole.seconds_B.tolist()


# ---- where its rows go


@settings(deadline=None)
@given(
    lengths=LENGTHS, begun=st.lists(st.integers(0, 500), min_size=1, max_size=5), multiple=MULTIPLES,
    extra=st.integers(0, 400), packing=st.booleans(),
)  # fmt: skip
def test_a_waves_plan_keeps_the_budget_and_evens_out_what_was_uneven(lengths, begun, multiple, extra, packing):
    budget = max(lengths) + -max(lengths) % multiple + extra
    plan = plan_wave(lengths, begun, budget_tokens=budget, packing=packing, multiple=multiple)
    assert sorted(i for rank in plan for members in rank for i in members) == list(range(len(lengths)))
    assert all(members and size(lengths, members, packing, multiple) <= budget for rank in plan for members in rank)
    new = [sum(size(lengths, members, True, multiple) for members in rank) for rank in plan]
    ends = [have + more for have, more in zip(begun, new, strict=True)]
    longest = max(lengths) + -max(lengths) % multiple
    # Who got anything was not ahead of anyone by more than the last that it got.
    assert all(end - longest <= min(ends) for end, more in zip(ends, new, strict=True) if more)


@settings(deadline=None, max_examples=60)
@given(
    dp=st.integers(1, 3), num_minibatches=st.integers(1, 3), count=st.integers(1, 5), packing=st.booleans(),
    cuts=st.integers(1, 6), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_whatever_comes_when_a_row_is_in_its_own_minibatch_once(dp, num_minibatches, count, packing, cuts, seed):
    draw = random.Random(seed)
    recipe = recipe_of(ParallelConfig(dp=dp), packing=packing)
    lengths = [1 + int(199 * draw.random() ** 3) for _ in range(num_minibatches * dp * count)]
    recipe.train.tokens_per_micro_batch = max(lengths) + draw.randrange(200)
    whole, order = batch_of(lengths), list(range(len(lengths)))
    draw.shuffle(order)
    planner = WavePlanner(recipe, len(lengths), num_minibatches=num_minibatches, dp=dp)
    for wave in np.array_split(order, cuts):
        rows = sorted(wave.tolist())
        part = planner.plan(rows, batch_of([lengths[row] for row in rows]))
        assert sorted(at for replica in range(dp) for at in part.rows_of(replica)) == list(range(len(rows)))
    found, usual = planner.whole, plan_batch(recipe, whole, num_minibatches=num_minibatches, dp=dp)
    for mine, other in zip(found.plans, usual.plans, strict=True):
        rows_of = [sorted(row for rank in plan for members in rank for row in members) for plan in (mine, other)]
        assert rows_of[0] == rows_of[1]
        assert all(mine), "no replica is without work"
    assert found.lengths == usual.lengths and found.metrics().keys() == usual.metrics().keys()


def test_groups_that_are_coupled_share_a_micro_batch():
    """Those of a later minibatch, of which the rest has come or will: 22 and 7 of 40; 55 does not fit into one."""
    recipe = recipe_of(ParallelConfig(dp=2))
    recipe.train.tokens_per_micro_batch = 40
    planner = WavePlanner(recipe, 16, num_minibatches=2, dp=2)
    planner.plan([*range(8), 10, 11], batch_of([5] * 8 + [30, 25]), groups=[*range(8), 1, 1])
    groups = [0, 0, 3, 3]
    plan = planner.plan([8, 9, 14, 15], batch_of([10, 12, 3, 4]), groups=groups)
    assert sorted(members for rank in plan.plans[1] for members in rank) == [[0, 1], [2, 3]]
    assert not plan.splits_groups(1, groups)


@pytest.mark.parametrize("groups_a_minibatch", [1, 2])
def test_no_replica_is_without_work_where_there_are_fewer_groups(groups_a_minibatch: int) -> None:
    recipe = build_recipe({}, ["model.path=m", "data.train=t", "objective.name=rebel", "parallel.dp=2"])
    rows = 4 * groups_a_minibatch
    planner = WavePlanner(recipe, rows, num_minibatches=2, dp=2)
    for first in range(0, rows, 2):
        planner.plan([first, first + 1], batch_of([5, 7]), groups=[first, first])
    assert all(members for plan in planner.whole.plans for members in plan)


def test_a_row_that_comes_twice_or_not_at_all_is_seen():
    recipe = recipe_of(ParallelConfig())
    planner = WavePlanner(recipe, 4, num_minibatches=2, dp=1)
    planner.plan([0, 2], batch_of([5, 6]))
    with pytest.raises(AssertionError, match="2 rows did not come"):
        planner.whole  # noqa: B018
    with pytest.raises(AssertionError, match="row 2 came before"):
        planner.plan([1, 2], batch_of([5, 6]))


# ---- when it comes


def take(rollouts: Rollouts, step: int, enough: int, num_samples: int = 1) -> tuple[list[list[int]], RolloutBatch]:
    waves = []
    with closing(rollouts.stream(PROMPTS, step, num_samples=num_samples, enough=enough)) as stream:
        for rows, wave in stream:
            waves.append(Wave(rows, wave))
    return [wave.rows for wave in waves], RolloutBatch.of_waves(waves)


def test_waves_come_while_the_rest_is_generated_and_are_the_batch(start: Start) -> None:  # noqa: F811
    """A prompt of three tokens and its response of two take four positions."""
    rollouts, job = start(1)
    with rollouts:
        rollouts.sync(0)
        whole = rollouts.sample(PROMPTS, 0)
        server = job.servers[0]
        server.held, server.answered[:] = True, []
        stream = rollouts.stream(PROMPTS, 0, enough=7)
        threading.Timer(0.2, lambda: server.release(2)).start()
        first, wave = next(stream)
        assert len(first) == 2 and len(wave) == 2 and len(server.answered) == 2
        assert wave.prompt_ids == tuple(PROMPTS[row].prompt_id for row in first)
        server.release(3)
        until(lambda: len(server.answered) == 5)
        second, other = next(stream)
        assert 2 <= len(second) <= 3, "what has come by then"
        server.release(3)
        waves = [Wave(first, wave), Wave(second, other), *(Wave(*rest) for rest in stream)]
        again = RolloutBatch.of_waves(waves)
        assert again.wave_B.max() == len(waves) - 1
        again.wave_B[:] = 0
        assert_same_batch(again, whole)
        assert rollouts.step_metrics() == {} and job.graded == 16


def test_with_the_last_wave_the_engines_are_free(
    start: Start,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For an evaluation: the thread that drove them has ended, however long it takes for that."""
    rollouts, _ = start(1)
    with rollouts:
        rollouts.sync(0)
        honest, missing = rollouts.fleet.generate, len(PROMPTS)

        def slow(*arguments: Any) -> None:
            honest(*arguments)
            time.sleep(0.3)

        monkeypatch.setattr(rollouts.fleet, "generate", slow)
        with closing(rollouts.stream(PROMPTS, 0, enough=1)) as stream:
            while missing:
                missing -= len(next(stream)[0])
            assert not [thread for thread in threading.enumerate() if thread.name == "sampling"]


def test_a_prompts_responses_come_together(start: Start) -> None:  # noqa: F811
    rollouts, _ = start(2)
    with rollouts:
        rollouts.sync(0)
        rows, batch = take(rollouts, 0, 1, num_samples=3)
        assert all(part == sorted(part) and len(part) % 3 == 0 for part in rows)
        assert all(part[at] // 3 == part[at - at % 3] // 3 for part in rows for at in range(len(part)))
        assert batch.groups == [[3 * group, 3 * group + 1, 3 * group + 2] for group in range(8)]
        assert sum(rollouts.step_metrics().values()) == 24


@pytest.mark.parametrize("number", [1, 2])
def test_what_was_taken_stays_when_engines_die(start: Start, number: int) -> None:  # noqa: F811
    """One engine of two, whose requests the other is asked; or all of them, which are restarted and proven first."""
    rollouts, job = start(number)
    with rollouts:
        rollouts.sync(0)
        for server in job.servers:
            server.held = True
        stream = rollouts.stream(PROMPTS, 0, enough=1)
        job.servers[0].release()
        first, wave = next(stream)
        assert len(first) == 1
        for server in job.servers:
            server.held = False
        job.servers[0].die()
        for server in job.servers[1:]:
            server.release(8)
        waves = [Wave(first, wave), *(Wave(*rest) for rest in stream)]
        assert sorted(row for one in waves for row in one.rows) == list(range(8)) and job.graded == 8
        assert job.servers[0].answered.count(int(job.servers[0].answered[0])) == 1, "asked again"
        if number == 1:
            events = job.events_of(0)
            assert events.count("start") == 2 and events[-8:].count("generate") == 7 and "score" in events
        rollouts.sync(1)
        assert len(rollouts.sample(PROMPTS, 1)) == 8


def test_a_second_death_of_all_ends_the_run(start: Start) -> None:  # noqa: F811
    rollouts, job = start(1)
    with rollouts:
        rollouts.sync(0)
        begin, server = job.servers[0].start, job.servers[0]
        server.faults[GENERATE] = "die"
        server.start = lambda: (begin(), server.faults.update({GENERATE: "die"}))  # type: ignore[method-assign]
        rollouts._prove = lambda _: None  # type: ignore[method-assign]
        with pytest.raises(ServerDied, match="died"), closing(rollouts.stream(PROMPTS, 0, enough=1)) as stream:
            list(stream)


def test_an_interrupt_ends_it_between_two_waves(start: Start) -> None:  # noqa: F811
    rollouts, job = start(1)
    with rollouts:
        rollouts.sync(0)
        job.servers[0].held = True
        with closing(rollouts.stream(PROMPTS, 0, enough=1)) as stream:
            job.servers[0].release()
            next(stream)
            rollouts.interrupt()
            with pytest.raises(Interrupted):
                next(stream)


def test_who_fails_between_two_waves_leaves_no_thread(start: Start) -> None:  # noqa: F811
    rollouts, job = start(1)
    with rollouts:
        rollouts.sync(0)
        job.servers[0].held = True
        with pytest.raises(ZeroDivisionError), closing(rollouts.stream(PROMPTS, 0, enough=1)) as stream:
            job.servers[0].release()
            for _ in stream:
                1 / 0  # noqa: B018
        assert not [thread for thread in threading.enumerate() if thread.name == "sampling"]


# ---- what is refused


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["parallel={pp: 2, vpp: 2}"], "parallel.vpp=2 takes micro-batches of one length"),
        (["parallel={dp: 2, ep: 2}"], "parallel.ep=2 takes as many micro-batches on every replica"),
        (["train.offload_while_sampling=true"], "train.offload_while_sampling=true takes away what gradients go into"),
        (["rollout.sleep_while_training=true"], "rollout.sleep_while_training=true has one of the two at work"),
        (["objective.name=ppo"], "objective.name=ppo tells and whitens advantages by the whole batch"),
        (["objective.name=dapo"], "objective.dynamic_sampling=true draws anew"),
        (["objective.baseline.source=batch_mean"], "objective.baseline.source=batch_mean is the mean of the whole"),
        (["objective.baseline.source=kernel"], "objective.baseline.source=kernel is the mean of the whole batch where"),
        (
            ["objective.baseline.source=leave_one_out", "objective.samples_per_prompt=2", "reward.truncated=mask"],
            "objective.baseline.source=leave_one_out is the mean of the whole batch where it has nothing else, as it "
            "may with reward.truncated=mask",
        ),
    ],
)
def test_what_cannot_be_streamed_is_refused_in_one_line(overrides: list[str], why: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build_recipe({}, [*PATHS, *overrides])
    (line,) = caught.value.problems
    assert line.startswith(f"train.streamed: true, but {why}") and line.endswith("; use false, or change that")
    build_recipe({}, [*PATHS, *overrides, "train.streamed=false"])


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - {"sft"}))
def test_a_recipe_refuses_the_methods_whose_targets_are_of_the_batch(name: str) -> None:
    recipe = build_recipe({}, [*PATHS[:3], f"objective.name={name}"])
    objective = build_objective(recipe.objective, max_response_tokens=9)
    is_refused = bool(recipe.objective.whole_batch(masks=False))
    assert is_refused == (objective.targets_by == "batch" or getattr(objective, "dynamic_sampling", False))


@pytest.mark.parametrize("source", ["group_mean", "leave_one_out", "kernel", "vstar"])
def test_baselines_of_a_group_may_be_streamed(source: str) -> None:
    build_recipe({}, [*PATHS, f"objective.baseline.source={source}", "objective.samples_per_prompt=2"])
