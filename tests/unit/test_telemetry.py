"""Metrics on disk and on their way to W&B, seconds and memory by phase, and private memory of real processes."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_apo.runtime import guard
from megatron_apo.telemetry.memory import MemorySampler, pop_private_peak_bytes, private_bytes, tree_private_bytes
from megatron_apo.telemetry.metrics import MetricsWriter, read_metrics
from megatron_apo.telemetry.summary import RunSummary, read_summary
from megatron_apo.telemetry.timers import PhaseTimer
from megatron_apo.telemetry.weights_and_biases import wandb_problems

MB = 1_000_000


def lines_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_row_is_on_disk_when_log_returns(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", tensorboard=False) as metrics:
        before = time.time()
        metrics.log(3, {"reward/mean": np.float32(0.5), "response/truncated": 7})
        (row,) = lines_of(tmp_path / "run")
    assert abs(row.pop("time") - before) < 1
    assert row == {"step": 3, "reward/mean": 0.5, "response/truncated": 7}
    assert isinstance(row["response/truncated"], int)


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as metrics:
        metrics.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 1e-6})
    (row,) = lines_of(tmp_path)
    assert (row["loss"], row["grad_norm"], row["lr"]) == (None, None, 1e-6)


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, tensorboard=True) as metrics:
        for step in (1, 2):
            metrics.log(step, {"reward/mean": torch.tensor(step / 4)})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("reward/mean")
    assert [(event.step, event.value) for event in events] == [(1, 0.25), (2, 0.5)]
    assert [row["reward/mean"] for row in lines_of(tmp_path)] == [0.25, 0.5]


def scalars(run_dir: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [(one.step, one.value) for one in EventAccumulator(str(run_dir / "tensorboard")).Reload().Scalars(name)]


def test_a_resumed_run_goes_on_and_has_no_step_twice(tmp_path: Path) -> None:
    """Killed in step 4 (a line is cut short), resumed after step 2, killed in step 3, resumed after step 2 again."""
    for value, last_step, steps in ((1.0, 0, (1, 2, 3)), (10.0, 2, (3,)), (100.0, 2, (3, 4))):
        with MetricsWriter(tmp_path, tensorboard=True, last_step=last_step) as metrics:
            if not last_step:
                metrics.log(0, {"eval/greedy": 0.125})
            for step in steps:
                metrics.log(step, {"loss": value * step, "gpu/rank0/xid": 79})
                metrics.log(step, {"eval/greedy": value})
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "lo')
    with MetricsWriter(tmp_path, tensorboard=False, last_step=4):
        pass
    rows = lines_of(tmp_path)
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(1, 1), (2, 2), (3, 300), (4, 400)]
    expected = [(0, 0.125), (1, 1), (2, 1), (3, 100), (4, 100)]
    assert [(row["step"], row["eval/greedy"]) for row in rows if "eval/greedy" in row] == expected
    assert scalars(tmp_path, "loss") == [(1, 1), (2, 2), (3, 300), (4, 400)]
    assert scalars(tmp_path, "eval/greedy") == expected


def test_a_run_that_was_killed_after_its_last_row_has_it_once(tmp_path: Path) -> None:
    for last_step in (0, 2):
        with MetricsWriter(tmp_path, tensorboard=True, last_step=last_step) as metrics:
            for step in range(last_step + 1, 3):
                metrics.log(step, {"loss": 1.0})
            metrics.log(2, {"eval/greedy": 0.5})
    assert [(row["step"], "loss" in row) for row in read_metrics(tmp_path)] == [(1, True), (2, True), (2, False)]
    assert scalars(tmp_path, "eval/greedy") == [(2, 0.5)] and scalars(tmp_path, "loss") == [(1, 1.0), (2, 1.0)]


def test_a_run_that_begins_anew_leaves_nothing_of_the_killed_one(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with MetricsWriter(tmp_path, tensorboard=True) as metrics:
            metrics.log(0, {"eval/greedy": value})
            metrics.log(1, {"loss": value})
    assert [(row["step"], row.get("loss")) for row in read_metrics(tmp_path)] == [(0, None), (1, 2.0)]
    assert scalars(tmp_path, "loss") == [(1, 2.0)] and scalars(tmp_path, "eval/greedy") == [(0, 2.0)]


class WandB(ModuleType):
    """The part of Weights & Biases that is used. `reachable`: whether a run can be started online."""

    class Error(Exception):
        pass

    def __init__(self, reachable: bool):
        super().__init__("wandb")
        self.reachable = reachable
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.modes: list[str | None] = []
        self.finished = 0

    def init(self, *, mode: str | None = None, **settings: Any) -> SimpleNamespace:
        self.modes.append(mode)
        self.settings = settings
        if mode is None and not self.reachable:
            raise self.Error("api_key not configured\n(no-tty)")
        return SimpleNamespace(log=lambda row, step: self.rows.append((step, row)), finish=self._finish)

    def _finish(self, exit_code: int = 0) -> None:
        self.finished += 1
        self.exit_code = exit_code


@pytest.mark.parametrize("reachable", [True, False])
def test_wandb_gets_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reachable: bool
) -> None:
    wandb = WandB(reachable)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run_dir = tmp_path / "run7"
    with MetricsWriter(run_dir, tensorboard=False, wandb="apo", config={"run": {"seed": 3}}) as metrics:
        metrics.log(1, {"reward/mean": np.float32(0.5)})
        metrics.log(2, {"reward/mean": 0.75})
        assert wandb.finished == 0
    assert wandb.rows == [(1, {"reward/mean": 0.5}), (2, {"reward/mean": 0.75})] and wandb.finished == 1
    told = {name: wandb.settings[name] for name in ("project", "group", "config", "dir")}
    first_id = wandb.settings["id"]
    assert told == {"project": "apo", "group": "run7", "config": {"run": {"seed": 3}}, "dir": str(run_dir)}
    assert wandb.modes == ([None] if reachable else [None, "offline"])
    line = (
        f"telemetry.wandb: offline, in {run_dir / 'wandb'}, to be sent by `wandb sync`: api_key not configured (no-tty)"
    )
    assert capsys.readouterr().out == ("" if reachable else f"{line}\n")
    assert len(lines_of(run_dir)) == 2 and wandb.exit_code == 0
    # Resumed after step 1: the same run of theirs, which is not sent step 2 again.
    with MetricsWriter(run_dir, tensorboard=False, wandb="apo", last_step=1) as metrics:
        for step in (2, 3):
            metrics.log(step, {"reward/mean": 0.75})
            metrics.log(step, {"eval/greedy": 0.5})
    assert [(step, *row) for step, row in wandb.rows[2:]] == [
        (2, "eval/greedy"),
        (3, "reward/mean"),
        (3, "eval/greedy"),
    ]
    assert (wandb.settings["id"], wandb.settings["resume"]) == (first_id, "allow")
    # Begun anew, it is another run.
    with MetricsWriter(run_dir, tensorboard=False, wandb="apo") as metrics:
        metrics.log(1, {"reward/mean": 0.75})
    assert wandb.settings["id"] != first_id and len(wandb.rows) == 6


def test_a_missing_wandb_is_said_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert wandb_problems(None) == []
    (line,) = wandb_problems("apo")
    assert line.startswith("telemetry.wandb: apo needs") and "megatron-apo[wandb]" in line and "\n" not in line
    monkeypatch.setattr(metadata, "version", lambda name: "0.31.0")
    assert wandb_problems("apo") == []


def test_phases_add_up_and_count_when_they_raise() -> None:
    timer = PhaseTimer()
    for _ in range(2):
        with timer.phase("generate"):
            time.sleep(0.05)
    with pytest.raises(KeyError), timer.phase("train"):
        time.sleep(0.05)
        raise KeyError
    phases = timer.pop()
    assert list(phases) == ["generate", "train"]
    assert phases["generate"].seconds >= 0.1 and phases["train"].seconds >= 0.05  # a loaded machine sleeps longer
    assert timer.pop() == {}


BUSY = "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass"


def test_cpu_seconds_are_those_of_all_processes_below() -> None:
    """Of one that runs, of one that is its child, of one that has ended, and none of what only waits."""
    timer = PhaseTimer()
    with timer.phase("wait"):
        time.sleep(0.3)
    with timer.phase("own"):
        exec(BUSY)
    below = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BUSY!r}])\n"
    with timer.phase("below"), python(f"{below}{BUSY}"):
        pass  # ended and waited for
    with python("import time") as pid:
        time.sleep(1.0)  # until it is looked for
        child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {BUSY!r}]).wait()"
        with timer.phase("running"):
            timer._cpu.seconds()
            subprocess.run([sys.executable, "-c", child], check=True)
            assert pid in timer._cpu._below
    found = {name: phase.cpu_s for name, phase in timer.pop().items()}
    assert found["wait"] < 0.2 and 0.4 <= found["own"] < 0.6
    assert 0.8 <= found["below"] < 2.5 and 0.4 <= found["running"] < 1.5


def test_a_phase_has_the_peak_that_fell_into_it() -> None:
    """To a tenth of the largest block: other threads of this process allocate too."""
    timer = PhaseTimer()
    with timer.phase("step"):
        block = b"x" * 300 * MB
        del block
        with timer.phase("generate"):
            pass
        for size in (200 * MB, 100 * MB):
            with timer.phase("train"):
                block = b"x" * size
                del block
    first = {name: phase.peak_bytes for name, phase in timer.pop().items()}
    with timer.phase("train"):
        pass
    base = timer.pop()["train"].peak_bytes
    above = {name: (peak - base) / MB for name, peak in first.items()}
    assert above == {
        "step": pytest.approx(300, abs=30),
        "generate": pytest.approx(0, abs=30),
        "train": pytest.approx(200, abs=30),
    }


def test_private_peak_has_no_mapped_file(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"x" * 200 * MB)
    pop_private_peak_bytes()
    base = pop_private_peak_bytes()
    with (tmp_path / "weights").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        sum(mapped[::4096])
        block = b"x" * 50 * MB
        assert abs(pop_private_peak_bytes() - base - len(block)) < 10 * MB
        del block
    pop_private_peak_bytes()
    assert abs(pop_private_peak_bytes() - base) < 10 * MB


@contextmanager
def python(code: str) -> Iterator[int]:
    """A Python process that has run `code` and waits; yields its pid."""
    command = [sys.executable, "-c", f"{code}\nprint('ready', flush=True)\ninput()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            yield process.pid
        finally:
            guard.kill([*guard.descendants(process.pid), process.pid])


def test_private_memory_is_what_was_allocated_and_no_mapped_file(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"x" * 200 * MB)
    touch_file = (
        "import mmap; f = open(r'%s', 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); n = sum(m[::4096])"
    ) % (tmp_path / "weights")
    with python("pass") as plain, python("x = b'x' * 200_000_000") as allocating, python(touch_file) as mapping:
        base = private_bytes(plain)
        assert 1 * MB < base < 30 * MB
        assert abs(private_bytes(allocating) - base - 200 * MB) < 5 * MB
        assert abs(private_bytes(mapping) - base) < 10 * MB
    assert private_bytes(plain) == 0  # it has ended


def test_a_trees_shared_pages_count_once() -> None:
    fork = "import os, time\nx = b'x' * 200_000_000\nif os.fork() == 0: time.sleep(60); os._exit(0)"
    with python("pass") as plain, python(fork) as pid:
        assert abs(tree_private_bytes(pid) - private_bytes(plain) - 200 * MB) < 25 * MB
        # Alone, each of the two holds half of what they share.
        assert abs(private_bytes(pid) - private_bytes(plain) - 100 * MB) < 25 * MB


def test_sampler_keeps_each_labels_peak_and_counts_a_process_once() -> None:
    grandchild = "x = b'x' * 100_000_000; import sys; sys.stdin.read()"
    child = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {grandchild!r}])"
    with MemorySampler(interval_s=0.05) as memory:
        with python("x = b'x' * 50_000_000") as single, memory.watch("single", single):
            time.sleep(0.3)
        with python(child) as parent, memory.watch("tree", parent):
            time.sleep(1.0)
        running: list[int] = []
        with memory.watch("restarted", lambda: running[-1] if running else None):
            with python("x = b'x' * 20_000_000") as first:
                running.append(first)
                time.sleep(0.3)
            with python("x = b'x' * 60_000_000") as second:
                running.append(second)
                time.sleep(0.3)
        with python(child) as parent:
            time.sleep(1.0)
            (child_pid,) = map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
            with memory.watch("parent", parent), memory.watch("child", child_pid):
                time.sleep(0.3)
    peaks = memory.peaks()
    assert 50 * MB < peaks["single"] < 80 * MB
    assert 60 * MB < peaks["restarted"] < 90 * MB
    assert 100 * MB < peaks["tree"] < 150 * MB
    assert 100 * MB < peaks["child"] < 130 * MB
    assert peaks["parent"] < 30 * MB


def test_a_summary_that_many_write_at_once_is_whole(tmp_path: Path) -> None:
    """Workers of stage 1 that end together."""
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda i: RunSummary(tmp_path).add({"vstar": {"prompts": 7, "text": "x" * i}}), range(400)):
            pass
    assert read_summary(tmp_path)["vstar"]["prompts"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
