"""A batch of sequences as micro-batches, by the recipe's rules: packing, token budget, alignment, their number.

plan = plan_batch(recipe, sequences, num_minibatches=2, dp=4)

waves = WavePlanner(recipe, num_rows, num_minibatches=2, dp=4)     # of a batch that comes in waves
plan = waves.plan(rows, sequences) ..
plan = waves.whole
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from megatron_apo.config import Recipe, aligned
from megatron_apo.data.batch import MicroBatch, make_micro_batch
from megatron_apo.data.packing import Plan, balance, padded_lengths, plan_micro_batches, plan_wave
from megatron_apo.data.sequences import Sequences


@dataclass(frozen=True)
class BatchPlan:
    """Which micro-batch of which data-parallel replica each sequence is in; a function of lengths, and of groups.

    plans: of each minibatch, [replica][micro-batch] = rows of the batch. rules: how `make_micro_batch` lays them out.
    """

    lengths: Sequence[int]  # positions that each sequence takes in the model
    plans: Sequence[Plan]
    rules: dict[str, Any]

    def rows_of(self, replica: int) -> list[int]:
        """The sequences that a replica computes, ascending."""
        return sorted(row for plan in self.plans for members in plan[replica] for row in members)

    def micro_batches(self, sequences: Sequences, replica: int) -> list[list[MicroBatch]]:
        """A replica's micro-batches of each minibatch, in host memory; `sequences` must hold the replica's rows."""
        return [
            [make_micro_batch(members, sequences, **self.rules) for members in plan[replica]] for plan in self.plans
        ]

    def splits_groups(self, minibatch: int, groups: Sequence[int]) -> bool:
        """Whether a group has rows in several micro-batches of a minibatch. groups: each row's."""
        parts = [{groups[row] for row in members} for rank in self.plans[minibatch] for members in rank]
        return sum(map(len, parts)) > len(set().union(*parts))

    def metrics(self) -> dict[str, float]:
        """How evenly the work is spread, of the minibatch for which that is worst (see `Balance`)."""
        found = [balance(plan, self.lengths, **self.rules) for plan in self.plans]
        return {
            "layout/micro_batches": max(one.micro_batches for one in found),
            "layout/padding": max(one.padding for one in found),
            "layout/token_imbalance": max(one.tokens for one in found),
            "layout/micro_batch_imbalance": max(one.micro_batch_tokens for one in found),
            "layout/attention_imbalance": max(one.attention for one in found),
        }


def plan_batch(
    recipe: Recipe,
    sequences: Sequences,
    *,
    num_minibatches: int = 1,
    dp: int = 1,
    groups: Sequence[int] | None = None,
) -> BatchPlan:
    """Plan a batch for so many minibatches and replicas. Raises `ValueError` as `plan_micro_batches` does.

    groups: of each row, where a loss couples a group's. Those of a later minibatch then share a micro-batch, if all of
    the minibatch's groups fit into one: otherwise it takes a forward pass all the same. In the first one, where all
    log-ratios are 0, nothing is gained by it.

    Minibatches are equal parts of the batch, in its order. The interleaved schedule takes micro-batches of one length,
    and runs the reference on those of all minibatches at once: all are filled up to the longest one's.
    """
    lengths = sequences.positions_B.tolist()
    size, rest = divmod(len(lengths), num_minibatches)
    assert not rest, f"{len(lengths)} sequences do not divide into {num_minibatches} minibatches"
    parts = [range(index * size, (index + 1) * size) for index in range(num_minibatches)]
    plans = [_plan(recipe, lengths, rows, dp, groups if number else None) for number, rows in enumerate(parts)]
    rules = _rules(recipe)
    if recipe.parallel.vpp > 1:
        micro = [members for plan in plans for rank in plan for members in rank]
        rules["fill_to"] = max(sum(padded_lengths([lengths[row] for row in members], **rules)) for members in micro)
    return BatchPlan(lengths, plans, rules)


def make_micro_batches(recipe: Recipe, sequences: Sequences, *, dp: int = 1, replica: int = 0) -> list[MicroBatch]:
    """The micro-batches of a batch that is one minibatch; by default each replica computes all of it."""
    (micro_batches,) = plan_batch(recipe, sequences, dp=dp).micro_batches(sequences, replica)
    return micro_batches


class WavePlanner:
    """Plans a batch of `num_rows` sequences that comes in waves, which need not hold some of each minibatch.

    A row's minibatch is the one that `plan_batch` gives it, however long it is and whenever it comes. Its replica
    is the one that has the fewest tokens of the minibatch so far. Replicas may have different numbers of micro-batches.
    """

    def __init__(self, recipe: Recipe, num_rows: int, *, num_minibatches: int, dp: int):
        assert num_rows % num_minibatches == 0, f"{num_rows} rows do not divide into {num_minibatches} minibatches"
        self._recipe = recipe
        self._size = num_rows // num_minibatches
        # Each replica needs work in each minibatch: fewer groups than replicas are split.
        self._keeps_groups = self._size // recipe.objective.samples_per_prompt >= dp
        self._lengths = [0] * num_rows
        self._plans: list[Plan] = [[[] for _ in range(dp)] for _ in range(num_minibatches)]  # of the batch's rows
        self._tokens = [[0] * dp for _ in range(num_minibatches)]  # of each replica's sequences, aligned

    def plan(self, rows: Sequence[int], sequences: Sequences, *, groups: Sequence[int] | None = None) -> BatchPlan:
        """Of a wave: `sequences` are the batch's `rows`, by whose place here its plan names them. groups: as above."""
        lengths, plans = sequences.positions_B.tolist(), []
        for row, length in zip(rows, lengths, strict=True):
            assert not self._lengths[row], f"row {row} came before"
            self._lengths[row] = length
        for minibatch, (whole, tokens) in enumerate(zip(self._plans, self._tokens, strict=True)):
            own = [place for place, row in enumerate(rows) if row // self._size == minibatch]
            plan = _plan_wave(self._recipe, lengths, own, tokens, groups if minibatch and self._keeps_groups else None)
            for replica, micro_batches in enumerate(plan):
                whole[replica] += [[rows[place] for place in members] for members in micro_batches]
                tokens[replica] += sum(aligned(lengths[p], self._recipe.alignment) for m in micro_batches for p in m)
            plans.append(plan)
        return BatchPlan(lengths, plans, _rules(self._recipe))

    @property
    def whole(self) -> BatchPlan:
        """Of the batch, all of whose rows have come."""
        assert all(self._lengths), f"{self._lengths.count(0)} rows did not come"
        return BatchPlan(self._lengths, self._plans, _rules(self._recipe))


def _rules(recipe: Recipe) -> dict[str, Any]:
    return {
        "packing": recipe.train.packing,
        "multiple": recipe.alignment,
        "fill_multiple": recipe.micro_batch_alignment,
    }


def _budget(recipe: Recipe) -> int:
    """Tokens of a micro-batch, so that it holds them filled up."""
    return recipe.train.tokens_per_micro_batch // recipe.micro_batch_alignment * recipe.micro_batch_alignment


def _plan(recipe: Recipe, lengths: Sequence[int], rows: range, dp: int, groups: Sequence[int] | None) -> Plan:
    """[replica][micro-batch] = rows of the batch."""

    def plan(items: Sequence[Sequence[int]], sizes: Sequence[int]) -> Plan:
        found = plan_micro_batches(
            sizes,
            dp=dp,
            budget_tokens=_budget(recipe),
            packing=recipe.train.packing,
            multiple=recipe.alignment,
            count_multiple_of=recipe.parallel.micro_batch_group,
        )
        return _rows_of(found, items)

    if together := _together(recipe, rows, lengths, groups):
        with suppress(ValueError):  # too few of them for all ranks
            return plan(together, _sizes(together, lengths, recipe.alignment))
    return plan([[row] for row in rows], [lengths[row] for row in rows])


def _plan_wave(
    recipe: Recipe, lengths: Sequence[int], rows: Sequence[int], tokens: Sequence[int], groups: Sequence[int] | None
) -> Plan:
    """[replica][micro-batch] = rows of the wave, of which these are in one minibatch."""
    items, sizes = [[row] for row in rows], [lengths[row] for row in rows]
    if together := _together(recipe, rows, lengths, groups):
        items, sizes = together, _sizes(together, lengths, recipe.alignment)
    found = plan_wave(
        sizes, tokens, budget_tokens=_budget(recipe), packing=recipe.train.packing, multiple=recipe.alignment
    )
    return _rows_of(found, items)


def _rows_of(plan: Plan, items: Sequence[Sequence[int]]) -> Plan:
    """A plan of items, as one of their rows."""
    return [[[row for item in members for row in items[item]] for members in rank] for rank in plan]


def _sizes(items: Sequence[Sequence[int]], lengths: Sequence[int], multiple: int) -> list[int]:
    """Tokens that items of several sequences take."""
    return [sum(aligned(lengths[row], multiple) for row in item) for item in items]


def _together(
    recipe: Recipe, rows: Sequence[int], lengths: Sequence[int], groups: Sequence[int] | None
) -> list[list[int]]:
    """The rows of each group, where a micro-batch holds any of them; nothing where one is too long."""
    if groups is None or not recipe.train.packing:
        return []
    members: dict[int, list[int]] = {}
    for row in rows:
        members.setdefault(groups[row], []).append(row)
    found = list(members.values())
    return found if max(_sizes(found, lengths, recipe.alignment), default=0) <= _budget(recipe) else []
