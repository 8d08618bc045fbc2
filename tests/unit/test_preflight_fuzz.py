"""Recipes that are wrong in ways nobody thought of, and folders with damaged files: each ends in lines, never in a
traceback, and in the same lines by the command that would have started and by the doctor."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_apo import preflight
from megatron_apo.config import Recipe, RecipeError, describe_fields, load_recipe
from tests.runs import write_run

STAGES: tuple[preflight.Stage, ...] = ("warmup", "estimate-vstar", "train", "evaluate")
KEYS = [name for name, _, _ in describe_fields() if name != "run.dir"]  # which preflight writes a hash to
SOURCES = ("data.train", "data.eval", "warmup.data")  # a plain word would be looked up on the hub
# Where values are close to what a field takes, they go further in.
VALUES = [0, 1, 2, 3, 4, 7, 16, 64, 1000, -1, 10**12, 0.5, 1e-3, 1e9, float("nan"), float("inf"), True, False, None]
VALUES += [
    "",
    "x",
    "none",
    "bf16",
    "float16",
    "bfloat16",
    "fp8",
    "te",
    "local",
    "swap",
    "full",
    "selective",
    "success_rate",
]
VALUES += ["constant", "linear", "chat", "raw", "math", "gsm8k", "no:Such", "/nowhere", "/dev/null", "{prompt}"]
VALUES += [[], [0], [1, 0], ["--seed"], {}, {"recipe": "mxfp8"}, {"most": 3}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose every stage could start."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "pairs.jsonl").write_text('{"prompt": "1+1=", "response": "2"}\n')
    write_run(folder, f"warmup.start={folder / 'model'}", f"warmup.data={folder / 'pairs.jsonl'}")
    return folder


def overrides(draw: random.Random) -> list[str]:
    """A few fields of a recipe with values that may not suit them."""
    found = []
    for _ in range(draw.randint(1, 3)):
        key, value = draw.choice(KEYS), draw.choice(VALUES)
        if key in SOURCES and isinstance(value, str):
            value += "/nowhere.jsonl"
        found.append(f"{key}={json.dumps(value)}")
    return found


def damage(draw: random.Random, folder: Path) -> str:
    """Do something to a file of the run; returns what."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "recipe.yaml")
    path, how = draw.choice(files), draw.choice(["gone", "empty", "cut", "flipped", "text", "a folder"])
    data = bytearray(path.read_bytes())
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif data and how != "gone":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "flipped": data, "text": b"\x00{]"}[how])
    return f"{path.relative_to(folder)} is {how}"


def lines_of_command(in_process: Callable, *arguments: object) -> list[str]:
    """What a command says of a recipe before it ends; in_process raises what the command line would not catch."""
    result = in_process(*arguments)
    assert result.returncode in (1, 2) and "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert lines and all(lines)
    return lines


@pytest.mark.parametrize("cases", [15, pytest.param(1000, marks=[pytest.mark.full, pytest.mark.timeout(3600)])])
def test_commands_and_the_doctor_refuse_the_same(
    cases: int, run: Path, in_process: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some values are folders
    draw, refused, fits = random.Random(cases), 0, 0
    for case in range(cases):
        stage = draw.choice(STAGES)
        folder, changes = run, overrides(draw)
        told = ["-r", str(run / "recipe.yaml"), *changes]
        if case % 3 == 0:
            folder = shutil.copytree(run, tmp_path / str(case))
            text = (run / "recipe.yaml").read_text().replace(str(run), str(folder))
            (folder / "recipe.yaml").write_text(text)
            changes = [damage(draw, folder)]
            told = ["-r", str(folder / "recipe.yaml")]
        if stage == "warmup":  # which writes the model that the others start from
            told.append(f"model.path={tmp_path / 'warm'}")
        print(case, stage, changes)
        if not expected(told, stage):
            fits += 1  # the command would start
            continue
        refused += 1
        command = lines_of_command(in_process, stage, *told)
        doctor = lines_of_command(in_process, "doctor", *told, "--for", stage)
        assert doctor == command, (stage, changes)
    assert refused > cases / 2, f"only {refused} of {cases} were refused, {fits} fit: the values are too tame"


@pytest.mark.parametrize("stage", ["estimate-vstar", "train", "evaluate"])
def test_weights_that_are_not_finite_are_used_for_nothing(
    stage: str, run: Path, in_process: Callable, tmp_path: Path
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace(str(run), str(folder)))
    weights = load_file(folder / "model" / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model" / "model.safetensors")
    told = ["-r", str(folder / "recipe.yaml")]
    command = lines_of_command(in_process, stage, *told)
    assert command == lines_of_command(in_process, "doctor", *told, "--for", stage)
    said = f"{folder / 'model'}: a tensor holds NaN or infinity (model.norm.weight); give a folder of finite weights"
    assert len(command) == 1 and command[0].startswith(f"error: {said}")


def expected(told: list[str], stage: preflight.Stage) -> bool:
    """Whether anything is wrong with the recipe, or with what the stage would read."""
    try:
        recipe: Recipe = load_recipe(told[1], told[2:])
    except RecipeError:
        return True
    return bool(preflight.problems(recipe, stage))
