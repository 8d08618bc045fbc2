"""Importing the package, its recipe and its command line stays light, and rooms import what is below them alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import megatron_apo

HEAVY = {"torch", "vllm", "transformer_engine", "megatron", "transformers", "datasets", "matplotlib", "pyarrow"}


@pytest.mark.parametrize("module", ["megatron_apo", "megatron_apo.config", "megatron_apo.cli", "megatron_apo.doctor"])
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    )
    assert "megatron_apo" in loaded
    assert loaded & HEAVY == set()


def test_a_launcher_checks_stage_2_without_megatron_core() -> None:
    """It is imported in the ranks alone, seconds for each process."""
    modules = "sys, megatron_apo.stages.start, megatron_apo.preflight"
    code = f"import {modules}; print('megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"


# From the top down; rooms of one row do not know each other.
ROWS = [
    {"cli", "quickstart"},
    {"cluster", "compare"},
    {"doctor", "stages"},
    {"preflight"},
    {"learner", "rollout"},
    {"weights"},
    {"parallel"},
    {"model"},
    {"data"},
    {"values", "rewards", "objectives"},
    {"telemetry"},
    {"runtime"},
    {"config"},
]
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
PACKAGE = Path(megatron_apo.__file__).parent


def imported(path: Path) -> set[str]:
    """The modules of this package that a file imports, wherever it does: for types alone, or within a function, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("megatron_apo.") and name != "megatron_apo.__version__"}


def climbing(importer: str, modules: Iterable[str]) -> list[str]:
    """Those of `modules` that the room `importer` may not import: a row above, or a neighbour."""

    def may_import(room: str) -> bool:
        top = ROW_OF[importer] == ROW_OF[room] == 0  # the commands call each other
        return room == importer or ROW_OF[room] > ROW_OF[importer] or top

    return [name for name in modules if not may_import(name.split(".")[1])]


def test_no_room_imports_a_room_above_it() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    assert len(files) > 80
    found = {
        str(path): climbing(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), imported(path)) for path in files
    }
    assert {path: names for path, names in found.items() if names} == {}


def test_a_climbing_import_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from megatron_apo.stages import train\n"
        "def late():\n    import megatron_apo.learner.optim\n    from megatron_apo import config, preflight\n"
    )
    assert sorted(climbing("rollout", imported(path))) == [
        "megatron_apo.learner.optim",
        "megatron_apo.preflight",
        "megatron_apo.stages.train",
    ]
