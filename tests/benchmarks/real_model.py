"""What runs of `launch/real_model.sh` came to, one for each seed, and their curve for the README.

python -m tests.benchmarks.real_model RUN [RUN ...] [--svg docs/real_model.svg]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib
import yaml
from matplotlib.figure import Figure

from megatron_apo.telemetry.metrics import read_metrics
from megatron_apo.telemetry.plots import smooth

PHASES = ("generate", "reference", "train", "optimizer", "sync")
RATES = ("tokens_per_s/generate", "tokens_per_s/train")
SETTLED = 2  # first steps, which warm up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--svg", type=Path)
    given = parser.parse_args()
    runs = {seed_of(run): read_metrics(run) for run in given.runs}
    for seed, rows in sorted(runs.items()):
        before, *between, after = evaluations(rows)
        told = "".join(f", step {row['step']} {with_error(row, 'avg_at_k')}" for row in between)
        print(
            f"seed {seed}: held-out {with_error(before, 'avg_at_k')} -> {with_error(after, 'avg_at_k')}, greedy "
            f"{with_error(before, 'greedy')} -> {with_error(after, 'greedy')}{told}"
        )
    gains = [after["eval/avg_at_k"] - before["eval/avg_at_k"] for before, *_, after in map(evaluations, runs.values())]
    if len(gains) > 1:
        print(f"gained: {fmean(gains):.3f} +- {stdev(gains) / math.sqrt(len(gains)):.3f} over {len(gains)} seeds")
    steps = [row for rows in runs.values() for row in rows if "loss" in row and row["step"] > SETTLED]
    parts = ", ".join(f"{phase} {mean(steps, f'time/{phase}_s'):.2f}" for phase in PHASES)
    print(f"a step: {mean(steps, 'time/step_s'):.1f} s ({parts}), mean of {len(steps)}")
    print(", ".join(f"{rate} {mean(steps, rate):.0f}" for rate in RATES))
    if given.svg:
        draw(runs, given.svg)


def seed_of(run: Path) -> int:
    return yaml.safe_load((run / "recipe.yaml").read_text())["run"]["seed"]


def evaluations(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "eval/avg_at_k" in row]


def with_error(row: dict[str, Any], name: str) -> str:
    return f"{row[f'eval/{name}']:.3f} +- {row[f'eval/{name}_stderr']:.3f}"


def mean(rows: list[dict[str, Any]], name: str) -> float:
    found = [row[name] for row in rows if row.get(name) is not None]
    return fmean(found) if found else math.nan


def draw(runs: dict[int, list[dict[str, Any]]], path: Path) -> None:
    """Training reward and held-out avg@k, a colour for each seed."""
    style = {"svg.fonttype": "none", "svg.hashsalt": "real model", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9, 3), layout="constrained")
        axes = figure.subplots()
        for color, (seed, rows) in zip(("#2f67c9", "#d1661c", "#21896a"), sorted(runs.items()), strict=False):
            trained, held_out = [row for row in rows if "reward/mean" in row], evaluations(rows)
            rewards = smooth([row["reward/mean"] for row in trained], 5)
            axes.plot([row["step"] for row in trained], rewards, color=color, alpha=0.5, linewidth=1)
            means, errors = ([row[f"eval/avg_at_k{end}"] for row in held_out] for end in ("", "_stderr"))
            at = [row["step"] for row in held_out]
            axes.errorbar(
                at, means, yerr=errors, color=color, marker="o", markersize=4, capsize=2, label=f"seed {seed}"
            )
        axes.set(xlabel="step", ylabel="share of right answers", ylim=(0, None))
        axes.grid(color="#e3e6ea", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", frameon=False, title="dots: held-out avg@4; thin: training, mean of 5 steps")
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
