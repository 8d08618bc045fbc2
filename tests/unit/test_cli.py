"""The command line: its exit codes, its one-line errors, and how it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_apo import __version__
from megatron_apo.cli import DEBUG

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != DEBUG} | {"COLUMNS": "200"}


def megatron_apo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_apo.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | environment, timeout=120)


def with_command(body: str) -> list[str]:
    """The real entry point with one more command, `extra`."""
    code = f"import signal, sys, time\nfrom megatron_apo import cli\n@cli.app.command()\ndef extra():\n{body}\n"
    return [sys.executable, "-c", code + "sys.argv = ['x', 'extra']\ncli.main()"]


def run_with_command(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(with_command(body), capture_output=True, text=True, env=ENVIRONMENT, timeout=60)


def test_help_lists_the_commands_and_exit_codes() -> None:
    result = megatron_apo("--help")
    for word in "quickstart warmup estimate-vstar train evaluate convert report compare vstar doctor".split():
        assert f" {word} " in result.stdout
    assert "130 Ctrl-C" in result.stdout


def test_version() -> None:
    assert megatron_apo("--version").stdout == f"{__version__}\n"


def test_a_wrong_recipe_is_two_and_says_all() -> None:
    result = megatron_apo("train", "-r", "quickstart", "train.stps=3", "optimizer.lr=-1")
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert [line.split(":")[1].strip() for line in lines if "stps" in line or "lr" in line] == [
        "train.stps",
        "optimizer.lr",
    ]
    assert "Traceback" not in result.stderr


def test_a_wrong_command_line_is_two() -> None:
    assert megatron_apo("train").returncode == 2
    assert megatron_apo("nonsense").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workers", "2", "--worker", "2"], "--worker: 2 of 2 workers, which are counted from 0; use 0 to 1"),
        (["--merge", "--check"], "--merge, --check: --merge checks what it closes; give one of them"),
    ],
)
def test_options_that_do_not_fit_each_other_are_two(arguments: list[str], says: str) -> None:
    paths = ["model.path=m", "data.train=t.jsonl", "vstar.dir=v"]
    result = megatron_apo("estimate-vstar", "-r", "quickstart", *paths, *arguments)
    assert result.returncode == 2 and says in result.stderr and "Traceback" not in result.stderr


def test_a_users_error_is_one_line_and_one(tmp_path: Path) -> None:
    result = megatron_apo("vstar", str(tmp_path))
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith(f"error: {tmp_path}/manifest.json")


@pytest.mark.parametrize("how", ["option", "variable"])
def test_debug_shows_the_traceback(tmp_path: Path, how: str) -> None:
    if how == "option":
        result = megatron_apo("--debug", "vstar", str(tmp_path))
    else:
        result = megatron_apo("vstar", str(tmp_path), **{DEBUG: "1"})
    assert result.returncode == 1 and "Traceback" in result.stderr and "StoreError" in result.stderr


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    result = run_with_command("    import numpy; numpy.zeros(3).reshape(2)")  # a ValueError, but not raised here
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_an_errors_own_exit_code_is_kept() -> None:
    result = run_with_command("    from megatron_apo.runtime.launch import RankFailed; raise RankFailed('rank 1', 139)")
    assert (result.returncode, result.stderr) == (139, "error: rank 1\n")


def test_a_full_disk_is_one_line() -> None:
    result = run_with_command("    open('/dev/full', 'w', buffering=1).write('x\\n')")
    assert (result.returncode, result.stderr) == (1, "error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_unwinds_and_has_its_code(number: signal.Signals, code: int) -> None:
    body = "    try:\n        print('ready', flush=True)\n        time.sleep(60)\n"
    body += "    finally:\n        print('stopped', flush=True)"
    with subprocess.Popen(with_command(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (out, process.returncode) == ("stopped\n", code)
    assert "Traceback" not in err


def test_vstar_summarizes_a_store(tmp_path: Path) -> None:
    from tests.unit.test_report import write_store

    write_store(tmp_path / "v", np.array([[1, 1], [0, 0], [0, 1], [1, 1]]))
    lines = [line.split() for line in megatron_apo("vstar", str(tmp_path / "v")).stdout.splitlines()]
    assert ["prompts", "4", "in", "1", "shards"] in lines
    # b1 = 0.5: 1, 0, 0.5 log((1 + e^2) / 2) = 0.716890, 1
    assert ["0.5", "0.679", "0.000"] in [words[:3] for words in lines]


def test_report_prints_the_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0, "reward/mean": 0.5}\n')
    assert megatron_apo("report", str(tmp_path)).stdout == f"{tmp_path}/report.html\n"
    assert (tmp_path / "report.html").is_file()


def test_doctor_describes_the_machine() -> None:
    out = megatron_apo("doctor").stdout
    for word in ("megatron-core", "transformer-engine", "/dev/shm", "FP8", "CPU cores"):
        assert word in out
    assert "train.steps" in megatron_apo("doctor", "--fields").stdout


def test_doctor_checks_a_recipe_against_the_machine(tmp_path: Path) -> None:
    config = {"model_type": "qwen3", "num_attention_heads": 4, "num_hidden_layers": 4, "hidden_size": 128}
    config |= {"intermediate_size": 256, "vocab_size": 32, "num_key_value_heads": 2, "head_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "t.jsonl").write_text("")
    recipe = ["-r", "quickstart", f"model.path={tmp_path}", f"data.train={tmp_path}/t.jsonl", "vstar.dir=v"]
    wrong = megatron_apo("doctor", *recipe, "parallel.tp=3", "rollout.tp=3")
    assert wrong.returncode == 2
    keys = [line.split(": ")[1] for line in wrong.stderr.splitlines()]
    assert keys == ["rollout.tp", "parallel.tp"]
