"""Writes down a training run: metrics.jsonl and TensorBoard as it goes, its part of summary.json at the end.

Every rank has one; the driver's writes. `log` and `finish` are collective: they gather each rank's memory, and what its
GPU did.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import fmean
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist

from megatron_apo.config import Recipe
from megatron_apo.runtime.topology import Topology
from megatron_apo.telemetry.gpu import GpuMonitor, gpu_uuid
from megatron_apo.telemetry.memory import MemorySampler
from megatron_apo.telemetry.metrics import MetricsWriter, read_metrics
from megatron_apo.telemetry.summary import RunSummary
from megatron_apo.telemetry.timers import Phase

SAVE_S, STEP_S, GENERATE_S = "checkpoint/save_s", "time/step_s", "time/generate_s"  # names in metrics.jsonl
DRAWN_REWARD = "reward/drawn"
_SETTLED_STEPS = 2  # the first steps warm caches and kernels up; means leave them out


class Sync(Protocol):
    """A finished weight sync."""

    @property
    def seconds(self) -> float: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def phases(self) -> Mapping[str, float]:
        """Seconds of its parts, by name."""


@dataclass(frozen=True)
class Evaluation:
    """avg@k and greedy accuracy (mean reward), with standard errors over prompts (None where there is one prompt)."""

    mean: float
    stderr: float | None
    greedy: float
    greedy_stderr: float | None
    samples_per_prompt: int
    num_prompts: int
    truncated: float  # share of the sampled responses that reached the length cap
    sources: dict[str, Evaluation] = field(default_factory=dict)  # of each, by name, where there are several


def _told(prefix: str, found: Evaluation) -> dict[str, float]:
    """By the names of metrics.jsonl."""
    values = {
        "avg_at_k": found.mean,
        "avg_at_k_stderr": found.stderr,
        "greedy": found.greedy,
        "greedy_stderr": found.greedy_stderr,
        "truncated": found.truncated,
    }
    return {f"{prefix}/{name}": value for name, value in values.items() if value is not None}


class Recorder:
    """Use as a context manager around the run."""

    def __init__(
        self, recipe: Recipe, topology: Topology, memory_pids: Callable[[], Mapping[str, int | None]], start: int = 0
    ):
        """memory_pids: the roots of the engines' processes, by name (None: not running), whose memory is counted apart;
        none except on the driver.

        start: steps already taken. The rows of these count; those of later steps, which a killed run left and which
        will be written again, are removed.
        """
        self._recipe = recipe
        self._topology = topology
        self._memory_pids = memory_pids
        self._start = start
        self._gpu: GpuMonitor | None = None
        self._stack = ExitStack()
        self._writer: MetricsWriter | None = None
        self._history: defaultdict[str, list[float]] = defaultdict(list)
        self._syncs: list[Sync] = []
        self._proofs: list[float] = []
        self._evaluated: Evaluation | None = None

    def __enter__(self) -> Recorder:
        self._memory = self._stack.enter_context(MemorySampler())
        self._stack.enter_context(self._memory.watch(f"trainer rank {self._topology.rank}", os.getpid()))
        if self._topology.device.type == "cuda":
            self._gpu = self._stack.enter_context(GpuMonitor(gpu_uuid(self._topology.device)))
        if self._topology.is_driver:
            for name in self._memory_pids():
                self._stack.enter_context(self._memory.watch(name, partial(self._pid_of, name)))
            self._recipe.save(self._recipe.run.dir / "recipe.yaml")
            telemetry, config = self._recipe.telemetry, self._recipe.model_dump(mode="json")
            self._writer = self._stack.enter_context(
                MetricsWriter(
                    self._recipe.run.dir, telemetry.tensorboard, telemetry.wandb, config, last_step=self._start
                )
            )
            self._read_history()
        return self

    def _pid_of(self, name: str) -> int | None:
        return self._memory_pids()[name]

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def _read_history(self) -> None:
        """What the run's earlier rows say counts in the summary too."""
        for row in read_metrics(self._recipe.run.dir) if self._start else []:
            for name, value in row.items():
                if name not in ("step", "time") and value is not None:
                    self._history[name].append(value)

    def synced(self, report: Sync | None) -> None:
        """None: no weights were given to anyone, as in a replay."""
        if report is not None:
            self._syncs.append(report)

    def proved(self, difference: float | None) -> None:
        """`difference`: largest |log-prob| difference between vLLM and trainer on probe tokens; None: not proven."""
        if difference is not None:
            self._proofs.append(difference)

    def evaluated(self, step: int, found: Evaluation | None, phase: Phase | None = None) -> None:
        """An evaluation of the weights after `step` steps, and what it took; None: there was none. Collective."""
        if found is None:
            return
        cpu_s = self._gathered(phase.cpu_s) if phase else []
        self._evaluated = found
        if step == 0 and self._topology.is_driver:
            RunSummary(self._recipe.run.dir).add({"pass_at_1": {"before": asdict(found)}})
        self._log(
            step,
            _told("eval", found)
            | {
                name: value
                for source, one in found.sources.items()
                for name, value in _told(f"eval/{source}", one).items()
            }
            | ({"eval/seconds": phase.seconds, "eval/cpu_s": sum(cpu_s)} if phase else {}),
        )

    def has_evaluated(self, step: int) -> bool:
        """Whether the run has an evaluation of the weights after `step` steps or more; False except on the driver."""
        rows = read_metrics(self._recipe.run.dir) if self._topology.is_driver else []
        return any(row["step"] >= step and "eval/avg_at_k" in row for row in rows)

    def saved(self, step: int, seconds: float) -> None:
        """A checkpoint of what `step` steps have made was written."""
        self._log(step, {SAVE_S: seconds})

    def last(self, name: str) -> float | None:
        """The newest value of a metric, also of the run before it was resumed; None where there is none."""
        return self._history[name][-1] if name in self._history else None

    def mean_of_last(self, name: str, count: int) -> float | None:
        """Of a metric's last `count` values, also of the run before it was resumed; None where there are fewer."""
        known = [value for value in self._history[name] if math.isfinite(value)][-count:]
        return fmean(known) if len(known) == count else None

    def total(self, name: str) -> float:
        """Of all values of a metric, also of the run before it was resumed."""
        return sum(self._history[name])

    def log(self, step: int, values: Mapping[str, float], phases: Mapping[str, Phase]) -> None:
        """One training step (`step` counts from 1): `values` by the names of metrics.jsonl. Collective."""
        peaks = {name: phase.peak_bytes for name, phase in phases.items() if phase.peak_bytes}
        cpu_s = {name: phase.cpu_s for name, phase in phases.items()}
        ranks = self._gathered((peaks, self._gpu.pop() if self._gpu else {}, cpu_s))
        if self._topology.is_driver:
            times = {f"time/{name}_s": phase.seconds for name, phase in phases.items()}
            self._log(step, {**values, **times, **machine_metrics(ranks)})

    def finish(self, grader_failures: Mapping[str, int]) -> None:
        """Write summary.json. Collective."""
        self._memory.sample()
        peaks = self._gathered(self._memory.peaks())
        if not self._topology.is_driver:
            return
        found: dict[str, Any] = {
            "max_log_prob_difference": float(np.max(self._proofs + self._history["mismatch/max"])),  # NaN stays
            "mismatch": {
                "mean": self._mean("mismatch/mean"),
                "warned_steps": int(sum(self._history["mismatch/warned"])),
            },
            "tokens_per_s": {"training": self._mean("tokens_per_s/train")},
            "tflops_per_rank": self._means("tflops_per_rank/"),
            "mfu": self._means("mfu/"),
            "step_split_s": {name.removesuffix("_s"): mean for name, mean in self._means("time/").items()},
            "skipped_steps": int(sum(self._history["skipped_steps"])),
            "grader_failures": dict(grader_failures),
            "peak_memory_bytes": {label: peak for rank in peaks for label, peak in rank.items()},
            "peak_phase_bytes": {
                name.removeprefix("memory/").removesuffix("_bytes"): max(values)
                for name, values in self._history.items()
                if name.startswith("memory/")
            },
        }
        if self._history["kl/per_token"]:  # there is a reference
            found["kl"] = {name: self._history[f"kl/{name}"][-1] for name in ("per_token", "per_sequence")}
        if self._evaluated:
            found["pass_at_1"] = {"after": asdict(self._evaluated)}
        if self._history["tokens_per_s/generate"]:
            found["tokens_per_s"]["generation"] = self._mean("tokens_per_s/generate")
        if self._syncs:
            found["sync"] = {
                "seconds_mean": fmean(report.seconds for report in self._syncs),
                "bytes": self._syncs[-1].num_bytes,
                "count": len(self._syncs),
                "phase_seconds_mean": {
                    name: fmean(report.phases.get(name, 0.0) for report in self._syncs)
                    for name in self._syncs[-1].phases
                },
            }
        RunSummary(self._recipe.run.dir).add(found)

    def _gathered(self, value: Any) -> list[Any]:
        """Every rank's `value` on the driver, nothing elsewhere. Collective."""
        found: list[Any] | None = [None] * self._topology.world_size if self._topology.is_driver else None
        dist.gather_object(value, found)
        return found or []

    def _mean(self, name: str) -> float:
        values = self._history[name]
        return fmean(values[_SETTLED_STEPS:] or values)

    def _means(self, prefix: str) -> dict[str, float]:
        return {name.removeprefix(prefix): self._mean(name) for name in list(self._history) if name.startswith(prefix)}

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._history[name].append(value)
        if self._writer:
            self._writer.log(step, values)


def machine_metrics(
    ranks: Sequence[tuple[Mapping[str, int], Mapping[str, float], Mapping[str, float]]],
) -> dict[str, float]:
    """Of each rank's (peak bytes by phase, what its GPU did, CPU seconds by phase): the largest peak of a phase, every
    GPU by itself, and the CPU seconds of all."""
    found: dict[str, float] = {}
    for rank, (peaks, gpu, cpu_s) in enumerate(ranks):
        for phase, peak in peaks.items():
            found[f"memory/{phase}_bytes"] = max(peak, found.get(f"memory/{phase}_bytes", 0))
        for phase, seconds in cpu_s.items():
            found[f"cpu/{phase}_s"] = seconds + found.get(f"cpu/{phase}_s", 0.0)
        found |= {f"gpu/rank{rank}/{name}": value for name, value in gpu.items()}
    return found
