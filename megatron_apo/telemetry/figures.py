"""Figures of a run's metrics by step, as pieces of a page. Rows are those of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_apo.telemetry import page, plots

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Figure:
    """lines: what they are called -> the metric's name. beside: the same, of what they are held against."""

    title: str
    lines: Mapping[str, str]
    percent: bool = False
    beside: Mapping[str, str] = field(default_factory=dict)


def series(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it has a (finite) value."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def found(rows: Rows, names: Mapping[str, str]) -> dict[str, plots.Line]:
    """The lines of those that have a value."""
    lines = {label: series(rows, name) for label, name in names.items()}
    return {label: line for label, line in lines.items() if line[0]}


def named(names: Iterable[str], part: int = -1) -> dict[str, str]:
    """Lines that are called as a part of the metric's name."""
    return {name.split("/")[part].replace("_", " "): name for name in names}


def line_figure(rows: Rows, figure: Figure, log: bool = False) -> str:
    """What it shows, or that it is missing."""
    lines = found(rows, figure.lines)
    if not lines:
        return page.missing(f"{figure.title}: nothing in metrics.jsonl")
    beside = found(rows, figure.beside)
    chart = plots.line_chart(figure.title, lines, log=log, percent=figure.percent, limits=beside)
    return page.figure(chart, "", title=figure.title)


def told_figures(rows: Rows, figures: Iterable[Figure], told: Set[str]) -> str:
    """Those of which something changes from step to step, and in a table what does not.

    told: the names that should be there, of which it is said that they are missing. Of others nothing is said.
    """
    blocks, missing = "", []
    same: dict[str, float] = {}
    for figure in figures:
        values = {name: series(rows, name)[1] for name in figure.lines.values()}
        constant = {name: of[0] for name, of in values.items() if of and min(of) == max(of)}
        changing = {label: name for label, name in figure.lines.items() if values[name] and name not in constant}
        same |= constant
        if changing:
            blocks += line_figure(rows, replace(figure, lines=changing))
        elif not constant and told & values.keys():
            missing.append(figure.title)
    if same:
        table = [(name, f"{value:.4g}") for name, value in same.items()]
        blocks += page.table("The same in every step", ("metric", "value"), table)
    return blocks + (page.missing(f"{'; '.join(missing)}: nothing in metrics.jsonl") if missing else "")
