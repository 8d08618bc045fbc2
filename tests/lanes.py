"""Two runs of pytest beside each other (tests/run.sh) share the files of tests/e2e: each is run by the lane that comes
to it first, the longest files first, so that both end at about the same time whatever a file takes.

    TESTS_CLAIMS=FOLDER python -m pytest -p tests.lanes tests/unit tests/e2e
    TESTS_CLAIMS=FOLDER python -m pytest -p tests.lanes tests/e2e tests/slurm

FOLDER has a file for each that a lane has taken.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = "e2e"  # the folder; each lane has it last, for pytest keeps it open behind a file that is left out
CLAIMS = Path(os.environ["TESTS_CLAIMS"])
_taken: dict[Path, bool] = {}


def is_ours(path: Path) -> bool:
    """Whether this lane is to run a file. One that is shared is taken by asking."""
    if SHARED not in path.parts:
        return True
    if path not in _taken:
        name = "-".join(path.parts[path.parts.index(SHARED) :])
        try:
            (CLAIMS / name).touch(exist_ok=False)
            _taken[path] = True
        except FileExistsError:
            _taken[path] = False
    return _taken[path]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is shared goes last. The length of a file's text says roughly how long it takes."""
    items.sort(key=lambda item: item.path.stat().st_size if SHARED in item.path.parts else float("inf"), reverse=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """True: it is done with, here since the other lane has its file."""
    return None if is_ours(item.path) else True
