"""A run's numbers: RUN/metrics.jsonl, one JSON object a line; the same in RUN/tensorboard and Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, SupportsFloat

FILE_NAME = "metrics.jsonl"


def wandb_problems(project: str | None) -> list[str]:
    """What keeps a run from writing to its Weights & Biases project, one line each."""
    try:
        if project is not None:
            metadata.version("wandb")
    except metadata.PackageNotFoundError:
        return [
            f"telemetry.wandb: {project} needs the package wandb, which is not installed; run "
            "pip install 'megatron-apo[wandb]', or remove the key"
        ]
    return []


class MetricsWriter:
    """Appends rows {"step", "time" (unix seconds), name: number, ...}; each line is on disk before `log` returns.

    A value that is not finite is written as null, JSON having no word for it. Use as a context manager.
    `wandb`: a Weights & Biases project that gets them too, with `config` as the run's settings.
    """

    def __init__(
        self, run_dir: Path, tensorboard: bool, wandb: str | None = None, config: Mapping[str, Any] | None = None
    ):
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / FILE_NAME
        _end_last_line(path)
        self._file = path.open("a", buffering=1)
        self._tensorboard: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # imports torch: only where it is asked for

            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"))
        self._wandb: Any = _start_wandb(run_dir, wandb, config or {}) if wandb else None

    def log(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Write one row. Values are Python or NumPy numbers, or tensors of one element."""
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}, allow_nan=False) + "\n")
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._send(step, numbers)

    def _send(self, step: int, numbers: Mapping[str, float]) -> None:
        """To Weights & Biases, until that fails: a copy of the numbers is not worth the run."""
        try:
            self._wandb.log(numbers, step=step)
        except Exception as error:
            self._wandb = None
            print(f"telemetry.wandb: has no rows from step {step} on: {' '.join(str(error).split())}", flush=True)

    def close(self, failed: bool = False) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(**{"exit_code": 1} if failed else {})

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(failed=kind is not None)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run in the order written, without a line cut short by a kill; [] where there is no file.

    A resumed run writes some steps again: of rows with the same step and the same first name the last one counts.
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
        key = (row["step"], *[name for name in row if name not in ("step", "time")][:1])
        rows.pop(key, None)
        rows[key] = row
    return list(rows.values())


def _start_wandb(run_dir: Path, project: str, config: Mapping[str, Any]) -> Any:
    """A run of that project, by way of RUN/wandb; where its server or the key to it is missing, it is kept there.

    A resumed run is another of the same group.
    """
    import wandb  # optional: only where it is asked for

    run: dict[str, Any] = {
        "project": project,
        "group": run_dir.name,
        "config": dict(config),
        "dir": str(run_dir),
        "settings": {"console": "off"},  # it would catch what the process writes to the terminal
    }
    # Without a key it would ask for one at a terminal, while other ranks wait (errors/term.py, `can_use_terminput`).
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        return wandb.init(**run)
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        print(f"telemetry.wandb: offline, in {run_dir / 'wandb'}, to be sent by `wandb sync`: {reason}", flush=True)
        return wandb.init(mode="offline", **run)


def _end_last_line(path: Path) -> None:
    """Give a file that a kill left in the middle of a line its newline, so that the next row stands alone."""
    if path.is_file() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
