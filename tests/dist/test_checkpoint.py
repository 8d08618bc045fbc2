"""A resumed run is the run that was never interrupted: bit for bit in its own layout, to rounding in another.

Real ranks train on fixed batches (checkpoint_worker.py): four steps at once, or two, then two more in new processes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_apo.config import RecipeError
from megatron_apo.learner.checkpoint import RECORD, check_resume, latest, next_step, read_record
from megatron_apo.learner.damage import DamagedCheckpoint
from megatron_apo.weights.files import write_list
from tests.dist.checkpoint_worker import SKIPPED, TOTAL_STEPS, recipe_of
from tests.dist.ranks import start_ranks
from tests.dist.test_layouts import TOLERANCE
from tests.models import make_model

LAYOUTS = ["pp2", "dp2"]
FULL_LAYOUTS = ["tp1", "tp2", "tp2-pp2", "pp2-dp2"]
ALL_LAYOUTS = LAYOUTS + [pytest.param(layout, marks=pytest.mark.full) for layout in FULL_LAYOUTS]
# saved at, loaded at
RESHARDINGS = [("pp2", "tp2"), pytest.param("dp2", "tp2", marks=pytest.mark.full)]
RESHARDINGS += [pytest.param("tp2", "pp2", marks=pytest.mark.full)]
RESHARDINGS += [pytest.param("tp2-pp2", "tp1", marks=pytest.mark.full)]


class Runs:
    """Each layout's runs, made once. `saved` trains straight in one run folder, and to step 2 in another."""

    def __init__(self, work: Path):
        self.work = work
        self._saved: set[str] = set()

    def straight(self, layout: str) -> dict:
        self._save(layout)
        return self.load(f"straight-{layout}")

    def resumed(self, saved_at: str, layout: str) -> dict:
        """Steps 3 and 4, in new processes."""
        self._save(saved_at)
        name = f"{saved_at}-to-{layout}"
        shutil.copytree(self.work / f"half-{saved_at}", self.work / name)
        start_ranks("tests.dist.checkpoint_worker", self.work, layout, f"{name}:4:0:{name}")
        return self.load(name)

    def half(self, layout: str) -> Path:
        """A run folder with one checkpoint, of step 2."""
        self._save(layout)
        return self.work / f"half-{layout}"

    def _save(self, layout: str) -> None:
        if layout not in self._saved:
            name = layout
            runs = [f"straight-{name}:4:0:straight-{name}", f"half-{name}:2:2:half-{name}"]
            start_ranks("tests.dist.checkpoint_worker", self.work, layout, *runs)
            self._saved.add(layout)

    def load(self, name: str) -> dict:
        return torch.load(self.work / f"{name}.pt", weights_only=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    work = tmp_path_factory.mktemp("checkpoints")
    make_model("qwen3-tied", work / "models")
    make_model("qwen3-tied", work / "references", seed=1)
    (work / "vstar").mkdir()
    (work / "vstar" / "manifest.json").write_text("{}")
    return Runs(work)


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_resume_is_bitwise(layout, runs):
    straight, resumed = runs.straight(layout), runs.resumed(layout, layout)
    assert (straight["start"], resumed["start"]) == (0, 2)
    assert resumed["skipped"] == 1 and straight["losses"][SKIPPED] != straight["losses"][SKIPPED]
    assert resumed["losses"] == straight["losses"][2:]
    assert resumed["first_mismatches"] == straight["mismatches"][:2] and resumed["mismatches"] == straight["mismatches"]
    assert len(set(straight["mismatches"])) == TOTAL_STEPS
    assert resumed["lr"] == straight["lr"][2:] and len(set(straight["lr"])) > 2
    assert all(torch.equal(resumed["weights"][name], straight["weights"][name]) for name in straight["weights"])
    print(f"{layout}: save {runs.load(f'half-{layout}')['save_s']:.2f} s, load {resumed['load_s']:.2f} s")


@pytest.mark.full
@pytest.mark.parametrize("change", ["optimizer.distributed=false", "model.dtype=bf16"])
@pytest.mark.parametrize("layout", ["tp1", "dp2"])
def test_resume_is_bitwise_with_other_optimizers(layout, change, runs):
    """A replicated optimizer; fp32 main weights beside bf16 ones."""
    name = f"{change}-{layout}".replace("=", "-")
    straight = [f"{name}-straight:4:0:{name}-straight", f"{name}:2:2:{name}"]
    start_ranks("tests.dist.checkpoint_worker", runs.work, layout, *straight, change)
    start_ranks("tests.dist.checkpoint_worker", runs.work, layout, f"{name}:4:0:{name}", change)
    expected, found = runs.load(f"{name}-straight"), runs.load(name)
    assert found["start"] == 2 and found["losses"] == expected["losses"][2:]
    assert all(torch.equal(found["weights"][key], expected["weights"][key]) for key in expected["weights"])


@pytest.mark.parametrize(("saved_at", "layout"), RESHARDINGS)
def test_another_layout_resumes_to_rounding(saved_at, layout, runs):
    straight, resumed = runs.straight(saved_at), runs.resumed(saved_at, layout)
    # Reference and policy are both computed in the other layout.
    assert resumed["losses"] == pytest.approx(straight["losses"][2:], rel=TOLERANCE["loss"])
    for name, expected in straight["weights"].items():
        difference = (resumed["weights"][name] - expected).norm() / expected.norm()
        assert difference <= 1e-6, f"{name}: {difference}"


def test_a_killed_save_is_no_checkpoint(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs.half("pp2"), folder)
    complete = folder / "checkpoints" / "step-000002"
    assert latest(folder) == complete
    shutil.copytree(complete, folder / "checkpoints" / ".step-000004.partial")
    assert latest(folder) == complete
    shutil.copytree(complete, folder / "checkpoints" / "step-000010")
    assert latest(folder) == folder / "checkpoints" / "step-000010"


def test_a_run_saves_over_the_rest_of_a_killed_save(runs):
    """The layout pp2 resumes at step 2 beside a half-written step 4, and writes step 4 whole."""
    name = "beside-partial"
    shutil.copytree(runs.half("pp2"), runs.work / name)
    partial = runs.work / name / "checkpoints" / ".step-000004.partial"
    partial.mkdir()
    (partial / "__0_0.distcp").write_bytes(b"cut short")
    start_ranks("tests.dist.checkpoint_worker", runs.work, "pp2", f"{name}:4:2:{name}")
    assert not partial.exists()
    assert read_record(latest(runs.work / name)).run.step == 4
    assert runs.load(name)["losses"] == runs.straight("pp2")["losses"][2:]


def test_what_may_change_on_resume(runs):
    name = runs.half("pp2").name
    free = ["telemetry.progress=false", "eval.every=3", "rollout.port=1234", "parallel.dp=2", "reward.workers=2"]
    free += ["train.recompute=full", "train.recompute_method=block", "train.recompute_layers=2"]
    check_resume(recipe_of(runs.work, name, 5, *free))


def test_what_changes_the_numbers_is_refused_by_field(runs):
    name = runs.half("pp2").name
    changed = ["optimizer.lr=1e-4", "objective.beta2=0.5", "run.seed=7", "train.steps=40", "data.template=raw"]
    with pytest.raises(RecipeError) as caught:
        check_resume(recipe_of(runs.work, name, 2, *changed))
    # The number of steps is free, but not where the learning rate decays over them.
    keys = [problem.split(":")[0] for problem in caught.value.problems]
    assert sorted(keys) == sorted(change.split("=")[0] for change in changed)
    assert all("\n" not in problem for problem in caught.value.problems)
    assert any("0.0001, but" in problem and "0.001;" in problem for problem in caught.value.problems)


def test_another_vstar_store_is_refused(runs, tmp_path):
    name = runs.half("pp2").name
    (tmp_path / "manifest.json").write_text('{"other": 1}')
    with pytest.raises(RecipeError, match="vstar.dir: .* is not the store"):
        check_resume(recipe_of(runs.work, name, 2, f"vstar.dir={tmp_path}"))


def test_fewer_steps_than_were_taken_are_refused(runs, tmp_path):
    shutil.copytree(runs.half("pp2"), tmp_path / "run")
    record = tmp_path / "run" / "checkpoints" / "step-000002" / RECORD
    tree = json.loads(record.read_text())
    tree["run"]["recipe"]["optimizer"]["schedule"] = "constant"
    record.write_text(json.dumps(tree))
    write_list(record.parent, {})
    changes = [f"run.dir={tmp_path / 'run'}", "optimizer.schedule=constant"]
    check_resume(recipe_of(runs.work, "", 2, *changes, "train.steps=2"))
    with pytest.raises(RecipeError, match="train.steps: 1, but .* use at least 2"):
        check_resume(recipe_of(runs.work, "", 2, *changes, "train.steps=1"))


# ---- damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """A bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def record_with(**changes: Any) -> Callable[[Path], None]:
    """What is written there is of the right size and digest: its content is at fault."""

    def change(path: Path) -> None:
        tree = json.loads(path.read_text())
        tree["run"] = tree["run"] | changes
        path.write_text(json.dumps(tree))
        write_list(path.parent, {})

    return change


def text(content: str) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.write_text(content)
        write_list(path.parent, {})

    return replace


# (file, what is done to it, what is said)
DAMAGES = [
    (RECORD, Path.unlink, "no checkpoint.json there"),
    (RECORD, cut, "checkpoint.json: damaged ("),
    (
        RECORD,
        lambda path: path.write_text(path.read_text().replace('"step": 2', '"step": 3')),
        "checkpoint.json is dam",
    ),
    (RECORD, lambda path: path.write_bytes(b"\xff" * 9), "checkpoint.json: damaged ("),
    (RECORD, text("[]"), "checkpoint.json: damaged ("),
    (RECORD, text('{"format": 1, "dtype": "fp32", "run": 3}'), "checkpoint.json: damaged (run: "),
    (RECORD, text('{"format": 9}'), "format 9 is not known"),
    (RECORD, record_with(step="2"), "checkpoint.json: damaged (run.step: "),
    (RECORD, record_with(step=3), "checkpoint.json is of step 3"),
    (RECORD, record_with(first_mismatches=["a"]), "checkpoint.json: damaged (run.first_mismatches.0: "),
    (RECORD, record_with(recipe={"model": 3}), "the recipe in checkpoint.json is none of this version's (model: 3"),
    ("files.json", cut, "files.json is damaged"),
    ("files.json", lambda path: path.write_text("[]"), "files.json is damaged"),
    ("files.json", Path.unlink, None),  # as in checkpoints of before
    ("__1_0.distcp", Path.unlink, "__1_0.distcp is missing"),
    ("__1_0.distcp", cut, "__1_0.distcp has "),
    (".metadata", Path.unlink, ".metadata is missing"),
    (".metadata", flip, ".metadata is damaged, its sha256"),
    ("common.pt", flip, "common.pt is damaged, its sha256"),
    ("model", shutil.rmtree, "model/config.json is missing"),
    ("model/config.json", cut, "model/config.json has "),
]


@pytest.mark.parametrize(("name", "harm", "said"), DAMAGES)
@pytest.mark.parametrize("has_older", [False, True])
def test_a_damaged_checkpoint_is_refused_before_ranks_start(name, harm, said, has_older, runs, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs.half("pp2"), run)
    folder = run / "checkpoints" / "step-000002"
    if has_older:
        shutil.copytree(folder, run / "checkpoints" / "step-000001")
    recipe = recipe_of(runs.work, "", 2, f"run.dir={run}")
    check_resume(recipe)
    harm(folder / name)
    before = files_of(run)
    if said is None:
        check_resume(recipe)
        return
    with pytest.raises(DamagedCheckpoint) as caught:
        check_resume(recipe)
    line, then = str(caught.value), "goes on from step-000001" if has_older else "begins with its first step"
    assert "\n" not in line and said in line and str(folder) in line
    assert line.endswith(f"; move step-000002 out of {folder.parent}, then the run {then}")
    assert files_of(run) == before
    folder.rename(tmp_path / "step-000002")
    assert next_step(run) == int(has_older)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_flipped_bits_of_a_tensor_end_all_ranks_in_one_line(runs) -> None:
    """Torch would load them."""
    name = "flipped"
    shutil.copytree(runs.half("pp2"), runs.work / name)
    folder = runs.work / name / "checkpoints" / "step-000002"
    flip(folder / "__1_0.distcp")
    with pytest.raises(pytest.fail.Exception) as caught:
        start_ranks("tests.dist.checkpoint_worker", runs.work, "pp2", f"{name}:4:0:{name}")
    said = f"{folder}: __1_0.distcp is damaged, its sha256 is not that of what was written; move step-000002 out of"
    assert said in str(caught.value)


def test_no_checkpoint_is_nothing_to_check(runs, tmp_path):
    check_resume(recipe_of(tmp_path, "run", 2))
