"""What a run has written, as numbers that runs are compared by.

Times are of steps (`time/step_s`): starts, evaluations, saves and the end are none of a method's, and are told apart.
Samples and tokens are all that were drawn, also those of groups that were left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.compute as pc

from megatron_apo.compare.statistics import Cost, reached
from megatron_apo.config import Recipe
from megatron_apo.telemetry.metrics import own_seconds, read_metrics
from megatron_apo.telemetry.plots import smooth
from megatron_apo.telemetry.samples import read_samples
from megatron_apo.telemetry.summary import read_summary
from megatron_apo.values.store import VStarStore

START, EVALUATION, REST, OTHER = "start-up", "evaluation", "between steps and end", "other of steps"
OUTSIDE = "start-up, between steps and end"


@dataclass(frozen=True)
class Stage1:
    """What a store has cost: seconds of as many engines as a run has, responses and their tokens; nothing where none is
    asked for."""

    seconds: float = 0.0
    samples: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, recipe: Recipe) -> Stage1:
        if not recipe.needs_store:
            return cls()
        device_hours, samples, tokens = _spent(recipe.vstar.dir)
        return cls(3600 * device_hours / (recipe.rollout.tp * recipe.rollout.replicas), samples, tokens)


@cache
def _spent(folder: Path) -> tuple[float, int, int]:
    """Device hours of a store, its responses and their tokens. No store changes while methods are compared on it."""
    store = VStarStore.open(folder)
    lengths = pc.list_flatten(store.column("lengths").combine_chunks())
    return sum(store.hours().values()), len(lengths), pc.sum(lengths).as_py() or 0


@dataclass(frozen=True)
class Curve:
    """By step, from the first: mean reward of all that was drawn (None: of none), and what was spent until its end."""

    rewards: list[float | None]
    seconds: list[float]
    samples: list[int]
    tokens: list[int]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], samples_per_prompt: int) -> Curve:
        steps = [row for row in rows if row.get("time/step_s") is not None]
        return cls(
            [row.get("reward/drawn") for row in steps],
            list(accumulate(row["time/step_s"] for row in steps)),
            list(accumulate(row["prompts/drawn"] * samples_per_prompt for row in steps)),
            list(accumulate(row["tokens/drawn"] for row in steps)),
        )

    def smoothed(self, window: int) -> list[float]:
        """Means of the last `window` rewards, of fewer at the start; a step without one has its predecessor's."""
        filled: list[float] = []
        for reward in self.rewards:
            filled.append(reward if reward is not None else (filled[-1] if filled else 0.0))
        return [float(value) for value in smooth(filled, window)]

    def reward_at(self, seconds: float, window: int) -> float | None:
        """The smoothed reward of the last step that ended by then; None before the first."""
        done = sum(end <= seconds for end in self.seconds)
        return self.smoothed(window)[done - 1] if done else None


@dataclass(frozen=True)
class Target:
    """What a run has spent until its smoothed reward reached the target, or in all where it has not. Of each the
    first is without stage 1. step: from 1."""

    step: int | None
    seconds: Cost
    seconds_with_stage_1: Cost
    samples_with_stage_1: Cost
    tokens_with_stage_1: Cost

    @classmethod
    def of(cls, curve: Curve, stage_1: Stage1, target: float, window: int) -> Target:
        place = reached(curve.rewards, target, window)
        last, is_censored = (len(curve.rewards) - 1, True) if place is None else (place, False)

        def cost(spent: Sequence[float], before: float) -> Cost:
            return Cost(before + (spent[last] if spent else 0), is_censored)

        return cls(
            None if place is None else place + 1,
            cost(curve.seconds, 0),
            cost(curve.seconds, stage_1.seconds),
            cost(curve.samples, stage_1.samples),
            cost(curve.tokens, stage_1.tokens),
        )


@dataclass(frozen=True)
class Measured:
    """A finished run. wall_s, cpu_s: by phase, together what its command took. evaluation_s: of one evaluation, the
    mean; None where there was none. final: avg@k on held-out prompts, by prompt; empty where it has none, since it
    failed. kl: of a response, at the last step; None without a reference."""

    curve: Curve
    wall_s: dict[str, float]
    cpu_s: dict[str, float]
    final: dict[str, float]
    greedy: float | None
    kl: float | None
    evaluation_s: float | None = None

    @classmethod
    def of(cls, run_dir: Path, samples_per_prompt: int, launched: float, wall_s: float, cpu_s: float) -> Measured:
        """launched: when the command was started, unix seconds. wall_s, cpu_s: of the whole command."""
        rows = read_metrics(run_dir)
        after = read_summary(run_dir).get("pass_at_1", {}).get("after")
        kls = [row["kl/per_sequence"] for row in rows if row.get("kl/per_sequence") is not None]
        evaluations = [row["eval/seconds"] for row in rows if row.get("eval/seconds") is not None]
        samples = read_samples(run_dir) if after else {}
        return cls(
            Curve.of(rows, samples_per_prompt),
            wall_phases(rows, launched, wall_s),
            cpu_phases(rows, cpu_s),
            {one.prompt_id: one.mean for one in samples[max(samples)]} if samples else {},
            after and after["greedy"],
            kls[-1] if kls else None,
            fmean(evaluations) if evaluations else None,
        )


def wall_phases(rows: Sequence[Mapping[str, Any]], launched: float, total_s: float) -> dict[str, float]:
    """Seconds of a command by phase: its start until the first step or evaluation, the parts of all steps, the
    evaluations, and what is left."""
    if not rows:
        return {START: total_s}
    first = rows[0]["time"] - launched - (rows[0].get("eval/seconds") or rows[0].get("time/step_s") or 0.0)
    found = {START: first, **_parts(rows, "time"), EVALUATION: _sum(rows, "eval/seconds")}
    return found | {REST: total_s - sum(found.values())}


def cpu_phases(rows: Sequence[Mapping[str, Any]], total_s: float) -> dict[str, float]:
    """The same of CPU seconds, which nobody counts when the first step begins."""
    found = {**_parts(rows, "cpu"), EVALUATION: _sum(rows, "eval/cpu_s")}
    return {OUTSIDE: total_s - sum(found.values()), **found}


def _parts(rows: Sequence[Mapping[str, Any]], kind: str) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(f"{kind}/"))
    parts = {name[len(kind) + 1 : -2]: sum(own_seconds(row, name) for row in rows) for name in names}
    step = parts.pop("step", 0.0)
    return parts | {OTHER: step - sum(parts.values())}


def _sum(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(row.get(name) or 0.0 for row in rows)
