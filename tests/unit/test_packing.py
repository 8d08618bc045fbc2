"""Every plan of micro-batches keeps its promises, whatever the lengths."""

from __future__ import annotations

import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_apo.config import aligned
from megatron_apo.data.packing import Balance, balance, plan_micro_batches
from tests.benchmarks.packing import LENGTHS as LONG_TAILED

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=60)
MULTIPLES = st.sampled_from([1, 4, 16, 48])


def size(lengths, members, packing, multiple=1):
    own = [lengths[i] + -lengths[i] % multiple for i in members]
    return sum(own) if packing else max(own) * len(own)


def check(lengths, plan, dp, budget, packing, multiple=1, groups=1):
    assert len(plan) == dp
    assert sorted(i for rank in plan for members in rank for i in members) == list(range(len(lengths)))
    (num_bins,) = {len(rank) for rank in plan}
    assert num_bins % groups == 0
    assert all(members and size(lengths, members, packing, multiple) <= budget for rank in plan for members in rank)


@given(length=st.integers(1, 10**5), multiple=st.integers(1, 300))
def test_aligned_is_the_next_multiple(length, multiple):
    found = aligned(length, multiple)
    assert found % multiple == 0 and length <= found < length + multiple


@settings(deadline=None)
@given(
    per_rank=st.integers(1, 8),
    dp=st.integers(1, 8),
    groups=st.integers(1, 4),
    multiple=MULTIPLES,
    room=st.floats(1, 6),
    packing=st.booleans(),
    seed=st.integers(0, 2**31),
    skew=st.sampled_from([0.5, 1, 4, 10]),
)
def test_any_batch_that_divides_has_a_plan(per_rank, dp, groups, multiple, room, packing, seed, skew):
    # A step's prompts divide by dp and the group: one sequence a micro-batch is possible, so no batch may be refused.
    draw = random.Random(seed)
    lengths = [1 + int(999 * draw.random() ** skew) for _ in range(per_rank * dp * groups)]
    budget = int((max(lengths) + multiple) * room)
    options = {"dp": dp, "budget_tokens": budget, "packing": packing}
    plan = plan_micro_batches(lengths, **options, multiple=multiple, count_multiple_of=groups)
    check(lengths, plan, dp, budget, packing, multiple, groups)


@settings(deadline=None)
@given(
    lengths=LENGTHS,
    dp=st.integers(1, 6),
    groups=st.integers(1, 3),
    multiple=MULTIPLES,
    extra=st.integers(0, 400),
    packing=st.booleans(),
)
def test_plans_of_any_batch_keep_the_promises(lengths, dp, groups, multiple, extra, packing):
    assume(len(lengths) >= dp)
    budget = aligned(max(lengths), multiple) + extra
    options = {"dp": dp, "budget_tokens": budget, "packing": packing}
    try:
        plan = plan_micro_batches(lengths, **options, multiple=multiple, count_multiple_of=groups)
    except ValueError as error:
        assert "parallel.dp" in str(error) and len(lengths) % (dp * groups)
    else:
        check(lengths, plan, dp, budget, packing, multiple, groups)


@settings(deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 100), dp=st.integers(1, 4), multiple=MULTIPLES, packing=st.booleans())
def test_the_plan_depends_on_lengths_not_on_their_order(lengths, seed, dp, multiple, packing):
    lengths = lengths * dp  # a plan exists, and lengths come more than once
    order = random.Random(seed).sample(range(len(lengths)), len(lengths))

    def plan(values):
        budget = aligned(max(values), multiple) * 3
        return plan_micro_batches(values, dp=dp, budget_tokens=budget, packing=packing, multiple=multiple)

    def by_length(indices):
        return [[[lengths[i] for i in members] for members in rank] for rank in indices]

    shuffled = [[[order[i] for i in members] for members in rank] for rank in plan([lengths[i] for i in order])]
    assert by_length(shuffled) == by_length(plan(lengths))


@settings(deadline=None)
@given(lengths=LENGTHS, dp=st.integers(1, 6), multiple=MULTIPLES, packing=st.booleans())
def test_ranks_share_the_tokens_to_within_one_longest_sequence(lengths, dp, multiple, packing):
    assume(len(lengths) >= dp)
    plan = plan_micro_batches(lengths, dp=dp, budget_tokens=10**6, packing=packing, multiple=multiple)
    tokens = [sum(aligned(lengths[i], multiple) for members in rank for i in members) for rank in plan]
    assert max(tokens) - min(tokens) <= aligned(max(lengths), multiple)


@pytest.mark.parametrize("multiple", [1, 4, 16, 32, 64])
@pytest.mark.parametrize("budget", [16384, 32768])
@pytest.mark.parametrize("first, last", [(0, 256), (0, 128), (128, 256)])
def test_a_long_tailed_batch_is_even_and_hardly_padded(first, last, budget, multiple):
    lengths = LONG_TAILED[first:last]
    assert min(LONG_TAILED) == 10 and max(LONG_TAILED) == 16384 and sum(lengths) > 1000 * len(lengths)
    plan = plan_micro_batches(lengths, dp=8, budget_tokens=budget, packing=True, multiple=multiple)
    check(lengths, plan, 8, budget, True, multiple)
    found = balance(plan, lengths, multiple)
    assert found.padding <= 0.03 and found.tokens <= 0.03
    # No more micro-batches than the tokens fill, and where they leave room beside a longest response all are alike.
    assert found.micro_batches == -(-sum(aligned(length, multiple) for length in lengths) // (8 * budget))
    assert budget == 16384 or found.micro_batch_tokens <= 0.03


def test_balance_of_a_plan_by_hand():
    lengths = [5, 3, 2, 8, 1, 1]
    plan = [[[0, 1], [2]], [[3], [4, 5]]]
    # In fours: 8 + 4 and 4 on rank 0, 8 and 4 + 4 on rank 1. 20 of 32 tokens are real.
    assert balance(plan, lengths, 4) == Balance(
        micro_batches=2, padding=12 / 32, tokens=0, attention=0, flops=0, micro_batch_tokens=12 / 8 - 1
    )
    # As they are: 8 and 2, 8 and 2; squares 25 + 9 + 4 = 38 against 64 + 1 + 1 = 66.
    found = balance(plan, lengths, crossover_tokens=10)
    assert (found.padding, found.tokens, found.micro_batch_tokens) == (0, 0, pytest.approx(8 / 5 - 1))
    assert found.attention == pytest.approx(66 / 52 - 1)
    assert found.flops == pytest.approx((66 + 100) / (52 + 100) - 1)
    # Padded: 5 + 5 and 2, 8 and 1 + 1; 12 and 10 tokens, of which 20 are real.
    padded = balance(plan, lengths, packing=False)
    assert padded.padding == pytest.approx(2 / 22) and padded.tokens == pytest.approx(12 / 11 - 1)
    assert padded.attention == pytest.approx(66 / 60 - 1) and padded.micro_batch_tokens == pytest.approx(10 / 5.5 - 1)


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
    with pytest.raises(ValueError, match=r"cannot hold a sequence of 112 tokens \(100, in multiples of 16\)"):
        plan_micro_batches([5, 100], dp=1, budget_tokens=111, packing=packing, multiple=16)
    with pytest.raises(ValueError, match="groups of 2; use a multiple of 4 sequences"):
        plan_micro_batches([5, 5], dp=2, budget_tokens=99, packing=packing, count_multiple_of=2)
    with pytest.raises(ValueError, match="parallel.dp"):  # one rank needs two micro-batches, the other has one sequence
        plan_micro_batches([10, 10, 10], dp=2, budget_tokens=10, packing=packing)
