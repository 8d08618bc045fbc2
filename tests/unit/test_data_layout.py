"""A batch as every rank's micro-batches: what each rank can compute of it, and what is reported of its padding."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_apo.config import FP8Config, ParallelConfig, Recipe, build_recipe
from megatron_apo.data.batch import IGNORE, MicroBatch
from megatron_apo.data.layout import make_micro_batches, plan_batch
from megatron_apo.data.sequences import Sequences

# Tokens that a rank makes FP8 and gathers: Transformer Engine's `assert_dim_for_fp8_exec` and `is_quantizable`.
LOCAL = {None: 1, "tensorwise": 8, "mxfp8": 32, "blockwise": 128}
# Tokens of a context-parallel rank, over which the product for a weight's gradient sums.
GATHERED = {None: 1, "tensorwise": 16, "mxfp8": 32, "blockwise": 16}


def recipe_of(parallel: ParallelConfig, fp8: str | None = None, packing: bool = True) -> Recipe:
    recipe = build_recipe({}, ["model.path=m", "data.train=t", "vstar.dir=v", "model.dtype=bf16"])
    recipe.parallel, recipe.train.packing = parallel, packing
    recipe.model.fp8 = FP8Config.model_validate({"recipe": fp8}) if fp8 else None
    return recipe


def batch_of(lengths: list[int]) -> Sequences:
    """Prompts and responses that take so many positions; each token is its sequence's number."""
    prompts = [[i] * (1 + n // 3) for i, n in enumerate(lengths)]
    return Sequences.of(prompts, [[i] * (n - n // 3) for i, n in enumerate(lengths)])


def width(micro: MicroBatch) -> int:
    return micro.input_BS.numel()


@settings(deadline=None, max_examples=150)
@given(
    fp8=st.sampled_from(list(LOCAL)),
    tp=st.sampled_from([1, 2, 3, 4, 8]),
    cp=st.integers(1, 4),
    dp=st.integers(1, 3),
    pp=st.integers(1, 3),
    interleaved=st.booleans(),
    sequence_parallel=st.booleans(),
    packing=st.booleans(),
    count=st.integers(1, 4),
    room=st.floats(1, 4),
    seed=st.integers(0, 2**31),
)
def test_every_rank_can_compute_its_share(
    fp8, tp, cp, dp, pp, interleaved, sequence_parallel, packing, count, room, seed
):
    vpp = 2 if interleaved and pp > 1 and packing else 1
    parallel = ParallelConfig(tp=tp, cp=cp, dp=dp, pp=pp, vpp=vpp, sequence_parallel=sequence_parallel)
    recipe = recipe_of(parallel, fp8, packing)
    draw = random.Random(seed)
    lengths = [1 + int(699 * draw.random() ** 4) for _ in range(2 * dp * pp * count)]
    sequences = batch_of(lengths)
    # The least that the recipe's own check lets through, or more.
    multiple = recipe.micro_batch_alignment
    budget = recipe.train.tokens_per_micro_batch = int(room * -(-max(lengths) // multiple) * multiple)
    plan = plan_batch(recipe, sequences, num_minibatches=2, dp=dp)
    half = len(lengths) // 2
    batch = [range(half), range(half, len(lengths))]
    replicas = [sequences.select(plan.rows_of(replica)) for replica in range(dp)]  # each has its own rows alone
    of_replica = [plan.micro_batches(part, replica) for replica, part in enumerate(replicas)]
    found = [[minibatches[index] for minibatches in of_replica] for index in range(2)]
    ranks_of_a_sequence = tp if sequence_parallel else 1
    for rows, per_rank in zip(batch, found, strict=True):
        assert sorted(i for micro in sum(per_rank, []) for i in micro.indices) == list(rows)
        assert len({len(micro) for micro in per_rank}) == 1 and len(per_rank[0]) % parallel.micro_batch_group == 0
    every = [micro for per_rank in found for own in per_rank for micro in own]
    for micro in every:
        assert width(micro) <= budget
        assert all(length % ((2 * cp if cp > 1 else 1) * ranks_of_a_sequence) == 0 for length in micro.lengths)
        share, rest = divmod(width(micro), cp)
        assert rest == 0 and share % GATHERED[fp8] == 0
        # Blocks have to be whole where ranks gather them.
        local = 8 if fp8 == "blockwise" and not sequence_parallel else LOCAL[fp8]
        assert share // ranks_of_a_sequence % local == 0
        # Padding has no label, and every token of a response has its own.
        wanted = [token for i in micro.indices for token in sequences.response(i)]
        assert micro.label_BS[micro.label_BS != IGNORE].tolist() == wanted
        assert len(micro.sequence_R) == len(wanted)
    if vpp > 1:
        assert len({width(micro) for micro in every}) == 1, "one schedule runs the denominator of all minibatches"
    padded = [sum(width(micro) for own in per_rank for micro in own) for per_rank in found]
    real = [sum(lengths[row] for row in rows) for rows in batch]
    padding = max(1 - mine / all_ for mine, all_ in zip(real, padded, strict=True))
    assert plan.metrics()["layout/padding"] == pytest.approx(padding)


def test_a_packed_micro_batch_is_filled_up_once_not_each_sequence():
    # Four ranks share a sequence in 4 x 2 x 2 = 16 parts, and FP8 wants 16 tokens on each of 8 ranks.
    parallel = ParallelConfig(tp=4, cp=2, sequence_parallel=True)
    recipe = recipe_of(parallel, "tensorwise")
    plan = plan_batch(recipe, batch_of([20, 30, 40]))
    ((micro,),) = plan.micro_batches(batch_of([20, 30, 40]), 0)
    assert micro.lengths == (48, 32, 32, 16)  # longest first: 112, and 16 to make it 128
    assert plan.metrics()["layout/padding"] == pytest.approx(1 - 90 / 128)


def test_interleaved_micro_batches_are_as_long_as_the_longest_of_all_minibatches():
    parallel = ParallelConfig(pp=2, vpp=2)
    recipe = recipe_of(parallel)
    lengths = [30, 10, 5, 5]  # two minibatches, each of two micro-batches
    plan = plan_batch(recipe, batch_of(lengths), num_minibatches=2)
    first, second = plan.micro_batches(batch_of(lengths), 0)
    assert [micro.lengths for micro in first + second] == [(30,), (10, 20), (5, 25), (5, 25)]
    found = plan.metrics()
    assert found["layout/padding"] == pytest.approx(50 / 60)  # of the second minibatch
    assert found["layout/micro_batch_imbalance"] == 0
    # A batch that is no rollout batch is laid out by itself.
    alone = make_micro_batches(recipe, batch_of([5, 7]))
    assert {micro.lengths for micro in alone} == {(7,), (5, 2)}


def grouped(lengths: list[int], groups: list[int], budget: int, dp: int = 1, tp: int = 1):
    """The plan of a second minibatch where groups are to be together, and whether it splits one. The first minibatch,
    of the same lengths, is planned as if there were no groups."""
    recipe = recipe_of(ParallelConfig(tp=tp, sequence_parallel=tp > 1))
    recipe.train.tokens_per_micro_batch = budget
    both, of_both = lengths * 2, [number + len(lengths) * part for part in range(2) for number in groups]
    plan, alone = (
        plan_batch(recipe, batch_of(both), num_minibatches=2, dp=dp, groups=each) for each in (of_both, None)
    )
    assert plan.plans[0] == alone.plans[0]
    rows = [[row - len(lengths) for row in sorted(members)] for rank in plan.plans[1] for members in rank]
    return sorted(rows), plan.splits_groups(1, of_both)


def test_a_group_is_together_where_a_micro_batch_holds_it():
    assert grouped([6, 3, 4, 3], [0, 0, 1, 1], 9) == ([[0, 1], [2, 3]], False)
    # By length alone 6 + 4 and 3 + 3 would fit as well.
    assert grouped([6, 3, 4, 3], [0, 0, 1, 1], 10) == ([[0, 1], [2, 3]], False)
    # Of 10 and 3 no micro-batch of 12 holds both: a forward pass has to be made, and the others are packed by length.
    rows, is_split = grouped([10, 3, 6, 3, 6, 3], [0, 0, 1, 1, 2, 2], 12)
    assert is_split and len(rows) == 3 and [0] in rows


def test_a_group_fits_with_its_padding():
    """On two sequence-parallel ranks 5 + 5 tokens take 6 + 6."""
    assert grouped([5, 5], [0, 0], 12, tp=2) == ([[0, 1]], False)
    assert grouped([5, 5], [0, 0], 10, tp=2) == ([[0], [1]], True)
    assert grouped([5, 5, 3, 3], [0, 0, 1, 1], 18, tp=2) == ([[0, 1], [2, 3]], False)  # 12 and 8 of 18


def test_groups_are_nothing_to_padded_micro_batches():
    recipe = recipe_of(ParallelConfig(), packing=False)
    recipe.train.tokens_per_micro_batch = 12
    both = [
        plan_batch(recipe, batch_of([6, 3, 6, 3] * 2), num_minibatches=2, groups=groups).plans
        for groups in ([0, 0, 1, 1, 2, 2, 3, 3], None)
    ]
    assert both[0] == both[1] and sorted(map(sorted, both[0][1][0])) == [[4], [5, 7], [6]]


def test_too_few_groups_for_all_replicas_are_split():
    assert grouped([5, 5], [0, 0], 12, dp=2) == ([[0], [1]], True)


def test_no_sequences_and_unequal_minibatches_are_refused():
    recipe = recipe_of(ParallelConfig())
    with pytest.raises(ValueError, match="0 sequences"):
        make_micro_batches(recipe, batch_of([]))
    with pytest.raises(AssertionError, match="7 sequences do not divide into 2 minibatches"):
        plan_batch(recipe, batch_of([5] * 7), num_minibatches=2)
