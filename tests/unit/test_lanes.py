"""Two lanes of the tests run each test once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEST = """
import os, time
import pytest
@pytest.fixture(scope="module")
def shared():
    yield
@pytest.mark.parametrize("number", [1, 2])
def test(number, shared):
    time.sleep({seconds})
    with open(os.environ["RAN"], "a") as file:
        file.write(f"{{os.environ['TESTS_FROM']}} {folder} {index} {{number}}\\n")
    assert {index} != 4 or number != 2
"""


def test_each_test_is_run_by_one_lane_in_the_order_of_its_file(tmp_path: Path) -> None:
    """The back has a test of its own that takes long, so that the front comes to most of what they share; what fails is
    told by the lane that ran it alone."""
    for folder, count, seconds in (("unit", 1, 0), ("e2e", 5, 0.05), ("slurm", 1, 1)):
        for index in range(count):
            (tmp_path / folder).mkdir(exist_ok=True)
            text = TEST.format(seconds=seconds, folder=folder, index=index)
            (tmp_path / folder / f"test_{folder}_{index}.py").write_text(text)
    (tmp_path / "claims").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAN": str(tmp_path / "ran")}
    environment["TESTS_CLAIMS"] = str(tmp_path / "claims")
    lanes = []
    for name, folders in (("front", ["unit", "e2e"]), ("back", ["e2e", "slurm"])):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.lanes", *folders]
        own = environment | {"TESTS_FROM": name}
        lanes.append(subprocess.Popen(command, cwd=tmp_path, env=own, stdout=subprocess.PIPE, text=True))
    outputs = [lane.communicate(timeout=60)[0] for lane in lanes]
    ran = [tuple(line.split()) for line in (tmp_path / "ran").read_text().splitlines()]
    by_file: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for lane, folder, index, number in ran:
        by_file.setdefault((folder, index), []).append((lane, number))
    assert len(by_file) == 7
    for lane in by_file.values():
        assert lane in ([("front", "1"), ("front", "2")], [("back", "1"), ("back", "2")])
    lane_of = {file: lane for file, [(lane, _), _] in by_file.items()}
    assert lane_of["unit", "0"] == "front" and lane_of["slurm", "0"] == "back"
    failed = lane_of["e2e", "4"]
    assert [process.returncode for process in lanes] == [failed == "front", failed == "back"]
    counts = [sum(map(int, re.findall(r"(\d+) (?:passed|failed)", output.splitlines()[-1]))) for output in outputs]
    assert sum(counts) == len(ran) and counts[0] > counts[1]
