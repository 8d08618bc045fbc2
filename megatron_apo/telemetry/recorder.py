"""Writes down a training run: metrics.jsonl and TensorBoard as it goes, its part of summary.json at the end.

Every rank has one; the driver's writes. `finish` is collective (it gathers each rank's peak memory).
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from statistics import fmean

import numpy as np
import torch.distributed as dist

from megatron_apo.config import Recipe
from megatron_apo.data.rollout import Rollout
from megatron_apo.parallel.topology import Topology
from megatron_apo.rollout.evaluation import Evaluation
from megatron_apo.rollout.weight_sync import SyncReport
from megatron_apo.telemetry.diagnostics import StepRecord
from megatron_apo.telemetry.memory import MemorySampler
from megatron_apo.telemetry.metrics import MetricsWriter, read_metrics
from megatron_apo.telemetry.summary import RunSummary

_SETTLED_STEPS = 2  # the first steps warm caches and kernels up; means leave them out


class Recorder:
    """Use as a context manager around the run."""

    def __init__(self, recipe: Recipe, topology: Topology, server_pid: Callable[[], int | None]):
        """`server_pid`: of the rollout server's root, whose memory is counted apart; None except on the driver."""
        self._recipe = recipe
        self._topology = topology
        self._server_pid = server_pid
        self._stack = ExitStack()
        self._writer: MetricsWriter | None = None
        self._history: defaultdict[str, list[float]] = defaultdict(list)
        self._syncs: list[SyncReport] = []
        self._proofs: list[float] = []
        self._evaluated: Evaluation

    def __enter__(self) -> Recorder:
        self._memory = self._stack.enter_context(MemorySampler())
        self._stack.enter_context(self._memory.watch(f"trainer rank {self._topology.rank}", os.getpid()))
        if self._topology.is_driver:
            self._stack.enter_context(self._memory.watch("vllm server", self._server_pid))
        if self._topology.is_driver:
            self._recipe.save(self._recipe.run.dir / "recipe.yaml")
            self._writer = self._stack.enter_context(
                MetricsWriter(self._recipe.run.dir, self._recipe.telemetry.tensorboard)
            )
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def resumed(self, step: int) -> None:
        """The run goes on after `step` steps: its rows so far count, those of later steps will be written again."""
        for row in read_metrics(self._recipe.run.dir) if self._topology.is_driver else []:
            for name, value in row.items():
                if row["step"] <= step and name not in ("step", "time") and value is not None:
                    self._history[name].append(value)

    def synced(self, report: SyncReport) -> None:
        self._syncs.append(report)

    def proved(self, difference: float) -> None:
        """`difference`: largest |log-prob| difference between vLLM and trainer on probe tokens."""
        self._proofs.append(difference)

    def evaluated(self, step: int, found: Evaluation) -> None:
        """An evaluation of the weights after `step` steps."""
        self._evaluated = found
        if step == 0 and self._topology.is_driver:
            RunSummary(self._recipe.run.dir).add({"pass_at_1": {"before": asdict(found)}})
        values = {
            "eval/avg_at_k": found.mean,
            "eval/avg_at_k_stderr": found.stderr,
            "eval/greedy": found.greedy,
            "eval/greedy_stderr": found.greedy_stderr,
            "eval/truncated": found.truncated,
        }
        self._log(step, {name: value for name, value in values.items() if value is not None})

    def log(
        self,
        step: int,
        record: StepRecord,
        batch: Sequence[Rollout],
        values: Mapping[str, float],
        seconds: Mapping[str, float],
        *,
        lr: float,
    ) -> None:
        """One training step (`step` counts from 1). `values`: V* by prompt id; `seconds`: by phase."""
        advantages = [rollout.reward - values[rollout.prompt_id] for rollout in batch]
        response_tokens = sum(len(rollout.response_ids) for rollout in batch)
        all_tokens = sum(rollout.num_tokens for rollout in batch)
        learning_s = seconds["reference"] + seconds["train"] + seconds["optimizer"]
        self._log(
            step,
            {
                "reward/mean": fmean(rollout.reward for rollout in batch),
                **record.metrics(),
                "lr": lr,
                "response/mean_tokens": response_tokens / len(batch),
                "response/truncated": fmean(rollout.finish_reason == "length" for rollout in batch),
                "advantage/mean": fmean(advantages),
                "advantage/second_moment": fmean(value * value for value in advantages),
                "value/mean": fmean(values[rollout.prompt_id] for rollout in batch),
                **{f"time/{phase}_s": value for phase, value in seconds.items()},
                "tokens_per_s/generate": response_tokens / seconds["generate"],
                "tokens_per_s/train": all_tokens / learning_s,
            },
        )

    def finish(self, grader_failures: Mapping[str, int]) -> None:
        """Write summary.json. Collective."""
        self._memory.sample()
        peaks: list[dict[str, int]] = [{} for _ in range(self._topology.world_size)]
        dist.all_gather_object(peaks, self._memory.peaks())
        if not self._topology.is_driver:
            return
        split = {
            phase: self._mean(f"time/{phase}_s")
            for phase in ("generate", "reference", "train", "optimizer", "sync", "step")
        }
        RunSummary(self._recipe.run.dir).add(
            {
                "pass_at_1": {"after": asdict(self._evaluated)},
                "sync": {
                    "seconds_mean": fmean(report.seconds for report in self._syncs),
                    "bytes": self._syncs[-1].num_bytes,
                    "count": len(self._syncs),
                },
                "max_log_prob_difference": float(np.max(self._proofs + self._history["mismatch/max"])),  # NaN stays
                "kl": {
                    "per_token": self._history["kl/per_token"][-1],
                    "per_sequence": self._history["kl/per_sequence"][-1],
                },
                "tokens_per_s": {
                    "generation": self._mean("tokens_per_s/generate"),
                    "training": self._mean("tokens_per_s/train"),
                },
                "step_split_s": split,
                "grader_failures": dict(grader_failures),
                "peak_memory_bytes": {label: peak for rank in peaks for label, peak in rank.items()},
            }
        )

    def _mean(self, name: str) -> float:
        values = self._history[name]
        return fmean(values[_SETTLED_STEPS:] or values)

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._history[name].append(value)
        if self._writer:
            self._writer.log(step, values)
