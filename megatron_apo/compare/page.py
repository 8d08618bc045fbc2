"""OUT/compare.html: one page, without outside assets, of what a comparison has found so far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_apo.compare import text
from megatron_apo.compare.campaign import Campaign
from megatron_apo.compare.plan import Plan, Setting
from megatron_apo.compare.results import Line
from megatron_apo.runtime.files import write_whole
from megatron_apo.telemetry import page, plots

FILE_NAME = "compare.html"
_POINTS = 60  # of a curve


def write_page(campaign: Campaign, found: dict[Setting, list[Line]]) -> Path:
    """Write the page and return its path."""
    plan, sections = campaign.plan, []
    for setting, lines in found.items():
        body = page.table("Results", *text.turned(*text.headline(plan, lines)), wide=True)
        body += "".join(page.note(line) for line in text.notes(plan, setting, lines))
        body += _curves(plan, lines) + _phases(lines)
        for title, table in (("Trials of learning rates", text.trials(lines)), ("Every run", text.runs(lines))):
            body += page.table(title, *table, wide=True) if table[1] else ""
        sections.append(page.section(setting, body))
    methods = ", ".join(method.label for method in plan.methods)
    seeds = ", ".join(map(str, plan.seeds))
    path = campaign.out / FILE_NAME
    name = campaign.out.resolve().name
    write_whole(path, page.document(name, "comparison", f"{methods} · seeds {seeds}", sections))
    return path


def _curves(plan: Plan, lines: Sequence[Line]) -> str:
    """Reward by what was spent."""
    blocks, responses = "", plan.recipe["train"]["target_responses"]
    for title, spent in (
        ("by step", lambda line, curve: [float(step) for step in range(1, len(curve.seconds) + 1)]),
        ("by seconds of steps", lambda line, curve: curve.seconds),
        ("by seconds, stage 1 counted", lambda line, curve: [line.stage_1.seconds + s for s in curve.seconds]),
        ("by samples, without stage 1", lambda line, curve: [float(count) for count in curve.samples]),
    ):
        points = {}
        for line in lines:
            ended = [run.measured.curve for run in line.runs if run.failure is None]
            curves = [(spent(line, curve), curve) for curve in ended if curve.seconds]
            if curves:
                points[line.label] = band([(at, c.smoothed(line.window)) for at, c in curves])
        if points:
            chart = plots.range_chart(f"training reward {title}", points, title.removeprefix("by "))
            caption = (
                f"Mean of at least {responses} responses, in the first steps of fewer; the band is from the lowest to "
                "the highest seed, as far as all seeds go. Runs that failed are left out."
            )
            blocks += page.figure(chart, caption, title=f"training reward {title}")
    return blocks


def band(curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> plots.Band:
    """Of seeds' (x, y): x, mean, lowest and highest, as far as all of them go; between points as a line goes."""
    start, end = max(at[0] for at, _ in curves), min(at[-1] for at, _ in curves)
    grid = np.linspace(start, max(start, end), _POINTS)
    value_SX = np.array([np.interp(grid, at, values) for at, values in curves])
    return grid.tolist(), value_SX.mean(0).tolist(), value_SX.min(0).tolist(), value_SX.max(0).tolist()


def _phases(lines: Sequence[Line]) -> str:
    blocks = ""
    for kind, title in (("wall_s", "wall seconds of a run"), ("cpu_s", "CPU seconds of a run")):
        parts = {line.label: getattr(line, kind) for line in lines if line.runs}
        if parts:
            blocks += page.figure(plots.bar_chart(title, parts), "Means over seeds.", title=title)
            blocks += page.table(f"{title}, by phase", *text.phases(lines, kind))
    return blocks
