"""What the ranks' GPUs did over a run, as pieces of a page (`gpu.py` says what the metrics are)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from megatron_apo.telemetry import page, plots

_NAME = re.compile(r"gpu/rank(\d+)/(\w+)")
_CHARTS = {  # field: title, unit
    "utilization": ("utilization", 1.0),
    "power_w": ("power, W", 1.0),
    "memory_bytes": ("memory, GB", 1e9),
    "temperature_c": ("temperature, °C", 1.0),
}
_COLUMNS: dict[str, tuple[str, Callable[[Sequence[float]], str]]] = {  # field: title, what is said of its values
    "energy_j": ("energy, kJ", lambda values: f"{sum(values) / 1e3:,.1f}"),
    "throttled_power": ("slowed by power", lambda values: f"{fmean(values):.1%}"),
    "throttled_thermal": ("by heat", lambda values: f"{fmean(values):.1%}"),
    "throttled_hardware": ("by hardware", lambda values: f"{fmean(values):.1%}"),
    "ecc_corrected": ("ECC corrected", lambda values: f"{sum(values):,.0f}"),
    "ecc_uncorrected": ("uncorrected", lambda values: f"{sum(values):,.0f}"),
    "xid_events": ("Xid", lambda values: f"{sum(values):,.0f}"),
}


def gpu_figures(rows: Sequence[Mapping[str, Any]]) -> str:
    """Charts of the lowest, mean and highest rank by step, and a table of the ranks; nothing where no GPU was."""
    by_step: defaultdict[str, defaultdict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    by_rank: defaultdict[int, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for name, value in row.items():
            if (match := _NAME.fullmatch(name)) and value is not None:
                by_step[match[2]][row["step"]].append(value)
                by_rank[int(match[1])][match[2]].append(value)
    blocks = ""
    for field, (title, unit) in _CHARTS.items():
        if steps := by_step.get(field):
            lines = {
                name: (list(steps), [of(values) / unit for values in steps.values()])
                for name, of in (("lowest", min), ("mean", fmean), ("highest", max))
            }
            blocks += page.figure(plots.line_chart(f"GPU {title}", lines), "", title=f"GPU {title}, by rank")
    if by_rank:
        head = ("rank", *(title for title, _ in _COLUMNS.values()))
        body = [
            (str(rank), *(tell(found[field]) if field in found else "" for field, (_, tell) in _COLUMNS.items()))
            for rank, found in sorted(by_rank.items())
        ]
        blocks += page.table("GPUs over the run", head, body, wide=True)
    return blocks
