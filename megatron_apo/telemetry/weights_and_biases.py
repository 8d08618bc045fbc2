"""A copy of a run's numbers in Weights & Biases. It is worth no run: what fails here is said once, and left."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

STATE_NAME = "wandb-run.json"  # which run of theirs this is, and the last step of each kind of row that it was sent


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


class WandBRun:
    """A run of the project, by way of RUN/wandb; where its server or the key to it is missing, it is kept there.

    A resumed run goes on in the one that it began. What was handed over before a kill is not handed over again: they
    take nothing back. They send it by themselves, so that a kill may lose their last rows; metrics.jsonl has them.
    Offline, each start leaves a folder of its own with the same id, for `wandb sync --append` in their order.
    """

    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any], resumed: bool):
        self._path = run_dir / STATE_NAME
        self._sent: dict[str, int] = {}
        run_id = uuid.uuid4().hex
        if resumed and self._path.is_file():
            state = json.loads(self._path.read_text())
            run_id, self._sent = state["id"], state["sent"]
        self._id = run_id
        self._run: Any = _start(run_dir, project, config, run_id)
        self._save()

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """One row of metrics.jsonl. Rows of a kind begin with the same name."""
        kind = next(iter(numbers), "")
        if self._run is None or step <= self._sent.get(kind, -1):
            return
        try:
            self._run.log(dict(numbers), step=step)
        except Exception as error:
            self._run = None
            print(f"telemetry.wandb: has no rows from step {step} on: {' '.join(str(error).split())}", flush=True)
            return
        self._sent[kind] = step
        self._save()

    def close(self, failed: bool) -> None:
        if self._run is not None:
            self._run.finish(**{"exit_code": 1} if failed else {})

    def _save(self) -> None:
        partial = self._path.with_name(f".{STATE_NAME}.partial")
        partial.write_text(json.dumps({"id": self._id, "sent": self._sent}))
        os.replace(partial, self._path)


def _start(run_dir: Path, project: str, config: Mapping[str, Any], run_id: str) -> Any:
    import wandb  # optional: only where it is asked for

    run: dict[str, Any] = {
        "project": project,
        "group": run_dir.name,
        "id": run_id,
        "resume": "allow",
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
