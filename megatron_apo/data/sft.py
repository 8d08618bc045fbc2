"""Prompt/response pairs for the warm start, rendered like any prompt: text, or messages.

Prompts are read and shown as data.train's, or where there are several sources by `data` itself, whichever source they
are of: data.prompt_column, or that of data.preset, and data.prompt_format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_apo.config import Recipe, aligned
from megatron_apo.data.presets import column_key, demonstration_format
from megatron_apo.data.prompts import render_rows, row_prompt
from megatron_apo.data.rendering import Messages, PromptRenderer
from megatron_apo.data.rows import read_rows, row_text


@dataclass(frozen=True)
class Examples:
    """Token ids; each response ends with the stop id."""

    prompts: list[list[int]]
    responses: list[list[int]]


def read_examples(recipe: Recipe, renderer: PromptRenderer, stop_ids: Sequence[int]) -> Examples:
    """Read `warmup.data`; tokenizer and stop ids are those of `warmup.start`. A response ends as its chat template ends
    turns, if that is a stop id.

    Raises `ValueError` naming the recipe's key: no file or column, a pair that is too long.
    """
    data, warmup = recipe.data, recipe.warmup
    assert warmup.data is not None
    if not stop_ids:
        raise ValueError("sampling.stop_token_ids: [] gives warmup.data's responses no end; name an id, or null")
    columns, key = demonstration_format(recipe), column_key(data, "data", "prompt_column")
    used = [*columns.prompts, warmup.response_column]
    prompts: list[str | Messages] = []
    responses: list[str] = []
    for index, row in enumerate(read_rows(warmup.data, "warmup.data", columns=used)):
        prompts.append(row_prompt(row, columns, key, warmup.data, index))
        responses.append(row_text(row, [warmup.response_column], "warmup.response_column", warmup.data, index))
    if not prompts:
        raise ValueError(f"warmup.data: {warmup.data} has no rows; give another file")
    rendered = render_rows(renderer, prompts, key, warmup.data)
    targets = renderer.render_responses(responses)
    end = renderer.turn_end[0] if renderer.turn_end and renderer.turn_end[0] in stop_ids else stop_ids[0]
    examples = Examples([list(ids) for _, ids in rendered], [[*ids, end] for ids in targets])
    pairs = zip(examples.prompts, examples.responses, strict=True)
    longest = max(len(prompt) + len(response) for prompt, response in pairs)
    budget, least = recipe.train.tokens_per_micro_batch, aligned(longest, recipe.micro_batch_alignment)
    if least > budget:
        raise ValueError(
            f"train.tokens_per_micro_batch: {budget} cannot hold a pair of {longest} tokens in warmup.data; "
            f"use at least {least}"
        )
    return examples
