"""Two lanes of the tests run each test once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEST = """
import os, time
from pathlib import Path
import pytest
CLAIMS = Path(os.environ["TESTS_CLAIMS"])
@pytest.fixture(scope="module")
def shared():
    yield
@pytest.mark.parametrize("number", [1, 2])
def test(number, shared):
    while not ({until}):
        time.sleep(0.02)
    with open(os.environ["RAN"], "a") as file:
        file.write(f"{{os.environ['LANE']}} {folder} {index} {{number}}\\n")
    assert {index} != 3 or number != 2
"""
# The longest first: 8, 7, ... The second lane's own file takes until the first has five of those that they share, and
# the fifth of these until the second has one.
UNTIL = {("slurm", 0): "len(list(CLAIMS.iterdir())) >= 5", ("e2e", 4): "list(CLAIMS.glob('*_3.py'))"}
FILES = [("unit", 0), *(("e2e", index) for index in range(9)), ("slurm", 0)]


def test_each_test_is_run_by_one_lane_the_longest_files_first(tmp_path: Path) -> None:
    """What fails is told by the lane that ran it alone."""
    for folder, index in FILES:
        text = TEST.format(folder=folder, index=index, until=UNTIL.get((folder, index), "True"))
        text += "#" * 100 * index
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"test_{folder}_{index}.py").write_text(text)
    (tmp_path / "claims").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAN": str(tmp_path / "ran")}
    environment["TESTS_CLAIMS"] = str(tmp_path / "claims")
    with ExitStack() as stack:
        lanes = []
        for name, folders in (("first", ["unit", "e2e"]), ("second", ["e2e", "slurm"])):
            command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.lanes", *folders]
            own = environment | {"LANE": name}
            lanes.append(subprocess.Popen(command, cwd=tmp_path, env=own, stdout=subprocess.PIPE, text=True))
            stack.callback(lanes[-1].kill)
        outputs = [lane.communicate(timeout=60)[0] for lane in lanes]
    ran = [tuple(line.split()) for line in (tmp_path / "ran").read_text().splitlines()]
    by_file: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for lane, folder, index, number in ran:
        by_file.setdefault((folder, int(index)), []).append((lane, number))
    assert by_file.keys() == set(FILES)
    for tests in by_file.values():
        assert tests in ([("first", "1"), ("first", "2")], [("second", "1"), ("second", "2")])
    own_files = {lane: [file for file, tests in by_file.items() if tests[0][0] == lane] for lane in ("first", "second")}
    assert own_files["first"][:6] == [("unit", 0), *(("e2e", index) for index in range(8, 3, -1))]
    assert own_files["second"][:2] == [("slurm", 0), ("e2e", 3)]
    assert all(files[1:] == sorted(files[1:], reverse=True) for files in own_files.values())
    assert [lane.returncode for lane in lanes] == [0, 1]
    counts = [sum(map(int, re.findall(r"(\d+) (?:passed|failed)", output.splitlines()[-1]))) for output in outputs]
    assert counts == [2 * len(files) for files in own_files.values()]
