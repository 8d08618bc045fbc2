"""Weights & Biases takes a copy of the numbers: it learns how a run ended, and ends none itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_apo.telemetry.metrics import MetricsWriter


class WandB(ModuleType):
    """A run of it, whose disk is full from step `full_from` on."""

    class Error(Exception):
        pass

    def __init__(self, full_from: int = 10**9):
        super().__init__("wandb")
        self.full_from = full_from
        self.steps: list[int] = []
        self.codes: list[int] = []

    def init(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(log=self._log, finish=lambda exit_code=0: self.codes.append(exit_code))

    def _log(self, row: dict[str, float], step: int) -> None:
        if step >= self.full_from:
            raise OSError("No space left\non device")
        self.steps.append(step)


def test_a_run_that_failed_is_shown_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = WandB()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with MetricsWriter(tmp_path / "good", tensorboard=False, wandb="apo"):
        pass
    with pytest.raises(KeyError), MetricsWriter(tmp_path / "bad", tensorboard=False, wandb="apo"):
        raise KeyError
    assert wandb.codes == [0, 1]


def test_what_it_cannot_write_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = WandB(full_from=2)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with MetricsWriter(tmp_path, tensorboard=False, wandb="apo") as metrics:
        for step in (1, 2, 3):
            metrics.log(step, {"loss": 0.5})
    assert wandb.steps == [1]
    assert capsys.readouterr().out == "telemetry.wandb: has no rows from step 2 on: No space left on device\n"
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
