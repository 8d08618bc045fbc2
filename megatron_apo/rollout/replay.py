"""Recorded batches in the place of vLLM: the same learning again, without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from megatron_apo.config import Recipe
from megatron_apo.data.prompts import Prompt
from megatron_apo.data.rollouts import RolloutBatch, RolloutFolder
from megatron_apo.parallel.topology import Topology
from megatron_apo.rollout.failures import kept_on_driver


class Replay(AbstractContextManager["Replay"]):
    """Stands where `Rollouts` does, and samples from train.replay. No weights are given to anyone, none are proven, and
    nothing is evaluated: those methods answer None."""

    server_pid = None

    def __init__(self, recipe: Recipe, topology: Topology):
        assert recipe.train.replay is not None
        self._folder = RolloutFolder(recipe.train.replay)
        self._topology = topology
        self.grader_failures: dict[str, int] = {}

    def __exit__(self, *_: object) -> None:
        pass

    def sync(self, version: int) -> None:
        pass

    def prove(self, batch: RolloutBatch) -> None:
        pass

    def evaluate(self, step: int) -> None:
        pass

    def sample(self, prompts: Sequence[Prompt], step: int) -> RolloutBatch | None:
        """The batch that step `step` learned from, on the driver; its prompts are those that were recorded."""
        return kept_on_driver(self._topology, lambda: self._folder.read(step))
