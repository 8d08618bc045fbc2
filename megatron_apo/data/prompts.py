"""Prompts: rows of a recipe's sources, rendered once, the same way for both stages.

A prompt's id is a hash of its row's number and content, and of its source's name where there are several. So it
survives a move of the file, and tells repeated rows apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from megatron_apo.config import Recipe, Source
from megatron_apo.data.presets import RowFormat, column_key, source_format
from megatron_apo.data.procedural import Part, rows_of_task
from megatron_apo.data.rendering import Messages, PromptRenderer, prompt_hash
from megatron_apo.data.rows import Number, any_of, is_text, present_column, read_rows, row_text, value_of
from megatron_apo.telemetry.units import one_line

_RENDER_ROWS = 1024  # rows tokenized in one call
_PARTS = ("role", "content")  # of a message


@dataclass(frozen=True)
class Prompt:
    prompt_id: str  # 32 hex digits
    text: str  # rendered: what the model sees
    text_hash: str  # 32 hex digits, see `prompt_hash`
    token_ids: tuple[int, ...]
    answer: str
    row: int
    source: str = ""  # its name, where there are several
    grader: int = 0  # which of `Recipe.graders`


@dataclass(frozen=True)
class LoadedPrompts:
    """`left_out`: rows of prompts that were left out, by reason and id. too_long: see data.max_prompt_tokens.
    unanswered: the row has no answer, which only a preset or a task allows. dataset_hash covers all rows read.
    """

    prompts: list[Prompt]
    left_out: dict[str, dict[str, int]]
    dataset_hash: str


def load_part(recipe: Recipe, part: Part, renderer: PromptRenderer) -> LoadedPrompts:
    """All prompts of a part, source by source. Raises `ValueError` as `load_prompts`."""
    sources, graders = recipe.sources(part), recipe.graders
    loaded = [
        load_prompts(
            source,
            part,
            renderer.of_format(source_format(source)),
            recipe.data.max_prompt_tokens,
            graders.index(source.plain_grader),
        )
        for source in sources
    ]
    if len(loaded) == 1:
        return loaded[0]
    left_out: dict[str, dict[str, int]] = {}
    for one in loaded:
        for why, rows in one.left_out.items():
            left_out.setdefault(why, {}).update(rows)
    hashes = "".join(one.dataset_hash for one in loaded)
    prompts = [prompt for one in loaded for prompt in one.prompts]
    return LoadedPrompts(prompts, left_out, hashlib.sha256(hashes.encode()).hexdigest() if loaded else "")


def load_prompts(
    source: Source, part: Part, renderer: PromptRenderer, max_prompt_tokens: int, grader: int = 0
) -> LoadedPrompts:
    """Read, render and tokenize a source's rows, its first `source.max_prompts` if given.

    Raises `ValueError` naming the recipe's key and the fix: no such file, dataset or task, a column that is not there,
    a value that is not text, an empty prompt, or not one prompt that is short enough and has an answer. Prints how
    many prompts were left out.
    """
    key, path = source.key, source.path
    columns = source_format(source)
    rows = enumerate(islice(_rows(source, part, columns), source.max_prompts))
    prompt_key = column_key(source.rows, source.rows_key, "prompt_column")
    prompts: list[Prompt] = []
    too_long: dict[str, int] = {}
    unanswered: dict[str, int] = {}
    dataset_hash = hashlib.sha256()
    while block := list(islice(rows, _RENDER_ROWS)):
        texts = [row_prompt(row, columns, prompt_key, path, index) for index, row in block]
        answers = [_row_answer(row, source, columns, index) for index, row in block]
        rendered = render_rows(renderer, texts, prompt_key, path, block[0][0])
        for (index, _), text, answer, (shown, token_ids) in zip(block, texts, answers, rendered, strict=True):
            prompt_id = _hash128(json.dumps([source.name, index, text, answer]))
            dataset_hash.update(bytes.fromhex(prompt_id))
            asked = text if isinstance(text, str) else text[-1]["content"]
            if not (asked and shown and token_ids):
                raise ValueError(f"{key}: row {index} of {path} is an empty prompt; remove it")
            if answer is None:
                unanswered[prompt_id] = index
            elif len(token_ids) > max_prompt_tokens:
                too_long[prompt_id] = index
            else:
                hashed = prompt_hash(shown, token_ids)
                prompts.append(Prompt(prompt_id, shown, hashed, token_ids, answer, index, source.name, grader))
    if not prompts:
        if too_long:
            raise ValueError(
                f"data.max_prompt_tokens: {max_prompt_tokens} is less than each of the {len(too_long)} prompts of "
                f"{path} has; raise it"
            )
        if unanswered:
            own = "use reward reasoning-gym, its verifier" if source.task else "use another preset"
            raise ValueError(
                f"{source.rows_key}.preset: {source.rows.preset}, but none of the {len(unanswered)} rows of {path} has "
                f"an answer in {any_of(columns.answers)}; {own}, or name the column in {source.rows_key}.answer_column"
            )
        raise ValueError(f"{key}: {path} has no rows; give another source")
    left_out = {"too_long": too_long, "unanswered": unanswered}
    for why, row_numbers in left_out.items():
        if row_numbers:
            first = min(row_numbers.values())
            print(f"{key}: {len(row_numbers)} prompts {why.replace('_', ' ')}, left out; the first is row {first}")
    return LoadedPrompts(prompts, left_out, dataset_hash.hexdigest())


def _rows(source: Source, part: Part, columns: RowFormat) -> Iterator[dict[str, Any]]:
    rows = source.rows
    if source.task is not None:
        assert source.max_prompts is not None, "the recipe was checked"
        return rows_of_task(
            source.task, rows.options, part, source.max_prompts, source.max_prompts_key, f"{source.rows_key}.options"
        )
    used = [*columns.prompts, *columns.answers]
    return read_rows(source.path, source.key, rows.split, rows.subset, source.rows_key, used)


def render_rows(
    renderer: PromptRenderer, prompts: Sequence[str | Messages], key: str, path: str, first: int = 0
) -> list[tuple[str, tuple[int, ...]]]:
    """`render_all` of the prompts of successive rows, of which `first` is the first's number.

    Raises `ValueError` naming the row that cannot be rendered; key: the recipe's, of the column."""
    from jinja2 import TemplateError

    try:
        return renderer.render_all(prompts)
    except (ValueError, TemplateError):
        for index, prompt in enumerate(prompts, first):
            try:
                renderer.render(prompt)
            except TemplateError as error:
                raise ValueError(
                    f"{key}: the chat template refuses row {index} of {path} ({one_line(error)}); write its messages "
                    "as the template takes them, or leave the row out"
                ) from error
            except ValueError as error:
                raise ValueError(f"{error} (row {index} of {path})") from error
        raise


def row_prompt(row: dict[str, Any], columns: RowFormat, key: str, path: str, index: int) -> str | Messages:
    """A prompt's text, or its messages, the last of which is the user's."""
    value = value_of(row, present_column(row, columns.prompts, key, path, index))
    if not isinstance(value, list):
        return row_text(row, columns.prompts, key, path, index)
    are_messages = all(
        isinstance(one, dict) and all(is_text(one.get(part)) and not isinstance(one[part], Number) for part in _PARTS)
        for one in value
    )
    if not value or not are_messages or value[-1]["role"] != "user":
        raise ValueError(
            f"{key}: row {index} of {path} has {repr(value)[:200]}, neither text nor messages, each with role "
            "and content, of which the last is the user's; write it so"
        )
    return [{part: one[part] for part in _PARTS} for one in value]


def _row_answer(row: dict[str, Any], source: Source, columns: RowFormat, index: int) -> str | None:
    """The reference answer of a row; None where a row of a preset has none: null, NaN, or no answer in its text."""
    key = column_key(source.rows, source.rows_key, "answer_column")
    column = present_column(row, columns.answers, key, source.path, index)
    value = value_of(row, column)
    if (source.rows.preset or source.task) and (value is None or value != value):
        return None
    return columns.answers[column](row_text(row, [column], key, source.path, index))


def _hash128(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
