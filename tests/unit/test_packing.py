"""Every plan of micro-batches keeps its promises, whatever the lengths."""

from __future__ import annotations

import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_apo.data.packing import plan_micro_batches

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=60)


def size(lengths, members, packing):
    own = [lengths[i] for i in members]
    return sum(own) if packing else max(own) * len(own)


def check(lengths, plan, dp, budget, packing):
    assert len(plan) == dp
    assert sorted(i for rank in plan for members in rank for i in members) == list(range(len(lengths)))
    assert len({len(rank) for rank in plan}) == 1
    assert all(members and size(lengths, members, packing) <= budget for rank in plan for members in rank)


@settings(deadline=None)
@given(
    per_rank=st.integers(1, 8),
    dp=st.integers(1, 8),
    room=st.floats(1, 6),
    packing=st.booleans(),
    seed=st.integers(0, 2**31),
    skew=st.sampled_from([0.5, 1, 4, 10]),
)
def test_any_batch_that_divides_by_dp_has_a_plan(per_rank, dp, room, packing, seed, skew):
    # A step's prompts divide by dp: one sequence a micro-batch is always possible, so no batch may be refused.
    draw = random.Random(seed)
    lengths = [1 + int(999 * draw.random() ** skew) for _ in range(per_rank * dp)]
    budget = int(max(lengths) * room)
    check(lengths, plan_micro_batches(lengths, dp=dp, budget_tokens=budget, packing=packing), dp, budget, packing)


@settings(deadline=None)
@given(lengths=LENGTHS, dp=st.integers(1, 6), extra=st.integers(0, 400), packing=st.booleans())
def test_plans_of_any_batch_keep_the_promises(lengths, dp, extra, packing):
    assume(len(lengths) >= dp)
    budget = max(lengths) + extra
    try:
        plan = plan_micro_batches(lengths, dp=dp, budget_tokens=budget, packing=packing)
    except ValueError as error:
        assert "parallel.dp" in str(error) and len(lengths) % dp
    else:
        check(lengths, plan, dp, budget, packing)


@settings(deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 100), packing=st.booleans())
def test_the_plan_depends_on_lengths_not_on_their_order(lengths, seed, packing):
    def by_length(values):
        plan = plan_micro_batches(values, dp=1, budget_tokens=max(values) * 3, packing=packing)
        return [[sorted(values[i] for i in members) for members in rank] for rank in plan]

    shuffled = random.Random(seed).sample(lengths, len(lengths))
    assert by_length(shuffled) == by_length(lengths)


@settings(deadline=None)
@given(lengths=LENGTHS, dp=st.integers(1, 6), packing=st.booleans())
def test_ranks_share_the_tokens_to_within_one_longest_sequence(lengths, dp, packing):
    assume(len(lengths) >= dp)
    plan = plan_micro_batches(lengths, dp=dp, budget_tokens=10**6, packing=packing)
    tokens = [sum(lengths[i] for members in rank for i in members) for rank in plan]
    assert max(tokens) - min(tokens) <= max(lengths)


@pytest.mark.parametrize("seed", range(3))
def test_packing_wastes_little(seed):
    # 128 responses of 100 to 4000 tokens: at most a fifth more micro-batches than tokens need.
    draw = random.Random(seed)
    lengths = [draw.randint(100, 4000) for _ in range(128)]
    plan = plan_micro_batches(lengths, dp=4, budget_tokens=16384, packing=True)
    assert len(plan[0]) <= 1.2 * -(-sum(lengths) // (4 * 16384)) + 1
    padded = plan_micro_batches(lengths, dp=4, budget_tokens=16384, packing=False)
    computed = sum(size(lengths, members, False) for rank in padded for members in rank)
    assert computed <= 1.3 * sum(lengths)


@pytest.mark.parametrize("packing", [True, False])
def test_micro_batches_of_equal_lengths_are_even(packing):
    plan = plan_micro_batches([100] * 16, dp=2, budget_tokens=300, packing=packing)
    assert sorted(len(members) for members in plan[0]) == [2, 3, 3]
    assert plan_micro_batches([100] * 16, dp=2, budget_tokens=100, packing=packing)[1] == [[i] for i in range(1, 16, 2)]
    assert plan_micro_batches([7], dp=1, budget_tokens=7, packing=packing) == [[[0]]]


@pytest.mark.parametrize("packing", [True, False])
def test_one_long_sequence_among_short_ones(packing):
    lengths = [1000] + [10] * 31
    plan = plan_micro_batches(lengths, dp=4, budget_tokens=1000, packing=packing)
    check(lengths, plan, 4, 1000, packing)
    uneven = [100, 60, 30, 30]  # rank 0 has the long one alone, and rank 1's do not fit together
    check(uneven, plan_micro_batches(uneven, dp=2, budget_tokens=100, packing=packing), 2, 100, packing)


@pytest.mark.parametrize("packing", [True, False])
def test_errors_name_the_key(packing):
    with pytest.raises(ValueError, match="train.tokens_per_micro_batch: 99 cannot hold a sequence of 100 tokens"):
        plan_micro_batches([5, 100], dp=1, budget_tokens=99, packing=packing)
    with pytest.raises(ValueError, match="parallel.dp: 3 ranks for 2 sequences"):
        plan_micro_batches([5, 5], dp=3, budget_tokens=99, packing=packing)
    with pytest.raises(ValueError, match="parallel.dp"):  # one rank needs two micro-batches, the other has one sequence
        plan_micro_batches([10, 10, 10], dp=2, budget_tokens=10, packing=packing)
