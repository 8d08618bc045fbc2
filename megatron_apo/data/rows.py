"""Rows of a source, as they are there: a .jsonl or .parquet file (streamed, nothing cached) or a hub dataset."""

from __future__ import annotations

import datetime
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_apo.telemetry.units import one_line

if TYPE_CHECKING:
    import pyarrow as pa

_FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_BATCH_ROWS = 1024
ABSENT = object()
# Of Parquet and of what reads it; LookupError: a time zone that nobody knows. pyarrow's own errors are among these.
_READ_ERRORS = (OSError, ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, RecursionError)


class Number(str):
    """A number of a file, with the digits that are written there, or the fewest that tell it."""

    __slots__ = ()
    __repr__ = str.__str__


def read_rows(
    source: str,
    key: str,
    split: str = "train",
    subset: str | None = None,
    rows_key: str = "data",
    columns: Iterable[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of a .jsonl or .parquet file, or of a hub dataset's `split`, in its configuration `subset` if given.

    columns: those that are used (None: all), of which `a.b` may be one within `a`. Of Parquet and of the hub no other
    is read: it is `ABSENT` in a row, and may hold anything. Raises `ValueError` naming `key`, the recipe's key, for a
    source that cannot be read. rows_key: of subset and split.
    """
    file_format = _file_format(source)
    if file_format and not Path(source).is_file():
        raise ValueError(f"{key}: {source} is not a file; give a .jsonl or .parquet file, or a hub dataset's name")
    if not file_format and Path(source).is_file():
        raise ValueError(f"{key}: {source} is a file, but not .jsonl or .parquet by its name; convert it, or rename it")
    used = None if columns is None else {name for column in columns for name in (column, column.partition(".")[0])}
    if file_format == "json":
        yield from _json_rows(Path(source), key)
    elif file_format == "parquet":
        try:
            yield from _parquet_rows(source, used)
        except _READ_ERRORS as error:
            raise _unreadable(key, source, file_format, one_line(error)) from error
    else:
        import datasets

        try:
            yield from _hub_rows(source, subset, split, used)
        # Offline, unknown name, subset or split; a script, which `datasets` runs no more; files that cannot be read.
        except (*_READ_ERRORS, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{key}: cannot load {source!r} (subset {subset!r}, split {split!r}) from the hub ({reason}); "
                f"use a .jsonl or .parquet file, or a hub dataset's name, {rows_key}.subset and {rows_key}.split"
            ) from error


def _parquet_rows(source: str, used: set[str] | None) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(source) as file:
        names = [name for name in file.schema_arrow.names if used is None or name in used]
        batches = file.iter_batches(_BATCH_ROWS, columns=names) if names else ()
        yield from _arrow_rows(batches, file.schema_arrow, names, file.metadata.num_rows)


def _hub_rows(source: str, subset: str | None, split: str, used: set[str] | None) -> Iterator[dict[str, Any]]:
    import datasets  # takes a second

    datasets.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said by an error
    datasets.disable_progress_bars()
    dataset = datasets.load_dataset(source, subset, split=split)
    names = [name for name in dataset.column_names if used is None or name in used]
    tables = dataset.select_columns(names).with_format("arrow").iter(_BATCH_ROWS) if names else ()
    yield from _arrow_rows(tables, dataset.features.arrow_schema, names, len(dataset))


def _arrow_rows(
    batches: Iterable[pa.RecordBatch | pa.Table], schema: pa.Schema, names: list[str], num_rows: int
) -> Iterator[dict[str, Any]]:
    """names: of the columns that `batches` have; none: there are no batches."""
    others = {field.name: _unread(field.type) for field in schema if field.name not in names}
    order = dict.fromkeys(schema.names, ABSENT) | others
    if not names:
        yield from (dict(order) for _ in range(num_rows))
    for batch in batches:
        exact = {field.name: read for field in batch.schema if (read := _exact(field.type))}
        for row in batch.to_pylist():
            yield order | row | {name: read(row[name]) for name, read in exact.items()}


def _unread(kind: pa.DataType) -> Any:
    """In place of a value that is not read: names, for an error that tells them."""
    import pyarrow as pa

    return {field.name: ABSENT for field in kind} if pa.types.is_struct(kind) else ABSENT


def _exact(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """What makes of a Python value, as pyarrow has it, the one that is meant: a float32 with its own digits, JSON as
    it reads. None: it is that."""
    import numpy as np
    import pyarrow as pa

    def number(value: Any) -> Any:
        return Number(format(Decimal(str(narrow(value))), "f")) if math.isfinite(value) else float(value)

    def members(reads: dict[str, Callable[[Any], Any]]) -> Callable[[Any], Any]:
        return lambda value: value | {name: read_one(value[name]) for name, read_one in reads.items()}

    def elements(read_one: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda value: [read_one(one) for one in value]

    read: Callable[[Any], Any] | None = None
    if pa.types.is_float32(kind) or pa.types.is_float16(kind):
        narrow = np.float32 if pa.types.is_float32(kind) else np.float16
        read = number
    elif pa.types.is_struct(kind):
        reads = {field.name: inner for field in kind if (inner := _exact(field.type))}
        read = members(reads) if reads else None
    elif any(is_one(kind) for is_one in _lists()):
        one = _exact(kind.value_type)
        read = elements(one) if one else None
    elif getattr(kind, "extension_name", "") == "arrow.json":  # of `datasets`, where rows differ in type
        read = _loads
    return read and _or_none(read)


def _lists() -> tuple[Callable[[pa.DataType], bool], ...]:
    from pyarrow import types

    return types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view


def _or_none(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def _unreadable(key: str, source: Path | str, file_format: str, reason: str) -> ValueError:
    return ValueError(f"{key}: {source} is not a readable {file_format} file ({reason}); write it again")


def _json_rows(path: Path, key: str) -> Iterator[dict[str, Any]]:
    """Rows of JSON, one a line or all in one list. Numbers keep their digits, whatever a float makes of them, and a
    column may hold in each row what it likes."""

    def parse(text: str, where: str) -> Any:
        try:
            return _loads(text)
        except RecursionError as error:
            where = where or f"row {_deep_row(text)}: "
            raise _unreadable(key, path, "json", f"{where}it is nested too deep, some 900 levels or more") from error
        except ValueError as error:
            raise _unreadable(key, path, "json", f"{where}{one_line(error)}") from error

    def check(row: Any, number: int) -> dict[str, Any]:
        if not isinstance(row, dict):
            kind = "number" if isinstance(row, Number) else type(row).__name__
            raise _unreadable(key, path, "json", f"row {number} is a {kind}, not an object")
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


_DECODER = json.JSONDecoder(parse_float=Number, parse_int=Number)


def _loads(text: str) -> Any:
    return _DECODER.decode(text)


def _deep_row(text: str) -> int:
    """The first row of a list of rows that is nested too deep."""
    between, row, place = re.compile(r"[\s,]*"), 0, text.index("[") + 1
    while True:
        start = between.match(text, place)
        assert start, "it matches nothing, too"
        try:
            _, place = _DECODER.raw_decode(text, start.end())
        except (ValueError, RecursionError):
            return row
        row += 1


def row_text(row: dict[str, Any], columns: Iterable[str], key: str, source: str, index: int) -> str:
    """The text of the first of `columns` that a row has; `reward_model.ground_truth` is a column within a column.
    Raises `ValueError` naming `key`, the recipe's key for it."""
    column = present_column(row, columns, key, source, index)
    text = _as_text(value := value_of(row, column))
    if text is None:
        raise ValueError(
            f"{key}: row {index} of {source} has {repr(value)[:200]} in {column!r}, not text; name a column of text"
        )
    return text


def is_text(value: Any) -> bool:
    """Text that can be written, or a number's: no half of a pair of surrogates, which JSON lets through."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _as_text(value: Any) -> str | None:
    """Of text, a number (without an exponent, but where JSON has one), a day, or a list of these, which commas part;
    None of anything else."""
    if isinstance(value, datetime.datetime):  # of Parquet, as the next
        return value.isoformat(" ") if value.time() != datetime.time() else value.date().isoformat()
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, list):
        texts = [None if isinstance(one, list) else _as_text(one) for one in value]
        return None if not texts or None in texts else ", ".join(map(str, texts))
    if isinstance(value, str):
        return str(value) if is_text(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or not math.isfinite(value):
        return None
    return str(value) if isinstance(value, int) else format(Decimal(str(value)), "f")


def present_column(row: dict[str, Any], columns: Iterable[str], key: str, source: str, index: int = 0) -> str:
    """The first of `columns` that row `index` has. Raises `ValueError` naming `key`, the recipe's key for it."""
    column = next((name for name in columns if value_of(row, name) is not ABSENT), None)
    if column is None:
        names = (f"{name}.{inner}" if inner else name for name, value in row.items() for inner in _inner(value))
        where = f"row {index} of {source}" if index else source
        raise ValueError(f"{key}: {any_of(columns)} is not a column of {where}; use one of {', '.join(names)}")
    return column


def value_of(row: dict[str, Any], column: str) -> Any:
    """Of a column, or of one within a column, which is null where that is; `ABSENT` where there is none."""
    if column in row:
        return row[column]
    outer, dot, inner = column.partition(".")
    if not dot or outer not in row:
        return ABSENT
    return value_of(row[outer], inner) if isinstance(row[outer], dict) else None if row[outer] is None else ABSENT


def _inner(value: Any) -> Iterable[str]:
    return value if isinstance(value, dict) and value else [""]


def any_of(columns: Iterable[str]) -> str:
    return " or ".join(map(repr, columns))


def _file_format(source: str) -> str | None:
    """Of this file, or None for a hub dataset's name."""
    return _FILE_FORMATS.get(Path(source).suffix)
