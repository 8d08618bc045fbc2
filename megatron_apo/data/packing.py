"""Which sequences share a micro-batch, and on which data-parallel rank; how even the work then is.

The result depends only on lengths; it changes what is computed together, never what is computed. A length is the number
of positions that a sequence takes in the model; laid out, it is rounded up to `multiple` (see `padded_lengths`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_apo.config import aligned

Plan = list[list[list[int]]]  # [dp_rank][micro_batch] = indices of sequences

_FILLER = 256  # tokens of a sequence of padding: attention to a long one would cost its square


def padded_lengths(
    lengths: Sequence[int], *, packing: bool, multiple: int = 1, fill_to: int = 0, fill_multiple: int = 1
) -> list[int]:
    """Positions that the sequences of a micro-batch take, and after them those of sequences of padding alone.

    Each takes a multiple of `multiple`, and without packing as many as the longest. Packed ones are followed by padding
    up to `fill_to` positions at least, and a multiple of `fill_multiple`; `multiple` divides both.
    """
    found = [aligned(length, multiple) for length in lengths]
    if not packing:
        return [max(found)] * len(found)
    missing = aligned(max(sum(found), fill_to), fill_multiple) - sum(found)
    whole, rest = divmod(missing, aligned(_FILLER, multiple))
    return found + [aligned(_FILLER, multiple)] * whole + [rest] * (rest > 0)


def plan_micro_batches(
    lengths: Sequence[int],
    *,
    dp: int,
    budget_tokens: int,
    packing: bool,
    multiple: int = 1,
    count_multiple_of: int = 1,
) -> Plan:
    """Plan[dp_rank][micro_batch] = indices into `lengths`: each index once, every rank equally many micro-batches.

    packing: tokens of a micro-batch are the sum of its aligned lengths; otherwise longest x count. Neither exceeds the
    budget. A rank's micro-batches are a multiple of `count_multiple_of`, and the fewest for which a plan is found.
    Raises ValueError when one sequence alone exceeds the budget, or where dp x count_multiple_of does not divide the
    number of sequences and no such plan is found.
    """
    if len(lengths) < dp:
        raise ValueError(f"parallel.dp: {dp} ranks for {len(lengths)} sequences leaves ranks without work; lower it")
    sizes = [aligned(length, multiple) for length in lengths]
    if max(sizes) > budget_tokens:
        raise ValueError(
            f"train.tokens_per_micro_batch: {budget_tokens} cannot hold a sequence of {max(sizes)} tokens"
            + (f" ({max(lengths)}, in multiples of {multiple})" if multiple > 1 else "")
        )
    per_rank = _spread(_longest_first(lengths), sizes, [0] * dp)
    split = _pack if packing else _pad
    fewest = aligned(-(-sum(sizes) // (dp * budget_tokens)), count_multiple_of)
    for num_bins in range(fewest, len(lengths) // dp + 1, count_multiple_of):
        _give_each_at_least(num_bins, per_rank, lengths)
        plans = [split(rank_order, sizes, num_bins, budget_tokens) for rank_order in per_rank]
        if all(plan is not None for plan in plans):
            return [plan for plan in plans if plan is not None]
    # Cannot happen where the number of sequences divides: one sequence a micro-batch fits then.
    groups = f" in groups of {count_multiple_of}" if count_multiple_of > 1 else ""
    raise ValueError(
        f"parallel.dp: {len(lengths)} sequences are too few and too uneven to give each of {dp} ranks the same number "
        f"of micro-batches{groups}; use a multiple of {dp * count_multiple_of} sequences"
    )


def plan_wave(
    lengths: Sequence[int], tokens: Sequence[int], *, budget_tokens: int, packing: bool, multiple: int = 1
) -> Plan:
    """As `plan_micro_batches`, of sequences that are a part of a minibatch, the rest of which is computed apart.

    tokens: what each rank has of the minibatch already, which is evened out. A rank gets the fewest micro-batches that
    hold its own, which may be none. Each sequence must fit into one.
    """
    sizes = [aligned(length, multiple) for length in lengths]
    split = _pack if packing else _pad
    return [_fewest(own, sizes, budget_tokens, split) for own in _spread(_longest_first(lengths), sizes, tokens)]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    """By true lengths: sequences that differ only within the alignment must not be told apart by their index."""
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


_Split = Callable[[list[int], Sequence[int], int, int], list[list[int]] | None]


def _fewest(order: list[int], sizes: Sequence[int], budget: int, split: _Split) -> list[list[int]]:
    """One rank's micro-batches."""
    least = -(-sum(sizes[index] for index in order) // budget)
    plans = (split(order, sizes, number, budget) for number in range(least, len(order) + 1))
    return next(plan for plan in plans if plan is not None)


def _spread(order: Sequence[int], sizes: Sequence[int], begun: Sequence[int]) -> list[list[int]]:
    """Longest first, each to the bin with the fewest tokens (then the fewest sequences). begun: what bins have already.

    Largest differencing (Karmarkar and Karp, 1982) evens out tokens that are even already, and attention, which grows
    with the square of a length, less: it does not deal out the longest ones first (tests/benchmarks/packing.py).
    """
    bins: list[list[int]] = [[] for _ in begun]
    tokens = list(begun)
    for index in order:
        target = min(range(len(bins)), key=lambda b: (tokens[b], len(bins[b]), b))
        bins[target].append(index)
        tokens[target] += sizes[index]
    return bins


def _give_each_at_least(count: int, per_rank: Sequence[list[int]], lengths: Sequence[int]) -> None:
    """Move shortest sequences from the ranks with the most to those with fewer than `count`. Enough exist for all."""
    while len(poorest := min(per_rank, key=len)) < count:
        poorest.append(max(per_rank, key=len).pop())
        poorest.sort(key=lambda index: (-lengths[index], index))


def _pack(order: list[int], sizes: Sequence[int], num_bins: int, budget: int) -> list[list[int]] | None:
    bins = _spread(order, sizes, [0] * num_bins)
    return bins if all(sum(sizes[i] for i in members) <= budget for members in bins) else None


def _pad(order: list[int], sizes: Sequence[int], num_bins: int, budget: int) -> list[list[int]] | None:
    """`order` is longest first, so that neighbours are alike: cut it where the padded size is balanced."""
    bins: list[list[int]] = []
    position = 0
    for bin_index in range(num_bins):
        remaining_bins = num_bins - bin_index
        share = sum(sizes[i] for i in order[position:]) / remaining_bins
        end = position + 1
        while end < len(order) - (remaining_bins - 1) and sizes[order[position]] * (end + 1 - position) <= share:
            end += 1
        if bin_index == num_bins - 1:
            end = len(order)
        if sizes[order[position]] * (end - position) > budget:
            return None
        bins.append(order[position:end])
        position = end
    return bins


@dataclass(frozen=True)
class Balance:
    """How evenly a plan spreads its work. An imbalance is the largest share over the mean share, minus 1."""

    micro_batches: int  # of a DP rank, at most
    padding: float  # part of the tokens laid out that is padding
    tokens: float  # imbalance over DP ranks of the tokens laid out
    attention: float  # imbalance over DP ranks of attention's FLOPs, which grow with the square of a length
    flops: float  # imbalance over DP ranks of all FLOPs
    micro_batch_tokens: float  # imbalance over the micro-batches of all ranks of the tokens laid out


def balance(
    plan: Plan,
    lengths: Sequence[int],
    multiple: int = 1,
    *,
    packing: bool = True,
    fill_to: int = 0,
    fill_multiple: int = 1,
    crossover_tokens: float = 0.0,
) -> Balance:
    """What `plan`, made by `plan_micro_batches` for the same arguments, costs with `padded_lengths`, and how evenly.

    crossover_tokens: the length at which a sequence's linear layers cost as much as its attention. For causal attention
    that is (weights of the linear layers) / (layers x heads x head size); 0 leaves `flops` to attention alone.
    """
    rules: dict[str, Any] = {
        "packing": packing,
        "multiple": multiple,
        "fill_to": fill_to,
        "fill_multiple": fill_multiple,
    }
    per_rank = [[padded_lengths([lengths[index] for index in members], **rules) for members in rank] for rank in plan]
    micro_tokens = [[sum(micro) for micro in rank] for rank in per_rank]
    tokens = [sum(rank) for rank in micro_tokens]
    attention = [sum(size**2 for micro in rank for size in micro) for rank in per_rank]
    real = sum(lengths[index] for rank in plan for members in rank for index in members)
    return Balance(
        micro_batches=max(map(len, plan)),
        padding=1 - real / sum(tokens),
        tokens=_imbalance(tokens),
        attention=_imbalance(attention),
        flops=_imbalance([a + crossover_tokens * t for a, t in zip(attention, tokens, strict=True)]),
        micro_batch_tokens=_imbalance([size for rank in micro_tokens for size in rank]),
    )


def _imbalance(shares: Sequence[float]) -> float:
    return max(shares) * len(shares) / sum(shares) - 1
