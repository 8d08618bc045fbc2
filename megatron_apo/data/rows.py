"""Rows of a source, as they are there: a .jsonl or .parquet file (streamed, nothing cached) or a hub dataset."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_apo.telemetry.units import one_line

_FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
ABSENT = object()


def read_rows(
    source: str, key: str, split: str = "train", subset: str | None = None, rows_key: str = "data"
) -> Iterator[dict[str, Any]]:
    """Rows of a .jsonl or .parquet file, or of a hub dataset's `split`, in its configuration `subset` if given.

    Raises `ValueError` naming `key`, the recipe's key, for a source that cannot be read. rows_key: of subset and split.
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
                f"use a .jsonl or .parquet file, or a hub dataset's name, {rows_key}.subset and {rows_key}.split"
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


def row_text(row: dict[str, Any], columns: Iterable[str], key: str, source: str, index: int) -> str:
    """The text of the first of `columns` that a row has; `reward_model.ground_truth` is a column within a column.
    Raises `ValueError` naming `key`, the recipe's key for it."""
    column = present_column(row, columns, key, source)
    text = _as_text(value := value_of(row, column))
    if text is None:
        raise ValueError(
            f"{key}: row {index} of {source} has {repr(value)[:200]} in {column!r}, not text; name a column of text"
        )
    return text


def is_text(value: Any) -> bool:
    """Text that can be written: no half of a pair of surrogates, which JSON lets through."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _as_text(value: Any) -> str | None:
    """Of text, a number, a day, or a list of these, which commas part; None of anything else."""
    if isinstance(value, datetime.datetime):  # of Parquet, as the next
        return value.isoformat(" ") if value.time() != datetime.time() else value.date().isoformat()
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, list):
        texts = [None if isinstance(one, list) else _as_text(one) for one in value]
        return None if not texts or None in texts else ", ".join(map(str, texts))
    if isinstance(value, str):
        return value if is_text(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or value != value:
        return None
    return str(value)


def present_column(row: dict[str, Any], columns: Iterable[str], key: str, source: str) -> str:
    column = next((name for name in columns if value_of(row, name) is not ABSENT), None)
    if column is None:
        names = (f"{name}.{inner}" if inner else name for name, value in row.items() for inner in _inner(value))
        raise ValueError(f"{key}: {any_of(columns)} is not a column of {source}; use one of {', '.join(names)}")
    return column


def value_of(row: dict[str, Any], column: str) -> Any:
    """Of a column, or of one within a column; `ABSENT` where there is none."""
    if column in row:
        return row[column]
    outer, dot, inner = column.partition(".")
    return value_of(row[outer], inner) if dot and isinstance(row.get(outer), dict) else ABSENT


def _inner(value: Any) -> Iterable[str]:
    return value if isinstance(value, dict) and value else [""]


def any_of(columns: Iterable[str]) -> str:
    return " or ".join(map(repr, columns))


def _file_format(source: str) -> str | None:
    """How `datasets` reads this file, or None for a hub dataset's name."""
    return _FILE_FORMATS.get(Path(source).suffix)
