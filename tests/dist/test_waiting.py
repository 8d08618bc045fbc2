"""Ranks wait for the driver as long as its own work takes, whatever a collective's timeout is."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_apo.weights.hf_io import HFReader
from tests.dist.ranks import start_ranks
from tests.dist.waiting_worker import MODEL
from tests.models import make_model


def test_work_of_the_driver_outlasts_the_timeout(tmp_path: Path) -> None:
    """It works alone, pauses a server, fails while it gathers, and writes a model that others hold part of."""
    make_model(MODEL, tmp_path)
    start_ranks("tests.dist.waiting_worker", tmp_path, "pp2")
    assert [(tmp_path / f"told{rank}").read_text() for rank in range(2)] == ["done"] * 2
    assert all((tmp_path / f"synced{rank}").read_text().endswith("not replaced: refused") for rank in range(2))
    # An error on the driver in the middle of gathering is every rank's, and leaves nothing under way for the next time.
    assert all("not be gathered: no memory" in (tmp_path / f"gathered{rank}").read_text() for rank in range(2))
    assert all((tmp_path / f"refused{rank}").read_text().endswith("not replaced: refused") for rank in range(2))
    written, expected = HFReader(tmp_path / "exported"), HFReader(tmp_path / MODEL)
    assert written.names() == expected.names()
    assert all(torch.equal(written.get(name), expected.get(name)) for name in expected.names())
