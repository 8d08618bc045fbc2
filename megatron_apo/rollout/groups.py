"""The groups of responses that a step learns from, drawn until there are enough of them that are worth it.

A group is one prompt's responses, asked for by one request. An objective may find nothing to learn in some (GRPO has no
advantage where all rewards are equal): other prompts are drawn in their place, as often as it allows, and what is then
still missing is filled with the ones that were left out. Source: the dynamic sampling of DAPO (arXiv 2503.14476,
section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megatron_apo.data.prompt_source import PromptSource
from megatron_apo.data.prompts import Prompt
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.objectives import Objective
from megatron_apo.runtime.collective import on_driver
from megatron_apo.runtime.topology import Topology


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
) -> tuple[RolloutBatch | None, dict[str, float]]:
    """(`count` groups of step `step`, how many were drawn and left out), on the driver; (None, {}) elsewhere.

    prompts: on the driver. may_redraw: not where batches are recorded ones, which are taken as they are. Collective.
    """
    if not may_redraw:
        return sampler.sample([], step, num_samples=objective.samples_per_prompt, draw=0), {}
    chosen = _Chosen(objective, count)
    for draw in range(objective.max_draws):
        missing = on_driver(topology, lambda: chosen.missing)
        if not missing:
            break
        drawn = prompts.draw(missing) if prompts else []
        batch = sampler.sample(drawn, step, num_samples=objective.samples_per_prompt, draw=draw)
        if batch is not None:
            chosen.add(batch)
    return chosen.result() if topology.is_driver else (None, {})


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

    def result(self) -> tuple[RolloutBatch, dict[str, float]]:
        """The batch, in the order in which it was drawn, and what is told of it."""
        told = {"prompts/drawn": len(self._worth) + len(self._others), "prompts/not_worth": len(self._others)}
        known = np.concatenate([batch.reward_B[~np.isnan(batch.reward_B)] for batch in self._batches])
        told["reward/drawn"] = float(known.mean()) if len(known) else math.nan
        if not self._others:
            (batch,) = self._batches
            return batch, told
        return RolloutBatch.of_groups(self._batches, sorted([*self._worth, *self._others[: self.missing]])), told
