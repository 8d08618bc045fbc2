"""Ranks wait for the driver as long as its own work takes, whatever a collective's timeout is."""

from __future__ import annotations

from pathlib import Path

from tests.dist.ranks import start_ranks


def test_work_of_the_driver_outlasts_the_timeout(tmp_path: Path) -> None:
    start_ranks("tests.dist.waiting_worker", tmp_path, "dp2")
    assert [(tmp_path / f"told{rank}").read_text() for rank in range(2)] == ["done", "done"]
    assert all((tmp_path / f"synced{rank}").read_text().endswith("not replaced: refused") for rank in range(2))
