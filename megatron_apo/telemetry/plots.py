"""Charts as inline SVG that take their colours and font from the page's CSS, so that one drawing serves light and dark.

matplotlib draws with placeholder colours; each is replaced by a CSS variable (--ink, --muted, --grid, --c1 ... --c7).
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

INK, MUTED, GRID = "#010101", "#010102", "#010103"
SERIES = [f"#01020{i}" for i in range(1, 8)]
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {c: f"--c{i}" for i, c in enumerate(SERIES, 1)}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "font.size": 8,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.left": False,
    "text.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "path.simplify_threshold": 0.5,
}

Line = tuple[Sequence[float], Sequence[float]]  # x and y
Points = tuple[Sequence[float], Sequence[float], Sequence[float]]  # x, y and standard error
Band = tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]  # x, y, lowest and highest


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Mean of the last `window` values at each place (fewer at the start)."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(0, stop - window)
    return (sums[stop] - sums[start]) / (stop - start)


def reward_chart(reward: Line, evaluations: Mapping[str, Points]) -> str:
    """Training reward of each step, its running mean, and evaluations with standard errors."""

    def draw(axes: Axes) -> None:
        steps, values = reward
        if len(steps):
            axes.plot(steps, values, color=SERIES[0], alpha=0.3, linewidth=0.8)
            axes.plot(steps, smooth(values, 10), color=SERIES[0], label="training reward, mean of 10 steps")
        for color, (name, (at, mean, error)) in zip(SERIES[1:], evaluations.items(), strict=False):
            axes.errorbar(at, mean, yerr=error, color=color, marker="o", markersize=3.5, capsize=2, label=name)
        axes.legend(loc="lower right")

    return _svg(draw, "reward by step", width=11.1, height=3.2)


def line_chart(
    title: str,
    lines: Mapping[str, Line],
    log: bool = False,
    percent: bool = False,
    x_label: str = "step",
    limits: Mapping[str, Line] | None = None,
) -> str:
    """One line for each name over steps, or over what `x_label` says. limits: what they are held against, dashed."""

    def draw(axes: Axes) -> None:
        for color, (name, (steps, values)) in zip(SERIES, lines.items(), strict=False):
            axes.plot(steps, values, color=color, label=name)
        for style, (name, (steps, values)) in zip(("--", ":"), (limits or {}).items(), strict=False):
            axes.plot(steps, values, color=MUTED, linestyle=style, linewidth=1.0, label=name)
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=min(0.0, *(float(np.min(values)) for _, values in lines.values())))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if len(lines) > 1 or limits:
            axes.legend(loc="best")

    return _svg(draw, title, x_label=x_label)


def band_chart(title: str, lines: Mapping[str, Points], x_label: str) -> str:
    """One line for each name in a band of one standard error, over whole numbers."""

    def draw(axes: Axes) -> None:
        for color, (name, (at, mean, error)) in zip(SERIES, lines.items(), strict=False):
            low, high = np.subtract(mean, error), np.add(mean, error)
            axes.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
            axes.plot(at, mean, color=color, label=name, marker="o", markersize=3)
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        if len(lines) > 1:
            axes.legend(loc="lower right")

    return _svg(draw, title, x_label=x_label)


def range_chart(title: str, lines: Mapping[str, Band], x_label: str) -> str:
    """One line for each name in a band from the lowest to the highest, of shares."""

    def draw(axes: Axes) -> None:
        for color, (name, (at, mean, low, high)) in zip(SERIES, lines.items(), strict=False):
            axes.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
            axes.plot(at, mean, color=color, label=name)
        axes.legend(loc="best")

    return _svg(draw, title, x_label=x_label)


def bar_chart(title: str, parts: Mapping[str, Mapping[str, float]]) -> str:
    """A bar for each name, of its parts in seconds."""
    names = list(dict.fromkeys(part for of in parts.values() for part in of))
    colors = {name: SERIES[place % len(SERIES)] for place, name in enumerate(names)}

    def draw(axes: Axes) -> None:
        left = np.zeros(len(parts))
        for place, name in enumerate(names):
            widths = np.array([max(0.0, of.get(name, 0.0)) for of in parts.values()])
            fades = 1.0 if place < len(SERIES) else 0.5
            axes.barh(list(parts), widths, left=left, color=colors[name], alpha=0.85 * fades, label=name)
            left += widths
        axes.invert_yaxis()
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3)

    return _svg(draw, title, height=1.6 + 0.3 * len(parts), x_label="seconds")


def stacked_chart(title: str, steps: Sequence[float], parts: Mapping[str, Sequence[float]]) -> str:
    """Parts of a whole over steps, each a running mean of five so that single slow steps do not hide the rest."""

    def draw(axes: Axes) -> None:
        layers = [smooth(values, 5) for values in parts.values()]
        axes.stackplot(steps, layers, colors=SERIES[: len(parts)], labels=list(parts), alpha=0.85, linewidth=0)
        axes.margins(x=0)
        axes.set_ylabel("seconds")
        axes.set_ylim(0, 1.35 * max(np.sum(layers, axis=0)))  # room for the legend
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="upper right", ncols=3)

    return _svg(draw, title, height=2.8)


def histogram(
    title: str, at: Sequence[float], counts: Sequence[int], mean: float | None, x_label: str, y_label: str
) -> str:
    """A bar of height `counts` at each of `at`, which ascend; the mean, if given, is marked."""

    def draw(axes: Axes) -> None:
        # Where two values are all but the same, their bars would be too thin to see.
        width = max(0.8 * min(np.diff(at), default=1.0), 0.008 * (at[-1] - at[0]))
        axes.bar(at, counts, width, color=SERIES[0], alpha=0.85)
        axes.set_ylabel(y_label)
        if mean is not None:
            label = f"mean {mean:,.0f}" if mean >= 1000 else f"mean {mean:.3g}"
            axes.axvline(mean, color=SERIES[1], linewidth=1.4, label=label)
            axes.legend(loc="best")

    return _svg(draw, title, x_label=x_label)


def _svg(
    draw: Callable[[Axes], None], title: str, width: float = 5.4, height: float = 2.3, x_label: str = "step"
) -> str:
    """Draw on one pair of axes and return an <svg> element that is as wide as its container."""
    # Element ids are hashes of the salt: without one of its own, two charts of a page share clip paths.
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        axes.tick_params(length=0)
        axes.set_xlabel(x_label)
        if x_label == "step":
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # inside HTML an <svg> needs none
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--font)", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text
