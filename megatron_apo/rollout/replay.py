"""Recorded batches in the place of vLLM: the same learning again, without an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np

from megatron_apo.config import Recipe, RecipeError
from megatron_apo.data.layout import plan_batch
from megatron_apo.data.prompts import Prompt
from megatron_apo.data.rollouts import RolloutBatch, RolloutFolder
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.runtime.collective import driver_only

if TYPE_CHECKING:
    from megatron_apo.runtime.topology import Topology
    from megatron_apo.values.store import PromptValues

_READERS = 8  # files read at once


class Replay(AbstractContextManager["Replay"]):
    """Stands where `Rollouts` does, and samples from train.replay. No weights are given to anyone, none are proven, and
    nothing is evaluated: those methods answer None."""

    def __init__(self, recipe: Recipe, topology: Topology):
        assert recipe.train.replay is not None
        self._folder = RolloutFolder(recipe.train.replay)
        self._topology = topology
        self.grader_failures: dict[str, int] = {}

    def __exit__(self, *_: object) -> None:
        pass

    def interrupt(self) -> None:
        """There is nothing to drop."""

    def sync(self, version: int) -> None:
        pass

    def prove(self) -> None:
        pass

    def evaluate(self, step: int) -> None:
        pass

    def memory_pids(self) -> dict[str, int | None]:
        return {}

    def step_metrics(self) -> dict[str, float]:
        return {}

    def sample(
        self, prompts: Sequence[Prompt], step: int, *, num_samples: int = 1, draw: int = 0
    ) -> RolloutBatch | None:
        """The batch that step `step` learned from, on the driver; its prompts are those that were recorded."""
        return driver_only(self._topology, lambda: self._folder.read(step))

    def stream(
        self, prompts: Sequence[Prompt], step: int, *, num_samples: int = 1, enough: int
    ) -> Iterator[tuple[list[int], RolloutBatch | None]]:
        """The same in the waves in which the recorded step took it."""
        waves = driver_only(self._topology, lambda: self._folder.read(step).waves)
        all_rows: list[list[int]] = self._topology.broadcast([wave.rows for wave in waves or ()])
        for number, rows in enumerate(all_rows):
            yield rows, waves[number].batch if waves else None


def check_replay(recipe: Recipe, start: int, vstar: PromptValues | None) -> None:
    """Read the batches of all steps from `start` on, and hold them against recipe, model and V* store.

    Raises `RecipeError`, one line a file. Does nothing where the recipe has no train.replay.
    """
    if recipe.train.replay is None:
        return
    folder, steps = RolloutFolder(recipe.train.replay), range(start, recipe.train.steps)
    if missing := [step for step in steps if not folder.path(step).is_file()]:
        recorded = (
            f"use train.steps={missing[0]}, or another folder"
            if missing[0] > start
            else ("give the folder that train --record wrote")
        )
        raise RecipeError(
            [
                f"train.replay: {folder.folder} lacks {folder.path(missing[0]).name}, and {len(missing)} of "
                f"{len(steps)} batches in all; {recorded}"
            ]
        )
    vocab_size = read_hf_config(recipe.model.path).vocab_size

    def problem_of(step: int) -> str | None:
        try:
            _check_batch(recipe, folder.read(step), vocab_size, vstar)
        except ValueError as error:
            path = f"{folder.path(step)}"
            return f"train.replay: {' '.join(str(error).removeprefix(f'{path}: ').split())} ({path})"
        return None

    with ThreadPoolExecutor(_READERS) as readers:
        if problems := [problem for problem in readers.map(problem_of, steps) if problem]:
            raise RecipeError(problems)


def _check_batch(recipe: Recipe, batch: RolloutBatch, vocab_size: int, vstar: PromptValues | None) -> None:
    """Raise `ValueError` for a batch that this recipe, model or store cannot take."""
    ids, parts = batch.sequences.token_ids_T, recipe.train.minibatches * recipe.parallel.dp
    if not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"token ids from {ids.min()} to {ids.max()}, and model.path has 0 to {vocab_size - 1}")
    if len(batch) % parts:
        raise ValueError(
            f"{len(batch)} responses do not divide into train.minibatches={recipe.train.minibatches} x "
            f"parallel.dp={recipe.parallel.dp}; change these"
        )
    expected = recipe.train.prompts_per_step * recipe.objective.samples_per_prompt
    if recipe.train.streamed and len(batch) != expected:
        raise ValueError(
            f"{len(batch)} responses, and train.streamed=true takes the {expected} of train.prompts_per_step="
            f"{recipe.train.prompts_per_step}; set that to what was recorded"
        )
    if problem := _group_problem(batch, recipe.objective.samples_per_prompt, len(batch) // recipe.train.minibatches):
        raise ValueError(problem)
    if unhashed := [prompt_id for prompt_id in batch.prompt_ids if not _is_id(prompt_id)]:
        raise ValueError(f"{unhashed[0]!r} is not the id of a prompt; give a file of train --record")
    if np.isnan(batch.reward_B[~batch.masked_B(recipe.reward.truncated)]).any():
        raise ValueError(
            f"responses have no reward, and reward.truncated={recipe.reward.truncated} needs them; use "
            "reward.truncated=mask, as where they were recorded"
        )
    if vstar is not None:
        vstar.lookup(list(batch.prompt_ids))
    plan_batch(recipe, batch.sequences, num_minibatches=recipe.train.minibatches, dp=recipe.parallel.dp)


def _group_problem(batch: RolloutBatch, samples_per_prompt: int, minibatch: int) -> str | None:
    """Why a method cannot learn from the batch's groups. minibatch: responses of one."""
    if samples_per_prompt == 1:
        return None
    if sizes := {len(rows) for rows in batch.groups} - {samples_per_prompt}:
        return (
            f"groups of {min(sizes)} responses, and objective.samples_per_prompt is {samples_per_prompt}; set that to "
            "what was recorded"
        )
    if any(rows[0] // minibatch != rows[-1] // minibatch for rows in batch.groups):
        return "a group lies in two minibatches; use another train.minibatches"
    return None


def _is_id(text: str) -> bool:
    return len(text) == 32 and all(character in "0123456789abcdef" for character in text)
