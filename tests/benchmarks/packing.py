"""Micro-batches of a long-tailed batch of responses: padding, balance over data-parallel ranks, planning time.

    python -m tests.benchmarks.packing [--dp 8] [--multiples 1 4 16 32 64] [--rounds 5]

lengths.json has 256 lengths of 10 to 16,384 tokens, 2,536 on average. They are drawn, not measured on a model:
numpy.random.default_rng(0).lognormal(log(1000), 1.5, 256), rounded down and cut to 10..16384; five are at the cap. A
minibatch is all 256, or one half of them, then the worse half in each column. The budget is a micro-batch's.

Padding is what rounding up to the multiple adds. An imbalance is the most loaded over the mean, minus 1: of DP ranks,
and in the column "piece" of all micro-batches' tokens (a response at the cap can fill one alone). FLOPs count linear
layers beside attention, in the shapes of Qwen2.5-1.5B and 7B. Targets: padding and tokens at most 3 %. Attention has
none: ranks of equal tokens differ by who has the longest responses. The second table compares, on the first so many
lengths, another way to spread them over ranks: largest differencing (Karmarkar and Karp, 1982).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from statistics import median

from megatron_apo.config import aligned
from megatron_apo.data.packing import balance, plan_micro_batches

LENGTHS: list[int] = json.loads((Path(__file__).parent / "lengths.json").read_text())["lengths"]
TARGET = 0.03
BUDGETS = (16384, 32768)
# Weights of the linear layers, output head included, over layers x heads x head size: see `balance`.
CROSSOVER_TOKENS = {"1.5B": 1.54e9 / (28 * 1536), "7B": 7.07e9 / (28 * 3584)}
COLUMNS = ("padding", "tokens", "attention", *(f"FLOPs {shape}" for shape in CROSSOVER_TOKENS), "piece")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dp", type=int, default=8)
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 4, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    half = len(LENGTHS) // 2
    minibatches = {half: [LENGTHS[:half], LENGTHS[half:]], len(LENGTHS): [LENGTHS]}
    print("lengths drawn from a lognormal distribution, not recorded from a model")
    print(f"DP {args.dp}; in brackets the fewest micro-batches that could hold the tokens")
    columns = "".join(f"{name:>12}" for name in COLUMNS)
    print(f"sequences  budget  multiple{columns}{'micro-batches':>15}{'ms':>7}")
    missed: list[str] = []
    for size, batches in minibatches.items():
        for budget in BUDGETS:
            for multiple in args.multiples:
                rows = [measure(lengths, args.dp, budget, multiple, args.rounds) for lengths in batches]
                worst = [max(column) for column in zip(*(shares for shares, _, _ in rows), strict=True)]
                _, counts, _ = max(rows, key=lambda row: row[1])
                text = "".join(f"{100 * share:>10.2f} %" for share in worst) + f"{'{} ({})'.format(*counts):>15}"
                print(f"{size:>9}{budget:>8}{multiple:>10}{text}{1e3 * max(time_s for _, _, time_s in rows):>7.1f}")
                missed += reasons(worst, batches, args.dp, f"{size} sequences, {budget}, multiple {multiple}", multiple)
    print("targets, padding and tokens at most 3 %: " + ("all met" if not missed else "missed"))
    print("\n".join(missed))
    print("sequences" + "".join(f"{f'{name}, {method}':>32}" for method in SPREADS for name in ("tokens", "attention")))
    for size, batches in minibatches.items():
        shares = [spread(lengths, args.dp) for spread in SPREADS.values() for lengths in batches[:1]]
        print(f"{size:>9}" + "".join(f"{100 * share:>30.3f} %" for pair in shares for share in pair))
    if missed:
        sys.exit(1)


def measure(
    lengths: list[int], dp: int, budget: int, multiple: int, rounds: int
) -> tuple[list[float], tuple[int, int], float]:
    """(shares of `COLUMNS`, (micro-batches, fewest there could be), seconds of a plan)"""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        plan = plan_micro_batches(lengths, dp=dp, budget_tokens=budget, packing=True, multiple=multiple)
        times.append(time.perf_counter() - start)
    found = balance(plan, lengths, multiple)
    flops = [balance(plan, lengths, multiple, crossover_tokens=tokens).flops for tokens in CROSSOVER_TOKENS.values()]
    fewest = -(-sum(aligned(length, multiple) for length in lengths) // (dp * budget))
    shares = [found.padding, found.tokens, found.attention, *flops, found.micro_batch_tokens]
    return shares, (found.micro_batches, fewest), median(times)


def reasons(worst: Sequence[float], batches: list[list[int]], dp: int, name: str, multiple: int) -> list[str]:
    """A line for each target that is missed."""
    found = []
    mean = min(sum(lengths) / len(lengths) for lengths in batches)
    if worst[0] > TARGET:
        found.append(f"{name}: padding {worst[0]:.1%}; half a multiple is {multiple / 2 / mean:.1%} of a mean length")
    if worst[1] > TARGET:
        longest, share = max(map(max, batches)), min(sum(lengths) / dp for lengths in batches)
        found.append(f"{name}: tokens {worst[1]:.1%}; a rank's share is {share:.0f}, the longest sequence {longest}")
    return found


def by_plan(lengths: list[int], dp: int) -> tuple[float, float]:
    """Imbalance of tokens and attention of the plan with one micro-batch for each rank."""
    plan = plan_micro_batches(lengths, dp=dp, budget_tokens=sum(lengths), packing=True)
    found = balance(plan, lengths)
    return found.tokens, found.attention


def by_largest_differencing(lengths: list[int], dp: int) -> tuple[float, float]:
    """The same where the two most uneven splits are joined, largest part to smallest, until one is left."""
    splits: list[tuple[int, int, list[tuple[int, list[int]]]]] = []
    number = count()  # settles ties
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        heappush(splits, (-lengths[index], next(number), [(lengths[index], [index]), *[(0, [])] * (dp - 1)]))
    while len(splits) > 1:
        (_, _, first), (_, _, second) = heappop(splits), heappop(splits)
        joined = [(a + b, left + right) for (a, left), (b, right) in zip(first, reversed(second), strict=True)]
        joined.sort(key=lambda part: -part[0])
        heappush(splits, (joined[-1][0] - joined[0][0], next(number), joined))
    found = balance([[members] for _, members in splits[0][2]], lengths)
    return found.tokens, found.attention


SPREADS = {"longest first": by_plan, "largest differencing": by_largest_differencing}

if __name__ == "__main__":
    main()
