"""What is written of a training step and of a run, from numbers that a person can follow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_apo.config import Recipe, build_recipe
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.learner.diagnostics import StepRecord
from megatron_apo.learner.rollout_metrics import peak_flops, response_metrics, rollout_metrics
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.objectives import Stats
from megatron_apo.rollout.groups import Drawn
from megatron_apo.rollout.weight_sync import SyncReport
from megatron_apo.runtime.topology import Topology
from megatron_apo.stages.train import _is_over as is_over
from megatron_apo.telemetry.recorder import Evaluation, Recorder, machine_metrics
from megatron_apo.telemetry.timers import Phase
from tests.batches import make_batch

# Forward of a prompt of 3 and a response of 2: see test_flops.py.
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
}
FORWARD = 15_104
SUMS = ("loss", "count", "tokens", "log_ratio", "mismatch", "mult_prob_error")
SUMS += ("sequences", "sequence_ratio", "sequence_ratio_square")


@pytest.fixture
def topology() -> Iterator[Topology]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Topology(
            rank=0,
            world_size=1,
            tp_rank=0,
            pp_rank=0,
            dp_rank=0,
            tp=1,
            pp=1,
            dp=1,
            tp_group=None,
            pp_group=None,
            dp_group=None,
            device=torch.device("cpu"),
        )
    finally:
        dist.destroy_process_group()


def make_recipe(folder: Path, *overrides: str) -> Recipe:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tree = {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(folder)},
        "data": {"train": "train.jsonl"},
        "vstar": {"dir": "vstar"},
        "telemetry": {"tensorboard": False},
    }
    return build_recipe(tree, overrides)


def batch_of(lengths: Sequence[int], finish_reasons: Sequence[str] | None = None) -> RolloutBatch:
    """Responses of so many tokens to one prompt of three, all rewarded with 1."""
    return make_batch(
        [(1, 1, 1)] * len(lengths),
        [(1,) * length for length in lengths],
        rewards=[1.0] * len(lengths),
        log_probs=[(-1.0,) * length for length in lengths],
        prompt_ids=["p"] * len(lengths),
        finish_reasons=finish_reasons,
    )


def record(topology: Topology) -> StepRecord:
    found = StepRecord(2e-3)
    sums = {name: torch.tensor(1.0) for name in SUMS}
    maxima = {
        name: torch.tensor(1.0) for name in ("log_ratio", "mismatch", "sequence_ratio") if name in ("mismatch", *sums)
    }
    for grad_norm in (1.0, float("nan")):
        found.add([Stats(sums, maxima)])
        found.add_step(grad_norm)
    found.tell({"mismatch/warned": 1, "advantage/mean": 0.75})
    return found.gather(topology)


def log(
    recorder: Recorder, recipe: Recipe, learned: StepRecord, step: int, batch: RolloutBatch, phases: dict, lr: float
) -> None:
    """A step as the training loop has it written."""
    seconds = {name: phase.seconds for name, phase in phases.items()}
    rollouts = rollout_metrics(
        batch,
        seconds,
        read_hf_config(recipe.model.path),
        masked_B=batch.truncated_B,
        num_ranks=recorder._topology.world_size,
        peak_flops=peak_flops(recipe, torch.device("cpu")),
        has_reference=True,
    )
    if "generate" in seconds:
        rollouts |= Drawn(batch, [batch]).metrics(seconds["step"], seconds["generate"])
    recorder.log(step, {**rollouts, **learned.metrics(), "lr": lr}, phases)


def write_run(recipe: Recipe, topology: Topology, steps: int) -> tuple[list[dict], dict]:
    """(rows, summary) of a run whose steps take 8 s; memory of the phase "train" grows by 1 GB a step."""
    times = {"generate": 5.0, "reference": 0.5, "train": 1.0, "optimizer": 0.5, "sync": 1.0, "step": 8.0}
    with Recorder(recipe, topology, dict) as recorder:
        recorder.synced(SyncReport(0, 0.1, 100, {}, {"load": 0.05}))
        recorder.proved(1e-6)
        for step in range(1, steps + 1):
            phases = {name: Phase(value, 10**9 * (step if name == "train" else 1)) for name, value in times.items()}
            log(recorder, recipe, record(topology), step, batch_of([2, 2]), phases, lr=1e-6)
        recorder.evaluated(steps, Evaluation(0.5, None, 0.5, None, 1, 1, 0.0))
        recorder.finish({})
    rows = [json.loads(line) for line in (recipe.run.dir / "metrics.jsonl").read_text().splitlines()]
    return rows, json.loads((recipe.run.dir / "summary.json").read_text())


def test_a_run_without_a_reference_ends_as_any_other(tmp_path: Path, topology: Topology, monkeypatch) -> None:
    """Nothing is told of the KL, and the summary is written."""
    monkeypatch.setitem(globals(), "SUMS", [name for name in SUMS if name != "log_ratio"])
    rows, summary = write_run(make_recipe(tmp_path), topology, 2)
    assert "kl" not in summary and not any(name.startswith("kl/") for row in rows for name in row)
    assert summary["skipped_steps"] == 2 and rows[0]["loss"] == 1


def test_step_and_summary_have_rates_and_memory(tmp_path: Path, topology: Topology) -> None:
    rows, summary = write_run(make_recipe(tmp_path, "telemetry.peak_tflops=1e-6"), topology, steps=4)
    flops = 2 * 4 * FORWARD  # two sequences; the reference's forward, and three for forward and backward
    assert rows[0]["mfu/train"] == pytest.approx(flops / 2.0 / 1e6)
    assert rows[0]["tflops_per_rank/reference"] == pytest.approx(2 * FORWARD / 0.5 / 1e12)
    assert rows[0]["tokens_per_s/train"] == 10 / 2.0 and rows[0]["tokens_per_s/generate"] == 4 / 5.0
    assert rows[0]["advantage/mean"] == 0.75 and rows[0]["time/step_s"] == 8.0
    assert [row["memory/train_bytes"] for row in rows[:4]] == [10**9, 2 * 10**9, 3 * 10**9, 4 * 10**9]
    assert summary["peak_phase_bytes"]["train"] == 4 * 10**9 and summary["peak_phase_bytes"]["generate"] == 10**9
    assert summary["mfu"]["train"] == pytest.approx(flops / 2.0 / 1e6)
    assert set(summary["tflops_per_rank"]) == {"reference", "forward_backward", "train"}
    assert summary["peak_memory_bytes"]["trainer rank 0"] > 10**6
    assert summary["mismatch"] == {"mean": 1.0, "warned_steps": 4}
    assert summary["sync"]["phase_seconds_mean"] == {"load": 0.05}


def test_no_mfu_on_a_device_whose_peak_nobody_gave(tmp_path: Path, topology: Topology) -> None:
    rows, summary = write_run(make_recipe(tmp_path), topology, steps=1)
    assert not [name for row in rows for name in row if name.startswith(("mfu/", "gpu/"))]
    assert summary["mfu"] == {} and summary["tflops_per_rank"]["train"] > 0


def test_every_ranks_gpu_and_the_largest_peak() -> None:
    ranks = [
        ({"train": 5, "step": 7}, {"power_w": 300.0}, {"train": 1.5, "step": 2.0}),
        ({"train": 6, "step": 6}, {"power_w": 400.0, "xid": 79}, {"train": 0.25, "step": 0.5}),
    ]
    assert machine_metrics(ranks) == {
        "memory/train_bytes": 6,
        "memory/step_bytes": 7,
        "cpu/train_s": 1.75,
        "cpu/step_s": 2.5,
        "gpu/rank0/power_w": 300.0,
        "gpu/rank1/power_w": 400.0,
        "gpu/rank1/xid": 79,
    }


def test_the_driver_alone_writes_and_has_what_every_rank_sent(
    tmp_path: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, one after the other: what `gather_object` is asked for is noted, and given to the driver."""
    sent: list[Any] = []

    def gather(value: Any, found: list[Any] | None) -> None:
        if found is None:
            sent.append(value)
        else:
            assert found == [None, None]
            found[:] = [value, sent.pop(0)]

    monkeypatch.setattr(dist, "gather_object", gather)
    recipe = make_recipe(tmp_path)
    for rank, peak in ((1, 7), (0, 5)):
        phases = {name: Phase(1.0, peak) for name in ("generate", "reference", "train", "optimizer", "sync", "step")}
        with Recorder(recipe, replace(topology, rank=rank, world_size=2), dict) as recorder:
            recorder.synced(SyncReport(0, 0.1, 100, {}))
            recorder.proved(1e-6)
            log(recorder, recipe, record(topology), 1, batch_of([2, 2]), phases, lr=1e-6)
            recorder.evaluated(1, Evaluation(0.5, None, 0.5, None, 1, 1, 0.0), Phase(4.0, 1, cpu_s=1.5 + rank))
            recorder.finish({})
        assert len(sent) == 3 * rank and (tmp_path / "run").exists() == (rank == 0)
    row, evaluated = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["memory/train_bytes"] == 7
    assert (evaluated["eval/seconds"], evaluated["eval/cpu_s"]) == (4.0, 1.5 + 2.5)
    assert row["tflops_per_rank/reference"] == pytest.approx(2 * FORWARD / 2 / 1e12)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"trainer rank 0", "trainer rank 1"} <= summary["peak_memory_bytes"].keys()


def test_lengths_and_truncation() -> None:
    batch = batch_of(list(range(1, 201)), finish_reasons=["length", *["stop"] * 199])
    assert response_metrics(batch) == {
        "response/mean_tokens": 100.5,
        "response/p50_tokens": 100.5,
        "response/p95_tokens": pytest.approx(190.05),
        "response/max_tokens": 200,
        "response/truncated": 1 / 200,
    }


def test_a_resumed_run_has_no_step_twice_and_counts_all_of_them(tmp_path: Path, topology: Topology) -> None:
    recipe, times = make_recipe(tmp_path), {"reference": 0.5, "train": 1.0, "optimizer": 0.5, "step": 2.0}
    phases = {name: Phase(value, 1) for name, value in times.items()}  # of a replay: nothing is generated
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # killed after step 3, resumed after step 2
        with Recorder(recipe, topology, dict, start) as recorder:
            recorder.synced(None)
            recorder.proved(None)
            for step in steps:
                log(recorder, recipe, record(topology), step, batch_of([2]), phases, lr=float(step + 10 * start))
            if start:
                recorder.evaluated(4, None)
                recorder.finish({})
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["lr"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["skipped_steps"] == 4  # one of each step that counts
    assert not [name for row in rows for name in row if name.startswith("rollout/")]
    assert not summary.keys() & {"sync", "pass_at_1"} and "generation" not in summary["tokens_per_s"]


def test_a_training_is_over_at_its_target_also_where_it_was_resumed(tmp_path: Path, topology: Topology) -> None:
    """Steps of 8 s and 256 responses. The mean of two steps is what is held against the target, and one that has no
    reward is none."""
    recipe = make_recipe(tmp_path, "train.steps=9", "train.target_reward=0.5", "train.target_responses=500")

    def over_after(start: int, rewards: Sequence[float], of: Recipe = recipe) -> list[bool]:
        found = []
        with Recorder(recipe, topology, dict, start) as recorder:
            found.append(is_over(of, recorder, start))
            for step, reward in enumerate(rewards, start + 1):
                recorder.log(step, {"reward/drawn": reward}, {"step": Phase(8.0, 1)})
                found.append(is_over(of, recorder, step))
        return found

    nan = float("nan")
    assert over_after(0, [0.9, 0.0, 0.8, nan, 0.2]) == [False, False, False, False, False, True]
    assert over_after(5, []) == [True] and over_after(4, []) == [False]
    assert over_after(3, [0.1, 0.9]) == [False, False, True]
    assert over_after(2, [0.0] * 7)[-2:] == [False, True]  # train.steps
    minutes = make_recipe(tmp_path, "train.max_minutes=0.4")
    assert over_after(0, [0.0, 0.0, 0.0], minutes) == [False, False, False, True]
    assert over_after(2, [0.0], minutes) == [False, True]
