"""Prompts: rows of a source, rendered once, the same way for both stages.

A prompt's id is a hash of its source's name, row and content, so it survives a move of the file and tells repeated rows
apart. Sources are read through `datasets`: a .jsonl or .parquet file (streamed, nothing cached), or a hub dataset.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_apo.config import DataConfig
from megatron_apo.data.presets import RowFormat, column_key, row_format
from megatron_apo.data.rendering import Messages, PromptRenderer
from megatron_apo.telemetry.units import one_line

_FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_RENDER_ROWS = 1024  # rows tokenized in one call


@dataclass(frozen=True)
class Prompt:
    prompt_id: str  # 32 hex digits
    text: str  # rendered: what the model sees
    text_hash: str  # 32 hex digits, of `text`
    token_ids: tuple[int, ...]
    answer: str
    row: int


@dataclass(frozen=True)
class LoadedPrompts:
    """`left_out`: rows of prompts that were left out, by reason and id. too_long: see data.max_prompt_tokens.
    unanswered: the row has no answer, which only a preset allows. dataset_hash covers all rows read.
    """

    prompts: list[Prompt]
    left_out: dict[str, dict[str, int]]
    dataset_hash: str


def load_prompts(
    source: str, data: DataConfig, renderer: PromptRenderer, max_prompts: int | None = None
) -> LoadedPrompts:
    """Read, render and tokenize `source` (data.train or data.eval), its first `max_prompts` rows if given.

    Raises `ValueError` naming the recipe's key and the fix: no such file or dataset, a column that is not there, a
    value that is not text, an empty prompt, or not one prompt that is short enough and has an answer. Prints how many
    prompts were left out.
    """
    key = "data.eval" if source == data.eval and source != data.train else "data.train"
    hub_name = f"{source}/{data.subset}" if data.subset else source
    name = Path(source).name if _file_format(source) else f"{hub_name}:{data.split}"
    rows = enumerate(islice(read_rows(source, key, data.split, data.subset), max_prompts))
    columns, prompt_key = row_format(data), column_key(data, "prompt_column")
    prompts: list[Prompt] = []
    too_long: dict[str, int] = {}
    unanswered: dict[str, int] = {}
    dataset_hash = hashlib.sha256()
    while block := list(islice(rows, _RENDER_ROWS)):
        texts = [_row_prompt(row, columns.prompts, prompt_key, source, index) for index, row in block]
        answers = [_row_answer(row, data, columns, source, index) for index, row in block]
        rendered = renderer.render_all(texts)
        for (index, _), text, answer, (shown, token_ids) in zip(block, texts, answers, rendered, strict=True):
            prompt_id = _hash128(json.dumps([name, index, text, answer]))
            dataset_hash.update(bytes.fromhex(prompt_id))
            if not text or not token_ids:
                raise ValueError(f"{key}: row {index} of {source} is an empty prompt; remove it")
            if answer is None:
                unanswered[prompt_id] = index
            elif len(token_ids) > data.max_prompt_tokens:
                too_long[prompt_id] = index
            else:
                prompts.append(Prompt(prompt_id, shown, _hash128(shown), token_ids, answer, index))
    if not prompts:
        if too_long:
            raise ValueError(
                f"data.max_prompt_tokens: {data.max_prompt_tokens} is less than each of the {len(too_long)} prompts of "
                f"{source} has; raise it"
            )
        if unanswered:
            raise ValueError(
                f"data.preset: {data.preset}, but none of the {len(unanswered)} rows of {source} has an answer in "
                f"{_any_of(columns.answers)}; use another preset, or name the column in data.answer_column"
            )
        raise ValueError(f"{key}: {source} has no rows; give another source")
    left_out = {"too_long": too_long, "unanswered": unanswered}
    for why, row_numbers in left_out.items():
        if row_numbers:
            first = min(row_numbers.values())
            print(f"{key}: {len(row_numbers)} prompts {why.replace('_', ' ')}, left out; the first is row {first}")
    return LoadedPrompts(prompts, left_out, dataset_hash.hexdigest())


def read_rows(source: str, key: str, split: str = "train", subset: str | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a .jsonl or .parquet file, or of a hub dataset's `split`, in its configuration `subset` if given.

    Raises `ValueError` naming `key`, the recipe's key, for a source that cannot be read.
    """
    file_format = _file_format(source)
    if file_format and not Path(source).is_file():
        raise ValueError(f"{key}: {source} is not a file; give a .jsonl or .parquet file, or a hub dataset's name")
    if file_format == "json":
        yield from _json_rows(Path(source), key)
        return
    import datasets  # takes a second

    datasets.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said below
    if file_format is None:
        datasets.disable_progress_bars()
        try:
            yield from datasets.load_dataset(source, subset, split=split)
        # Offline, unknown name, subset or split; a script, which `datasets` runs no more; files that cannot be read.
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{key}: cannot load {source!r} (subset {subset!r}, split {split!r}) from the hub ({reason}); "
                "use a .jsonl or .parquet file, or a hub dataset's name, data.subset and data.split"
            ) from error
        return
    try:
        with TemporaryDirectory() as cache:  # for a lock file
            yield from datasets.IterableDataset.from_parquet(source, cache_dir=cache)
    except StopIteration:
        return  # what `datasets` makes of an empty file
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise _unreadable(key, source, file_format, reason) from error


def _unreadable(key: str, source: Path | str, file_format: str, reason: str) -> ValueError:
    return ValueError(f"{key}: {source} is not a readable {file_format} file ({reason}); write it again")


def _json_rows(path: Path, key: str) -> Iterator[dict[str, Any]]:
    """Rows of JSON, one a line or all in one list. Numbers keep their digits, whatever a float makes of them, and a
    column may hold in each row what it likes."""

    def parse(text: str, where: str) -> Any:
        try:
            return json.loads(text, parse_float=str)
        except (ValueError, RecursionError) as error:
            raise _unreadable(key, path, "json", f"{where}{one_line(error)}") from error

    def check(row: Any, number: int) -> dict[str, Any]:
        if not isinstance(row, dict):
            raise _unreadable(key, path, "json", f"row {number} is a {type(row).__name__}, not an object")
        return row

    try:
        with path.open(encoding="utf-8-sig") as file:
            is_list = next((line.lstrip()[0] for line in file if line.strip()), "") == "["
            file.seek(0)
            if is_list:
                rows = parse(file.read(), "")
                yield from (check(row, number) for number, row in enumerate(rows))
                return
            lines = (line for line in file if line.strip())
            for number, line in enumerate(lines):
                yield check(parse(line, f"row {number}: "), number)
    except UnicodeDecodeError as error:
        raise _unreadable(key, path, "json", str(error)) from error


def _file_format(source: str) -> str | None:
    """How `datasets` reads this file, or None for a hub dataset's name."""
    return _FILE_FORMATS.get(Path(source).suffix)


def row_text(row: dict[str, Any], columns: Iterable[str], key: str, source: str, index: int) -> str:
    """The text of the first of `columns` that a row has; `reward_model.ground_truth` is a column within a column.
    Raises `ValueError` naming `key`, the recipe's key for it."""
    column = _present(row, columns, key, source)
    value = _value_of(row, column)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
        raise ValueError(
            f"{key}: row {index} of {source} has {repr(value)[:200]} in {column!r}, not text; name a column of text"
        )
    return str(value)


def _row_prompt(row: dict[str, Any], columns: Iterable[str], key: str, source: str, index: int) -> str | Messages:
    """A prompt's text, or its messages, the last of which is the user's."""
    value = _value_of(row, _present(row, columns, key, source))
    if not isinstance(value, list):
        return row_text(row, columns, key, source, index)
    are_messages = all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in value
    )
    if not value or not are_messages or value[-1]["role"] != "user":
        raise ValueError(
            f"{key}: row {index} of {source} has {repr(value)[:200]}, neither text nor messages, each with role "
            "and content, of which the last is the user's; write it so"
        )
    return [{"role": one["role"], "content": one["content"]} for one in value]


def _row_answer(row: dict[str, Any], data: DataConfig, columns: RowFormat, source: str, index: int) -> str | None:
    """The reference answer of a row; None where a row of a preset has none: null, NaN, or no answer in its text."""
    key = column_key(data, "answer_column")
    column = _present(row, columns.answers, key, source)
    value = _value_of(row, column)
    if data.preset and (value is None or value != value):
        return None
    return columns.answers[column](row_text(row, [column], key, source, index))


def _present(row: dict[str, Any], columns: Iterable[str], key: str, source: str) -> str:
    column = next((name for name in columns if _value_of(row, name) is not _ABSENT), None)
    if column is None:
        names = (f"{name}.{inner}" if inner else name for name, value in row.items() for inner in _inner(value))
        raise ValueError(f"{key}: {_any_of(columns)} is not a column of {source}; use one of {', '.join(names)}")
    return column


_ABSENT = object()


def _value_of(row: dict[str, Any], column: str) -> Any:
    """Of a column, or of one within a column; `_ABSENT` where there is none."""
    if column in row:
        return row[column]
    outer, dot, inner = column.partition(".")
    return _value_of(row[outer], inner) if dot and isinstance(row.get(outer), dict) else _ABSENT


def _inner(value: Any) -> Iterable[str]:
    return value if isinstance(value, dict) and value else [""]


def _any_of(columns: Iterable[str]) -> str:
    return " or ".join(map(repr, columns))


def _hash128(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
