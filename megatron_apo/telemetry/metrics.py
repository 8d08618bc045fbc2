"""A run's numbers: RUN/metrics.jsonl, one JSON object a line; the same in RUN/tensorboard and Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from megatron_apo.telemetry.weights_and_biases import WandBRun

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends rows {"step", "time" (unix seconds), name: number, ...}; each line is on disk before `log` returns.

    A value that is not finite is written as null, JSON having no word for it. Use as a context manager.

    wandb: a Weights & Biases project that gets them too, with `config` as the run's settings. last_step: the run goes
    on after this step. What a killed run wrote of later steps is removed, and a row of this step that is there already
    (the last evaluation of a run that was killed at its end) is not written again, so that nothing is there twice.
    """

    def __init__(
        self,
        run_dir: Path,
        tensorboard: bool,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
        last_step: int = 0,
    ):
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / FILE_NAME
        kept = [row for row in read_metrics(run_dir) if last_step and row["step"] <= last_step]
        _write_rows(path, kept)
        self._written = {(row["step"], _kind(row)) for row in kept}
        self._file = path.open("a", buffering=1)
        self._tensorboard: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # imports torch: only where it is asked for

            self._tensorboard = SummaryWriter(
                str(run_dir / "tensorboard"), purge_step=last_step + 1 if last_step else 0
            )
        self._wandb = WandBRun(run_dir, wandb, config or {}, resumed=last_step > 0) if wandb else None

    def log(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Write one row. Values are Python or NumPy numbers, or tensors of one element."""
        if (step, _kind(values)) in self._written:
            return
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}, allow_nan=False) + "\n")
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()  # what a resumed run counts on must be there
        if self._wandb is not None:
            self._wandb.log(step, numbers)

    def close(self, failed: bool = False) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close(failed)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(failed=kind is not None)


def own_seconds(row: Mapping[str, Any], name: str) -> float:
    """What a phase, by its name in metrics.jsonl, took of its step: phases of a step add up. A streamed step's
    generation runs beside others; what it takes by itself is `wait`, which has a name of its own."""
    return 0.0 if name == "time/generate_s" and "time/wait_s" in row else row.get(name) or 0.0


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run in the order written, without a line cut short by a kill; [] where there is no file."""
    path = run_dir / FILE_NAME
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _kind(row: Mapping[str, Any]) -> str:
    """What a row is of, such as a training step or an evaluation: its first name."""
    return next((name for name in row if name not in ("step", "time")), "")


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the file, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    os.replace(partial, path)
