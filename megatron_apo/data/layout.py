"""A batch of sequences as micro-batches, by the recipe's rules: packing, token budget, alignment, their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_apo.config import Recipe
from megatron_apo.data.batch import MicroBatch, make_micro_batch
from megatron_apo.data.packing import Plan, balance, laid_out, plan_micro_batches
from megatron_apo.parallel.topology import Topology


def lay_out(
    recipe: Recipe,
    topology: Topology,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    rows: range | None = None,
    spread: bool = True,
) -> list[MicroBatch]:
    """This rank's micro-batches of the sequences `rows`, one of `minibatches` (none: all of them), on its device.

    spread: over the data-parallel replicas; otherwise each has all of them. The micro-batches' `indices` count from the
    first of `prompts`, whatever `rows` is. Raises `ValueError` as `plan_micro_batches` does.
    """
    # The last token is a label alone.
    lengths = [len(prompt) + len(response) - 1 for prompt, response in zip(prompts, responses, strict=True)]
    dp = topology.dp if spread else 1
    batch = [range(len(lengths))] if rows is None else minibatches(recipe, len(lengths))
    plan = _plan(recipe, lengths, batch[0] if rows is None else rows, dp)
    rules = _rules(recipe, lengths, batch, dp)
    own = plan[topology.dp_rank if spread else 0]
    return [make_micro_batch(indices, prompts, responses, **rules).to(topology.device) for indices in own]


def minibatches(recipe: Recipe, num_sequences: int) -> list[range]:
    """Which of a rollout batch's sequences each optimizer step is made of."""
    size, rest = divmod(num_sequences, recipe.train.minibatches)
    assert not rest, f"{num_sequences} sequences do not divide into train.minibatches={recipe.train.minibatches}"
    return [range(first, first + size) for first in range(0, num_sequences, size)]


def balance_metrics(recipe: Recipe, lengths: Sequence[int]) -> dict[str, float]:
    """How evenly the work of a rollout batch is spread, of the minibatch for which that is worst (see `Balance`).

    lengths: positions of its sequences in the model.
    """
    batch, dp = minibatches(recipe, len(lengths)), recipe.parallel.dp
    rules = _rules(recipe, lengths, batch, dp)
    found = [balance(_plan(recipe, lengths, rows, dp), lengths, **rules) for rows in batch]
    return {
        "layout/micro_batches": max(one.micro_batches for one in found),
        "layout/padding": max(one.padding for one in found),
        "layout/token_imbalance": max(one.tokens for one in found),
        "layout/micro_batch_imbalance": max(one.micro_batch_tokens for one in found),
        "layout/attention_imbalance": max(one.attention for one in found),
    }


def _plan(recipe: Recipe, lengths: Sequence[int], rows: range, dp: int) -> Plan:
    """By indices into `lengths`."""
    train, multiple = recipe.train, recipe.micro_batch_alignment
    plan = plan_micro_batches(
        [lengths[row] for row in rows],
        dp=dp,
        budget_tokens=train.tokens_per_micro_batch // multiple * multiple,  # so that it holds them filled up
        packing=train.packing,
        multiple=recipe.alignment,
        count_multiple_of=recipe.parallel.micro_batch_group,
    )
    return [[[rows[index] for index in members] for members in rank] for rank in plan]


def _rules(recipe: Recipe, lengths: Sequence[int], batch: Sequence[range], dp: int) -> dict[str, Any]:
    """Arguments of `laid_out` for every micro-batch of `batch`, the parts of a batch that one schedule may run at once.

    The interleaved schedule takes micro-batches of one length, the longest one's; it runs the anchor on all of them.
    """
    rules: dict[str, Any] = {
        "packing": recipe.train.packing,
        "multiple": recipe.alignment,
        "fill_multiple": recipe.micro_batch_alignment,
    }
    if recipe.parallel.vpp > 1:
        micro = [members for rows in batch for rank in _plan(recipe, lengths, rows, dp) for members in rank]
        rules["fill_to"] = max(sum(laid_out([lengths[i] for i in members], **rules)) for members in micro)
    return rules
