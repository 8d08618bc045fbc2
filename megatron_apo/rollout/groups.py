"""The groups of responses that a step learns from, drawn until there are enough of them that are worth it.

A group is one prompt's responses, asked for by one request. An objective may find nothing to learn in some (GRPO has no
advantage where all rewards are equal): other prompts are drawn in their place, as often as it allows, and what is then
still missing is filled with the ones that were left out. Source: the dynamic sampling of DAPO (arXiv 2503.14476,
section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_apo.data.prompt_source import PromptSource
from megatron_apo.data.prompts import Prompt
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.objectives import Objective
from megatron_apo.runtime.collective import on_driver
from megatron_apo.runtime.topology import Topology


@dataclass(frozen=True)
class Drawn:
    """A step's groups, on the driver.

    batch: what is learned from; None elsewhere. draws: all that was sampled for it, a batch a draw; of recorded
    batches, nothing. num_not_worth: groups that taught nothing.
    """

    batch: RolloutBatch | None
    draws: Sequence[RolloutBatch] = ()
    num_not_worth: int = 0

    def metrics(self, step_s: float, generate_s: float) -> dict[str, float]:
        """What the sampling was like, by the names of metrics.jsonl, in a step of so many seconds of which vLLM took
        `generate_s`; of recorded batches nothing.

        `rollout/slowest_share` is the share of the step in which only the slowest response of a draw was still running,
        `rollout/slowest_1pct_share` that in which only the slowest 1 % (at least one) were.
        """
        if not self.draws:
            return {}
        known = np.concatenate([batch.reward_B[~np.isnan(batch.reward_B)] for batch in self.draws])
        tokens = sum(int(batch.sequences.response_lengths_B.sum()) for batch in self.draws)
        return {
            "prompts/drawn": sum(len(batch.groups) for batch in self.draws),
            "prompts/not_worth": self.num_not_worth,
            "reward/drawn": float(known.mean()) if len(known) else math.nan,
            "tokens/drawn": tokens,
            "tokens_per_s/generate": tokens / generate_s,
            "rollout/slowest_share": sum(_tail_s(batch, 1 / len(batch)) for batch in self.draws) / step_s,
            "rollout/slowest_1pct_share": sum(_tail_s(batch, 0.01) for batch in self.draws) / step_s,
        }


class Sampler(Protocol):
    """`Rollouts`, or what stands in its place."""

    def sample(self, prompts: Sequence[Prompt], step: int, *, num_samples: int, draw: int) -> RolloutBatch | None: ...


def sample_groups(
    topology: Topology,
    sampler: Sampler,
    prompts: PromptSource | None,
    objective: Objective,
    count: int,
    step: int,
    *,
    may_redraw: bool = True,
) -> Drawn:
    """`count` groups of step `step`.

    prompts: on the driver. may_redraw: not where batches are recorded ones, which are taken as they are. Collective.
    """
    if not may_redraw:
        return Drawn(sampler.sample([], step, num_samples=objective.samples_per_prompt, draw=0))
    chosen = _Chosen(objective, count)
    for draw in range(objective.max_draws):
        missing = on_driver(topology, lambda: chosen.missing)
        if not missing:
            break
        drawn = prompts.draw(missing) if prompts else []
        batch = sampler.sample(drawn, step, num_samples=objective.samples_per_prompt, draw=draw)
        if batch is not None:
            chosen.add(batch)
    return chosen.result() if topology.is_driver else Drawn(None)


class _Chosen:
    """Of the groups that were drawn, those that are learned from; the others wait."""

    def __init__(self, objective: Objective, count: int):
        self._objective, self._count = objective, count
        self._batches: list[RolloutBatch] = []
        self._worth: list[tuple[int, int]] = []
        self._others: list[tuple[int, int]] = []

    @property
    def missing(self) -> int:
        return self._count - len(self._worth)

    def add(self, batch: RolloutBatch) -> None:
        for number, rows in enumerate(batch.groups):
            reward_G = batch.reward_B[rows]
            is_worth = self._objective.learns_from(reward_G[~np.isnan(reward_G)].tolist())  # masked ones have none
            (self._worth if is_worth else self._others).append((len(self._batches), number))
        self._batches.append(batch)

    def result(self) -> Drawn:
        """The groups, in the order in which they were drawn."""
        if not self._others:
            (batch,) = self._batches
        else:
            batch = RolloutBatch.of_groups(self._batches, sorted([*self._worth, *self._others[: self.missing]]))
        return Drawn(batch, self._batches, len(self._others))


def _tail_s(batch: RolloutBatch, share: float) -> float:
    """Seconds in which no more than this share of a draw's responses, at least one, were still running."""
    arrivals, num_slowest = sorted(batch.seconds_B.tolist()), math.ceil(len(batch) * share)
    return arrivals[-1] - (arrivals[-1 - num_slowest] if len(arrivals) > num_slowest else 0.0)
