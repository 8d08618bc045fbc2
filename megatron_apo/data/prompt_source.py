"""Which prompts the next step learns from: an object whose state a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_apo.config import Recipe
from megatron_apo.data.order import PromptWalk
from megatron_apo.data.prompts import Prompt


class PromptSource:
    """The prompts that training draws, in their order. drawn: how many the steps that are done have used: its state."""

    def __init__(self, recipe: Recipe, prompts: Sequence[Prompt]):
        of_source: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            of_source.setdefault(prompt.source, []).append(prompt)
        sources = recipe.sources("train")
        self._prompts = [of_source[source.name] for source in sources]
        sizes = [len(prompts) for prompts in self._prompts]
        weights = [source.weight or size for source, size in zip(sources, sizes, strict=True)]
        self._walk = PromptWalk(sizes, weights, recipe.run.seed)
        self.drawn = 0

    def restore(self, drawn: int) -> None:
        """Go on after so many prompts."""
        self.drawn = self._walk.drawn = drawn

    def draw(self, count: int) -> list[Prompt]:
        """The next prompts."""
        return [self._prompts[source][index] for source, index in self._walk.draw(count)]

    def step_is_done(self) -> None:
        """What was drawn is used: a run that is ended before draws it again."""
        self.drawn = self._walk.drawn
