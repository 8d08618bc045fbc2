"""Engines that start before the ranks have imported anything heavy, where the recipe alone says that they may."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_apo.config import build_recipe
from megatron_apo.rollout import early as early_file
from megatron_apo.rollout.early import begun_early
from megatron_apo.rollout.engines import Engines
from megatron_apo.rollout.fleet import Fleet
from megatron_apo.runtime.job import Job
from tests.engines import until
from tests.unit.test_imports import HEAVY
from tests.unit.test_rollout_sharing import http, one_rank, start  # noqa: F401 (fixtures)

JOB = Job(rank=0, world_size=2, master_address="127.0.0.1", master_port=1, launched=True)


TRAINS = """
import sys
from contextlib import contextmanager
from megatron_apo.config import build_recipe
from megatron_apo.stages import start

@contextmanager
def begun(recipe, job):
    sys.exit(" ".join({name.partition(".")[0] for name in sys.modules}))
    yield

start.begun_early = begun
start.train(build_recipe({}, ["model.path=m", "data.train=t", f"run.dir={sys.argv[1]}"]))
"""


def test_a_rank_begins_them_before_it_imports_anything_heavy(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRAINS, str(tmp_path)]
    asked = subprocess.run(command, env=os.environ | JOB.variables(), capture_output=True, text=True)
    imported = set(asked.stderr.split())
    assert "megatron_apo" in imported and not HEAVY & imported, asked.stderr


def test_engines_are_begun_once_and_stopped_whatever_happens(
    start: Any,  # noqa: F811
    http: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(early_file, "visible_gpus", list)
    recipe = start()._recipe
    with pytest.raises(ZeroDivisionError), begun_early(recipe, JOB) as fleet:
        assert fleet is not None
        until(lambda: fleet.answering)
        with Engines(recipe, one_rank(), fleet) as engines:
            assert engines.fleet is fleet
            with start(engines=engines) as rollouts:
                rollouts.sync(0)
        before = http.stops
        1 / 0  # noqa: B018
    assert http.events.count("start") == 1 and http.stops == before + 1


@pytest.mark.parametrize(
    ("job", "overrides", "gpus"),
    [
        (replace(JOB, rank=1), [], []),
        (replace(JOB, launched=False), [], []),  # nothing has checked the recipe
        (replace(JOB, num_nodes=2), [], []),
        (JOB, ["rollout.placement=dedicated", "rollout.driver=127.0.0.1:29600"], []),
        (JOB, ["train.replay=somewhere"], []),
        (JOB, [], [(9, 0)]),
        (JOB, ["rollout.sleep_while_training=true"], []),  # engines with a Python of their own may see GPUs
    ],
)
def test_where_more_must_be_known_none_are_begun(
    monkeypatch: pytest.MonkeyPatch, job: Job, overrides: list[str], gpus: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(early_file, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(Fleet, "to_be_synced", lambda recipe: pytest.fail("an engine was begun"))
    recipe = build_recipe({}, ["model.path=m", "data.train=t", *overrides])
    with begun_early(recipe, job) as fleet:
        assert fleet is None


def test_they_begin_with_nobodys_weights() -> None:
    """A first sync that brings nothing would pass unseen otherwise."""
    fleet = Fleet.to_be_synced(build_recipe({}, ["model.path=m", "data.train=t", "rollout.replicas=2"]))
    assert [engine.server.load_format for engine in fleet.engines] == ["dummy", "dummy"]  # type: ignore[attr-defined]
