"""A built wheel, installed elsewhere, is whole."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that holds the package as its wheel installs it; built from a copy, to leave no build folders here."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("megatron_apo", "launch"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(folder / "site"), str(source)], check=True)
    return folder / "site"


def test_every_module_recipe_and_asset_is_in_the_wheel(installed: Path) -> None:
    here = {path.relative_to(ROOT) for path in (ROOT / "megatron_apo").rglob("*") if path.suffix in (".py", ".css")}
    recipes = ROOT / "launch/recipes"
    here |= {
        Path("megatron_apo/recipes") / path.relative_to(recipes)
        for path in recipes.rglob("*")
        if path.suffix in (".yaml", ".json")
    }
    assert {Path("megatron_apo/recipes") / name for name in ("quickstart.yaml", "shapes/qwen3-8b.json")} <= here
    assert [str(path) for path in sorted(here) if not (installed / path).is_file()] == []


def test_it_runs_from_there(installed: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, str(installed / "bin/megatron-apo"), "train", "-r", "quickstart"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    # The recipe was found: what it leaves to its user is all that is missing.
    keys = [line.split(": ")[1] for line in result.stderr.splitlines()]
    assert (result.returncode, keys) == (2, ["model.path", "data.train"])


def test_it_declares_the_command_and_the_vllm_plugin(installed: Path) -> None:
    (distribution,) = metadata.distributions(path=[str(installed)])
    entries = {(entry.group, entry.name): entry.value for entry in distribution.entry_points}
    assert entries["console_scripts", "megatron-apo"] == "megatron_apo.cli:main"
    assert entries["vllm.general_plugins", "megatron_apo"] == "megatron_apo.rollout.vllm_plugin:register"
    assert {"gpu", "fp8", "tasks", "wandb", "dev"} == set(distribution.metadata.get_all("Provides-Extra"))


def test_every_link_of_the_documents_leads_somewhere() -> None:
    documents = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "tests/benchmarks/RESULTS.md",
        *(ROOT / "docs").glob("*.md"),
    ]
    links = [(path, link) for path in documents for link in re.findall(r"\]\(([^)#]+)", path.read_text())]
    assert len(links) > 8
    broken = [f"{path.name}: {link}" for path, link in links if "://" not in link and not (path.parent / link).exists()]
    assert broken == []
