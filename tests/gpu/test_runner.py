"""The runner of the GPU checks: whose turn it is for how long, what a kill leaves, and what a missing package does.

bash tests/run.sh tests/gpu
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import torch
from packaging.requirements import Requirement

from tests.gpu import engine, runner

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
FIRST = [check.name for check in runner.FIRST]
# A check that never ends, with a child in a session of its own.
HANGS = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", {mark!r}], start_new_session=True)
print("a row"); print("figures: 7 of 9"); time.sleep(600)
"""


class Fakes:
    """The runner with checks that are Python code, in a process of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.mark = f"mark-{secrets.token_hex(8)}"

    def start(self, *checks: tuple[str, str, float], seconds: float | None = None) -> subprocess.Popen[str]:
        """checks: name, code, limit."""
        script = (
            "import sys; from pathlib import Path; from tests.gpu import runner\n"
            "runner.machine = lambda tiny: 'a device'; runner._END_S = 2.0\n"
            f"checks = [runner.Check(name, ('-c', code), limit) for name, code, limit in {list(checks)!r}]\n"
            f"sys.exit(runner.run(checks, Path({str(self.folder / 'out')!r}), {seconds!r}))"
        )
        return subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(self.temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def table(self, name: str) -> str:
        path = self.folder / "out" / f"{name}.txt"
        return path.read_text() if path.exists() else ""

    def results(self) -> dict[str, str]:
        return figures(self.folder / "out")

    def living(self) -> list[psutil.Process]:
        """What checks have started."""
        found = []
        for process in psutil.process_iter():
            try:
                if any(self.mark in word for word in process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def hangs(self) -> str:
        return HANGS.format(mark=self.mark)

    def assert_nothing_left(self) -> None:
        until(lambda: not self.living())
        until(lambda: not list(self.temporary.glob("gpu-*")))


@pytest.fixture
def fakes(tmp_path: Path) -> Iterable[Fakes]:
    made = Fakes(tmp_path)
    yield made
    for process in made.living():
        process.kill()


def until(true: Callable[[], object], limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def figures(folder: Path) -> dict[str, str]:
    """The last column of RESULTS.md by check, in the order of its rows."""
    rows = [line.strip("| \n").split(" | ") for line in (folder / "RESULTS.md").read_text().splitlines()[2:]]
    assert all(len(cells) == 4 for cells in rows), rows
    return {cells[0]: cells[3] for cells in rows}


def first(*arguments: object, python: Path | str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = ["bash", "tests/gpu/first.sh", *map(str, arguments)]
    environment = os.environ | {"PYTHON": str(python)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


# Whose turn it is


def test_limits_of_first_leave_time_for_its_start_and_its_end() -> None:
    assert sum(check.limit_s for check in runner.FIRST) + runner._END_S + 20 <= runner.FIRST_S == 9 * 60


def test_a_check_gets_its_limit_and_what_is_left_over_up_to_as_much_again() -> None:
    checks = [runner.Check(name, (), limit) for name, limit in [("a", 100), ("b", 50), ("c", 40)]]
    assert runner.seconds_for(checks, 0, None) == 100
    assert runner.seconds_for(checks, 0, 190) == 100
    assert runner.seconds_for(checks, 0, 195) == 105
    assert runner.seconds_for(checks, 0, 120) == 100, "what matters more comes first"
    assert runner.seconds_for(checks, 1, 100) == 60
    assert runner.seconds_for(checks, 1, 190) == 100
    assert runner.seconds_for(checks, 2, 10) == 10
    assert runner.seconds_for(checks, 2, 9) is None
    assert runner.seconds_for(checks, 2, -1) is None


def test_what_overruns_is_cut_and_the_next_has_its_turn(fakes: Fakes) -> None:
    process = fakes.start(("slow", fakes.hangs(), 2), ("next", "print('figures: 3 s')", 20))
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1, output
    assert fakes.table("slow") == "a row\nfigures: 7 of 9\n" and fakes.table("next") == "figures: 3 s\n"
    found = fakes.results()
    assert re.fullmatch(r"failed: cut after 2 s, what it had measured is in slow\.txt; 7 of 9", found["slow"])
    assert found["next"] == "3 s"
    fakes.assert_nothing_left()


def test_what_there_is_no_time_for_is_named(fakes: Fakes) -> None:
    start = time.monotonic()
    process = fakes.start(("slow", fakes.hangs(), 4), ("late", "print(1)", 8), ("later", "print(1)", 8), seconds=7)
    output = process.communicate(timeout=60)[0]
    assert time.monotonic() - start < 9
    assert fakes.results()["late"] == fakes.results()["later"] == "not run: no time left", output
    assert output.count("not run: no time left") == 4 and process.returncode == 1
    fakes.assert_nothing_left()


def test_exit_codes_and_reasons(fakes: Fakes) -> None:
    cannot = "import sys; print('tests/gpu: not run: no vllm'); sys.exit(77)"
    wrong = "print('figures: 9 | 9'); raise SystemExit('tests/gpu: beyond the limit:\\nrow: mean 2 > 1')"
    process = fakes.start(("a", cannot, 20), ("b", wrong, 20), ("c", "", 20))
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1, output
    assert fakes.results() == {
        "a": "not run: no vllm",
        "b": r"failed: row: mean 2 > 1; 9 \| 9",
        "c": "passed",
    }
    process = fakes.start(("a", cannot, 20))
    process.communicate(timeout=60)
    assert process.returncode == 77
    process = fakes.start(("a", cannot, 20), ("c", "", 20))
    process.communicate(timeout=60)
    assert process.returncode == 0


# What a kill leaves


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_check_and_names_the_rest(fakes: Fakes, number: signal.Signals) -> None:
    process = fakes.start(("quick", "print('figures: 1')", 20), ("slow", fakes.hangs(), 60), ("rest", "print(1)", 60))
    until(lambda: "figures" in fakes.table("slow"))
    assert len(fakes.living()) == 4, "the runner, a guard, the check and its child"
    process.send_signal(number)
    process.send_signal(number)  # impatient
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 128 + number, output
    found = fakes.results()
    assert found["quick"] == "1" and found["rest"] == f"not run: ended by {number.name}"
    assert found["slow"].startswith(f"failed: ended by {number.name} after ") and found["slow"].endswith("; 7 of 9")
    fakes.assert_nothing_left()


def test_sigkill_leaves_the_tables_and_no_process(fakes: Fakes) -> None:
    process = fakes.start(("quick", "print('figures: 1')", 20), ("slow", fakes.hangs(), 60))
    until(lambda: "figures" in fakes.table("slow"))
    process.kill()
    process.communicate(timeout=20)
    assert fakes.table("slow") == "a row\nfigures: 7 of 9\n" and fakes.results() == {"quick": "1"}
    fakes.assert_nothing_left()


def test_a_terminal_that_is_gone_ends_nothing(fakes: Fakes) -> None:
    process = fakes.start(
        ("a", "import time; time.sleep(2); print('figures: 1')", 20), ("b", "print('figures: 2')", 20)
    )
    assert process.stdout
    process.stdout.close()
    assert process.wait(30) == 0 and fakes.results() == {"a": "1", "b": "2"}


# The checks themselves


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    done = first(tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (77, "", 1)
    assert done.stderr.startswith("tests/gpu: needs a GPU: ") and not (tmp_path / "out").exists()


def test_first_runs_in_its_order(tmp_path: Path) -> None:
    done = first("--tiny", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    found = figures(tmp_path / "out")
    assert list(found) == FIRST == ["parity", "logprob_head", "placement", "step-1.5B", "fp8_speed", "engine"]
    not_run = [name for name, figure in found.items() if figure.startswith("not run")]
    assert not_run == ([] if torch.cuda.is_available() else ["fp8_speed"]), found
    assert "after a sync" in found["engine"] and "tokens/s" in found["step-1.5B"]
    assert all((tmp_path / "out" / f"{name}.txt").read_text().count("\n") > 2 for name in FIRST)


@pytest.mark.parametrize("here, said", [(None, "no vllm"), (("vllm", "0.26.0"), "vllm 0.26.0 is here")])
def test_an_old_vllm_is_named(
    here: tuple[str, str] | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "installed", lambda *names: here)
    with pytest.raises(SystemExit) as end:
        engine.require_vllm()
    assert end.value.code == 77 and f"tests/gpu: not run: {said}" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cu130", "1.0"])
def test_a_newer_vllm_is_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "installed", lambda *names: ("vllm", version))
    engine.require_vllm()


# Packages that are missing


def with_dependencies(names: Iterable[str]) -> set[str]:
    """These distributions and what they ask for."""
    found: set[str] = set()
    queue = list(names)
    while queue:
        name = queue.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        wanted = [Requirement(line) for line in metadata.distribution(name).requires or []]
        queue += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def environment_of(folder: Path, names: Iterable[str]) -> Path:
    """The Python of a virtual environment that has these distributions alone, as links to ours."""
    packages = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    packages.mkdir(parents=True)
    for name in names:
        distribution = metadata.distribution(name)
        for entry in {path.parts[0] for path in distribution.files or []} - {"..", "__pycache__"}:
            if not (packages / entry).exists():
                (packages / entry).symlink_to(distribution.locate_file(entry))
    (folder / "bin").mkdir()
    (folder / "bin/python").symlink_to(Path(sys.executable).resolve())
    (folder / "pyvenv.cfg").write_text((Path(sys.prefix) / "pyvenv.cfg").read_text())
    return folder / "bin/python"


def requirements() -> list[str]:
    lines = (HERE / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_requirements_are_those_of_the_package() -> None:
    declared = set(re.findall(r'^        "([^"]+)",$', (ROOT / "setup.py").read_text(), re.M))
    assert set(requirements()) - declared == {"packaging"}


def test_requirements_are_enough(tmp_path: Path) -> None:
    """With torch and Megatron-Core; what needs vLLM says so."""
    names = [Requirement(line).name for line in requirements()]
    python = environment_of(tmp_path / "env", with_dependencies(["torch", "megatron-core", *names]))
    done = first("--tiny", tmp_path / "out", python=python)
    found = figures(tmp_path / "out")
    assert done.returncode == 0 and found.pop("engine") == "not run: no vllm", done.stdout
    assert not [figure for figure in found.values() if "no " in figure or "failed" in figure], found


def test_a_missing_package_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    python = environment_of(tmp_path / "env", with_dependencies(["torch", "psutil", "numpy"]))
    done = first("--tiny", tmp_path / "out", python=python)
    assert done.returncode == 0, done.stdout
    found = figures(tmp_path / "out")
    assert "x naive" in found.pop("logprob_head")
    assert set(found.values()) <= {f"not run: no {name}" for name in ("pydantic", "pyyaml", "nvidia-ml-py")}, found


def test_without_torch_one_line_says_so(tmp_path: Path) -> None:
    done = first(tmp_path / "out", python=environment_of(tmp_path / "env", ["psutil"]))
    assert (done.returncode, done.stdout, done.stderr) == (77, "", "tests/gpu: not run: no torch\n")


def test_a_module_of_ours_that_is_missing_is_a_failure() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.gpu", "nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "nonsense" in done.stderr


def test_the_plugin_is_found_by_the_metadata_that_the_engine_check_writes(tmp_path: Path) -> None:
    path = os.pathsep.join(engine.python_path(tmp_path / "plugin"))
    script = (
        "import json; from importlib.metadata import entry_points\n"
        "print(json.dumps([str(e.load().__module__) for e in entry_points(group='vllm.general_plugins')]))"
    )
    python = environment_of(tmp_path / "env", ["psutil"])
    done = subprocess.run([python, "-c", script], env={"PYTHONPATH": path}, cwd="/", capture_output=True, text=True)
    assert json.loads(done.stdout) == ["megatron_apo.rollout.vllm_plugin"], done.stderr
