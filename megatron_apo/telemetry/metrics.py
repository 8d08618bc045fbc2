"""A run's numbers: RUN/metrics.jsonl, one JSON object a line, and the same in RUN/tensorboard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends rows {"step", "time" (unix seconds), name: number, ...}; each line is on disk before `log` returns.

    A value that is not finite is written as null, JSON having no word for it. Use as a context manager.
    """

    def __init__(self, run_dir: Path, tensorboard: bool):
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / FILE_NAME
        _end_last_line(path)
        self._file = path.open("a", buffering=1)
        self._tensorboard: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # imports torch: only where it is asked for

            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Write one row. Values are Python or NumPy numbers, or tensors of one element."""
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}, allow_nan=False) + "\n")
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run in the order written, without a line cut short by a kill; [] where there is no file.

    A resumed run writes some steps again: of rows with the same step and the same names the last one counts.
    """
    path = run_dir / FILE_NAME
    if not path.is_file():
        return []
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        key = (row["step"], *sorted(row))
        rows.pop(key, None)
        rows[key] = row
    return list(rows.values())


def _end_last_line(path: Path) -> None:
    """Give a file that a kill left in the middle of a line its newline, so that the next row stands alone."""
    if path.is_file() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
