"""Which sequences share a micro-batch, and on which data-parallel rank.

The result depends only on lengths; it changes what is computed together, never what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence


def plan_micro_batches(lengths: Sequence[int], *, dp: int, budget_tokens: int, packing: bool) -> list[list[list[int]]]:
    """Plan[dp_rank][micro_batch] = indices into `lengths`: each index once, every rank equally many micro-batches.

    packing: tokens of a micro-batch are the sum of its lengths; otherwise longest x count. Neither exceeds the budget.
    Raises ValueError when one sequence alone does, or where dp does not divide their number and no such plan is found.
    """
    longest = max(lengths)
    if longest > budget_tokens:
        raise ValueError(f"train.tokens_per_micro_batch: {budget_tokens} cannot hold a sequence of {longest} tokens")
    if len(lengths) < dp:
        raise ValueError(f"parallel.dp: {dp} ranks for {len(lengths)} sequences leaves ranks without work; lower it")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    per_rank = _spread(order, lengths, dp)
    split = _pack if packing else _pad
    fewest = -(-sum(lengths) // (dp * budget_tokens))
    for num_bins in range(fewest, len(lengths) // dp + 1):
        _give_each_at_least(num_bins, per_rank, lengths)
        plans = [split(rank_order, lengths, num_bins, budget_tokens) for rank_order in per_rank]
        if all(plan is not None for plan in plans):
            return [plan for plan in plans if plan is not None]
    # Cannot happen where dp divides the number of sequences: one sequence a micro-batch fits then.
    raise ValueError("parallel.dp: sequences are too few and too uneven to give every rank the same micro-batches")


def _spread(order: Sequence[int], lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Longest first, each to the bin with the fewest tokens (then the fewest sequences)."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens = [0] * num_bins
    for index in order:
        target = min(range(num_bins), key=lambda b: (tokens[b], len(bins[b]), b))
        bins[target].append(index)
        tokens[target] += lengths[index]
    return bins


def _give_each_at_least(count: int, per_rank: Sequence[list[int]], lengths: Sequence[int]) -> None:
    """Move shortest sequences from the ranks with the most to those with fewer than `count`. Enough exist for all."""
    while len(poorest := min(per_rank, key=len)) < count:
        poorest.append(max(per_rank, key=len).pop())
        poorest.sort(key=lambda index: (-lengths[index], index))


def _pack(order: list[int], lengths: Sequence[int], num_bins: int, budget: int) -> list[list[int]] | None:
    bins = _spread(order, lengths, num_bins)
    return bins if all(sum(lengths[i] for i in members) <= budget for members in bins) else None


def _pad(order: list[int], lengths: Sequence[int], num_bins: int, budget: int) -> list[list[int]] | None:
    """`order` is longest first, so that neighbours are alike: cut it where the padded size is balanced."""
    bins: list[list[int]] = []
    position = 0
    for bin_index in range(num_bins):
        remaining_bins = num_bins - bin_index
        share = sum(lengths[i] for i in order[position:]) / remaining_bins
        end = position + 1
        while end < len(order) - (remaining_bins - 1) and lengths[order[position]] * (end + 1 - position) <= share:
            end += 1
        if bin_index == num_bins - 1:
            end = len(order)
        if lengths[order[position]] * (end - position) > budget:
            return None
        bins.append(order[position:end])
        position = end
    return bins
