"""Two runs of pytest beside each other (tests/run.sh) share the files of tests/e2e: each is run by the lane that comes
to it first, one from the front and one from the back, so that both end at about the same time whatever a file takes.

    python -m pytest -p tests.lanes tests/unit tests/e2e          TESTS_CLAIMS=FOLDER
    python -m pytest -p tests.lanes tests/e2e tests/slurm         TESTS_CLAIMS=FOLDER TESTS_FROM=back

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
    if os.environ.get("TESTS_FROM") == "back":
        files = list(dict.fromkeys(item.path for item in items))
        items.sort(key=lambda item: -files.index(item.path))  # within a file as they stand


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """True: it is done with, here since the other lane has its file."""
    return None if is_ours(item.path) else True
