"""Engines that start before the ranks have imported anything heavy, where the recipe alone says that they may."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_apo import preflight
from megatron_apo.config import Recipe, build_recipe
from megatron_apo.rollout import early as early_file
from megatron_apo.rollout.early import begun_early
from megatron_apo.rollout.engines import Engines
from megatron_apo.rollout.fleet import Fleet
from megatron_apo.runtime.job import Job
from megatron_apo.runtime.machine import Machine
from megatron_apo.stages import start as start_file
from tests.engines import until
from tests.runs import write_run, write_store
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


@pytest.mark.parametrize("is_waited_for", [False, True])  # before there are ranks, as for stage 1
def test_engines_are_begun_once_and_stopped_whatever_happens(
    is_waited_for: bool,
    start: Any,  # noqa: F811
    http: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(early_file, "visible_gpus", list)
    recipe = start()._recipe
    with pytest.raises(ZeroDivisionError), begun_early(recipe, JOB) as fleet:
        assert fleet is not None
        until(lambda: fleet.answering)
        if is_waited_for:
            fleet.finish_starts()
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
    for make in ("to_be_synced", "of"):
        monkeypatch.setattr(Fleet, make, lambda *_: pytest.fail("an engine was begun"))
    for at_start in ("false", "true"):
        recipe = build_recipe({}, ["model.path=m", "data.train=t", f"vstar.at_start={at_start}", *overrides])
        with begun_early(recipe, job) as fleet:
            assert fleet is None


def test_they_begin_with_nobodys_weights() -> None:
    """A first sync that brings nothing would pass unseen otherwise."""
    fleet = Fleet.to_be_synced(build_recipe({}, ["model.path=m", "data.train=t", "rollout.replicas=2"]))
    assert [engine.server.load_format for engine in fleet.engines] == ["dummy", "dummy"]  # type: ignore[attr-defined]


def at_start(folder: Path, *overrides: str) -> Recipe:
    """A recipe whose store is not there."""
    recipe = write_run(folder, "vstar.at_start=true", *overrides)
    shutil.rmtree(recipe.vstar.dir)
    return recipe


@pytest.mark.parametrize(
    ("overrides", "is_there", "load_format"),
    [([], False, "auto"), ([], True, "dummy"), (["objective.name=grpo"], False, "dummy")],
)
def test_where_training_begins_with_stage_1_they_have_the_references_weights(
    overrides: list[str], is_there: bool, load_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = at_start(tmp_path, *overrides)
    if is_there:
        write_store(recipe)
    recipe = build_recipe(recipe.model_dump(), ["model.reference=elsewhere"])
    monkeypatch.setattr(early_file, "visible_gpus", list)
    monkeypatch.setattr(Fleet, "begin_starts", lambda fleet, engines: None)
    with begun_early(recipe, JOB) as fleet:
        assert fleet is not None
        (server,) = [engine.server for engine in fleet.engines]
        assert server.load_format == load_format and fleet.has_weights == (load_format == "auto")  # type: ignore
        assert server.model == (recipe.model.reference_path if fleet.has_weights else recipe.model.path)  # type: ignore
        fleet.serve_no_longer()
        assert server.load_format == "dummy"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("overrides", "gpus", "says"),
    [
        (["rollout.placement=dedicated", "rollout.driver=127.0.0.1:29600"], [], "rollout.placement: dedicated"),
        (["rollout.sleep_while_training=true"], [], "rollout.sleep_while_training: true"),
        ([], [(9, 0)], "CUDA_VISIBLE_DEVICES: there are GPUs"),
    ],
)
def test_a_training_that_cannot_begin_with_stage_1_is_one_line(
    overrides: list[str], gpus: list[tuple[int, int]], says: str, tmp_path: Path
) -> None:
    recipe = at_start(tmp_path)
    recipe = build_recipe(recipe.model_dump(), overrides)
    machine = replace(Machine.here(), gpus=tuple(gpus), gpu_memory_bytes=(2**36,) * len(gpus))
    (line,) = [line for line in preflight.problems(recipe, "train", machine) if line.startswith("vstar.at_start")]
    assert line.startswith(f"vstar.at_start: true, but {says}") and line.endswith("; run estimate-vstar before")


def test_a_training_may_begin_with_stage_1_and_without_a_store_may_not(tmp_path: Path) -> None:
    recipe = at_start(tmp_path)
    assert preflight.problems(recipe, "train") == []
    (line,) = preflight.problems(build_recipe(recipe.model_dump(), ["vstar.at_start=false"]), "train")
    assert "manifest.json" in line


def test_later_ranks_wait_for_the_store_of_rank_0_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_file, "visible_gpus", list)
    recipe, second = at_start(tmp_path), replace(JOB, rank=1)
    for other in (replace(second, launched=False), replace(second, num_nodes=2)):  # whose rank 0 fills none
        start_file._stage_1_at_start(recipe, other, None)
    start_file._stage_1_at_start(recipe, replace(JOB, launched=False), None)
    later = threading.Thread(target=start_file._stage_1_at_start, args=(recipe, second, None))
    later.start()
    later.join(1.0)
    assert later.is_alive()
    write_store(recipe)
    later.join(20.0)
    assert not later.is_alive()


def test_engines_without_the_references_weights_fill_no_store(tmp_path: Path) -> None:
    """Also where the store is gone since they have begun."""
    recipe = at_start(tmp_path)
    start_file._stage_1_at_start(recipe, JOB, Fleet.to_be_synced(recipe))
    assert not recipe.vstar.dir.exists()
