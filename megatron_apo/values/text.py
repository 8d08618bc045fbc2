"""What a V* store holds, or in what two differ, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_apo.telemetry.units import number, with_error
from megatron_apo.values.summary import Bars, Comparison, Summary

NOT_BINARY = "Some rewards are not 0 or 1: Pass@k counts those of at least 1 as right."
_LEVELS = " ▁▂▃▄▅▆▇█"
_COLUMNS = 20  # of a histogram in a line
_EVERY_K = 16  # up to which Pass@k has a line for each k


def print_summary(found: Summary) -> None:
    """What `summarize` found."""
    console = Console()
    responses, first = found.responses, found.first_round
    facts = [
        ("prompts", f"{number(found.prompts)} in {number(found.shards)} shards"),
        ("samples", f"{found.samples} of each prompt, {number(responses.count)} in all"),
        ("mean reward", f"{with_error(found.reward.mean, found.reward.stderr)} (first {first} samples of each)"),
        ("left out by", ", ".join(f"{name} {left.share:.1%}" for name, left in found.left_out.items())),
        ("without V*", f"{number(found.without_value)} prompts"),
        (
            "response tokens",
            f"mean {responses.mean_tokens:.1f}, 50% {responses.p50}, 90% {responses.p90}, 99% {responses.p99}, "
            f"longest {responses.longest}",
        ),
        ("truncated", f"{responses.truncated:.2%} of responses"),
        ("unfinished thinking", f"{number(responses.num_unfinished)} responses"),
        ("grader failures", f"{number(responses.num_failures)} responses"),
        ("hours of its engines", ", ".join(f"{hours:.2f} {device}" for device, hours in found.hours.items())),
    ]
    _facts(console, f"V* store {found.folder}", facts)
    _pass_at_k(console, found)
    rows = [
        [f"{at.beta1:g}", *(f"{x:.3f}" for x in (at.mean, at.smallest, at.p10, at.p50, at.p90, at.largest))]
        + [_line(at.bars)]
        for at in found.values
    ]
    _table(
        console, f"V* by {found.estimator}", ("b1", "mean", "least", "10%", "50%", "90%", "most", "prompts"), rows, 7
    )
    _facts(console, "provenance", found.fingerprint.items())


def print_comparison(found: Comparison) -> None:
    """What `compare` found."""
    console = Console()
    in_both = f"{number(found.num_common)} in both"
    only = " and ".join(map(number, found.num_only))
    facts = [*zip(("first", "second"), found.folders, strict=True), ("prompts", f"{in_both}, {only} in one alone")]
    for name, ids, num in zip(("first", "second"), found.only, found.num_only, strict=True):
        if num:
            facts.append((f"only in the {name}", ", ".join(ids) + (" ..." if num > len(ids) else "")))
    if found.reward:
        facts.append(("mean reward", " | ".join(with_error(mean.mean, mean.stderr) for mean in found.reward)))
    if found.responses:
        facts.append(("response tokens", " | ".join(f"{side.mean_tokens:.1f}" for side in found.responses)))
        facts.append(("truncated", " | ".join(f"{side.truncated:.2%}" for side in found.responses)))
    changed = f"{number(found.num_rewards)} samples of {number(found.num_changed)} prompts"
    facts.append(("other rewards", changed if found.num_changed else "none"))
    facts.append(("the same rewards", "yes" if found.same_rewards else "no"))
    _facts(console, "two V* stores", facts)
    if found.values:
        rows = [
            (f"{at.beta1:g}", f"{at.mean_absolute:.4f}", f"{at.largest:.4f}")
            + ("undefined" if at.correlation is None else f"{at.correlation:.4f}",)
            for at in found.values
        ]
        head = ("b1", "mean |difference|", "largest", "correlation")
        _table(console, f"V* by {found.estimator}, prompts in both", head, rows)
    if found.most:
        rows = [
            (one.prompt_id, f"{one.difference:.4f}", " | ".join(map(_mean, one.mean_rewards)), str(one.num_rewards))
            for one in found.most
        ]
        _table(console, "prompts that differ most", ("prompt", "V* differs", "mean rewards", "other rewards"), rows)
    if found.fingerprint:
        fields = [(name, f"{mine} | {theirs}") for name, (mine, theirs) in found.fingerprint.items()]
        _facts(console, "provenance differs", fields)


def _mean(reward: float | None) -> str:
    return "masked" if reward is None else f"{reward:.3f}"


def _pass_at_k(console: Console, found: Summary) -> None:
    """At every k up to 16, then at powers of two and at the last k."""
    last = max(found.pass_at_k)
    listed = {k for k in found.pass_at_k if k <= _EVERY_K or k & (k - 1) == 0} | {found.first_round, last}
    shown = {k: at for k, at in found.pass_at_k.items() if k in listed}
    rows = [[str(k), with_error(at.mean, at.stderr), number(at.num_prompts)] for k, at in shown.items()]
    _table(console, "Pass@k", ("k", "Pass@k", "prompts"), rows)
    if last > found.first_round:
        console.print(f"Beyond {found.first_round}: of uncertain prompts alone, and biased by the stopping rule.")
    if not found.binary:
        console.print(NOT_BINARY)


def _line(bars: Bars) -> str:
    """A histogram in one line, from the smallest value to the largest."""
    at = np.array(bars.at)
    span = at[-1] - at[0] or 1.0
    column = np.rint((at - at[0]) / span * (_COLUMNS - 1)).astype(int)
    counts = np.bincount(column, bars.counts, _COLUMNS)
    # Something, however little, is not nothing.
    levels = np.ceil(counts / counts.max() * (len(_LEVELS) - 1)).astype(int)
    return "".join(_LEVELS[level] for level in levels)


def _facts(console: Console, title: str, rows: Iterable[tuple[str, object]]) -> None:
    """One line each, however long: hashes stay whole."""
    _heading(console, title)
    for name, value in rows:
        console.print(Text.assemble((f"{name:<21}", "dim"), str(value)), soft_wrap=True)


def _table(console: Console, title: str, head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 0) -> None:
    """Columns to the right, but for the column `left`."""
    _heading(console, title)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for place, name in enumerate(head):
        table.add_column(name, overflow="fold", justify="left" if place == left else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _heading(console: Console, title: str) -> None:
    console.print(Text(f"\n{title}", "bold"))
