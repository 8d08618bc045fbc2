"""The set-up of reasoning-gym's tasks, with a pip that only pretends: it may fail, and is tried again by itself."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# An interpreter whose pip lists what it installs, and fails at tasks.txt with the text of the file `fails`, if any.
PYTHON = """#!/usr/bin/env bash
[[ $1 == -c ]] && { echo 3.11; exit; }
cd "$(dirname "$0")"
echo "${@: -1}" | sed 's|.*/||' >> calls
[[ $* == *tasks.txt* && -e fails ]] && { cat fails; exit 1; }
exit 0
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    shutil.copytree(ROOT / "launch", root / "launch")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    python = root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    (root / ".venv/made-for").write_text(f"{root}\n")
    return root


def set_up(root: Path) -> tuple[list[str], str]:
    """What pip was asked to install, and the last line that was said."""
    calls = root / ".venv/bin/calls"
    calls.unlink(missing_ok=True)
    done = subprocess.run(["bash", str(root / "launch/setup.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    installed = calls.read_text().split() if calls.exists() else []
    return [name.partition("=")[0] for name in installed], (done.stderr.splitlines() or [""])[-1]


ALL = ["torch", "cpu.txt", "tree"]


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "Collecting zss==1.2.0\nERROR: Failed building wheel for pycosat\n",
            "Failed building wheel for pycosat; a C compiler and Python's headers are needed",
        ),
        (
            "ERROR: Could not find a version that satisfies the requirement bfi==1.0.4 (from versions: none)\n",
            "Could not find a version that satisfies the requirement bfi==1.0.4",
        ),
        (
            "Collecting a\n  error: subprocess-exited-with-error\n      ERROR: No matching distribution found for b\n",
            "at a: No matching distribution found for b",
        ),
        ("Collecting bfi==1.0.4\nERROR: Connection broken\n", "at bfi==1.0.4: Connection broken"),
    ],
)
def test_tasks_that_fail_are_tried_again_alone(tree: Path, log: str, reason: str) -> None:
    (tree / ".venv/bin/fails").write_text(log)
    says = (
        f"set-up: could not install reasoning-gym ({reason}); its tasks are missing, nothing else; "
        f"the next set-up tries again; the log is {tree}/.venv/set-up.log"
    )
    assert set_up(tree) == ([*ALL, "tasks.txt"], says)
    assert set_up(tree) == (["tasks.txt"], says)
    (tree / ".venv/bin/fails").unlink()
    assert set_up(tree) == (["tasks.txt"], "")
    assert set_up(tree) == ([], "")


def test_other_tasks_are_installed_alone(tree: Path) -> None:
    assert set_up(tree)[0] == [*ALL, "tasks.txt"] and set_up(tree)[0] == []
    tasks = tree / "launch/requirements/tasks.txt"
    tasks.write_text(tasks.read_text() + "absent==1\n")
    assert set_up(tree)[0] == ["tasks.txt"] and set_up(tree)[0] == []
    (tree / "setup.py").write_text("# other\n")
    assert set_up(tree)[0] == ALL and set_up(tree)[0] == []
