"""One shard of a V* store: a Parquet file whose rows are prompts, see `StoreRow`. Its footer says which store it is of.

A shard appears whole or not at all (temporary file, fsync, link, fsync of the folder), and the first one written stays:
a second worker that sampled the same shard throws its own away. No Python object per row is made when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megatron_apo.telemetry.units import one_line
from megatron_apo.values.fingerprint import SCHEMA_VERSION, Fingerprint, StoreError
from megatron_apo.values.ids import HASH_BYTES

AGAIN = "run estimate-vstar again (of an evaluation: evaluate), which samples only the shards that are not there"
SCHEMA = pa.schema(
    {
        "prompt_id": pa.binary(HASH_BYTES),
        "text_hash": pa.binary(HASH_BYTES),
        "rewards": pa.list_(pa.float64()),
        "lengths": pa.list_(pa.int32()),
        "finish_reasons": pa.list_(pa.string()),
        "num_failures": pa.int32(),
        "num_unfinished": pa.int32(),
    }
)
RESPONSES = pa.field("responses", pa.list_(pa.list_(pa.int32())))  # where they are kept
_FOOTER_KEY = b"megatron_apo"
SETTINGS_KEY = "made"  # the name of `Footer.settings` in files, which stores of before have
_READ_ROWS = 1 << 13  # rows decoded at once: bounds the temporaries of a large shard
_MOST_BYTES_AT_ONCE = 1 << 22
# Columns in which values repeat. A dictionary of ids, which do not, would slow their reading down several times.
_OF_FEW_VALUES = [f"{name}.list.element" for name in ("rewards", "lengths", "finish_reasons", "responses.list.element")]
_OF_FEW_VALUES += ["num_failures", "num_unfinished"]


@dataclass(frozen=True)
class StoreRow:
    """One prompt: `rewards`, `lengths` (response tokens) and `finish_reasons` of its samples, in sample order.

    `rewards` holds the failure reward where a grader failed, and NaN where the sample is masked
    (`Fingerprint.masks`); `num_failures` says how often a grader failed, `num_unfinished` how many responses never
    closed their thinking. `text_hash` is of the prompt's text and token ids.
    """

    prompt_id: str
    text_hash: str
    rewards: list[float]
    lengths: list[int]
    finish_reasons: list[str]
    responses: list[list[int]] | None = None
    num_failures: int = 0
    num_unfinished: int = 0


@dataclass(frozen=True)
class Footer:
    """What a shard says of itself. seconds: of time of one `device`.

    settings: by their names in the recipe, those that are the same in all shards of a store. A run that reads the
    store may have others.
    """

    fingerprint: Fingerprint
    index: int
    num_shards: int
    seconds: float
    device: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.parquet"


def shard_index(name: str) -> int | None:
    """The index in a shard's file name; None for another file."""
    match = re.fullmatch(r"shard-(\d{5,})\.parquet", name)
    return int(match[1]) if match else None


def write_shard(path: Path, rows: Sequence[StoreRow], footer: Footer) -> bool:
    """Write a shard for good; False if it was there already, which stays as it is.

    Raises `StoreError` for rows that no store may hold: another number of samples than the fingerprint allows, an id
    twice, a reward that is not finite but for those of masked samples.
    """
    return write_table(path, _table(rows, footer.fingerprint, path.name), footer)


def write_table(path: Path, table: pa.Table, footer: Footer) -> bool:
    """`write_shard` of columns that were checked already."""
    record = vars(footer) | {"fingerprint": footer.fingerprint.model_dump(mode="json")}
    record[SETTINGS_KEY] = record.pop("settings")
    table = table.replace_schema_metadata({_FOOTER_KEY: json.dumps(record).encode()})
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb") as file:
            pq.write_table(table, file, compression="zstd", use_dictionary=_OF_FEW_VALUES, write_page_checksum=True)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)  # unlike a rename, never over another worker's
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            if path.exists():
                return False
            os.replace(partial, path)
        sync_folder(path.parent)
        return True
    finally:
        partial.unlink(missing_ok=True)


class OtherStoreError(StoreError):
    """A file of another store, or of another version of this program."""


@contextmanager
def naming_damage(path: Path, damage: str | None = None) -> Iterator[None]:
    """Within: what a library makes of damaged bytes (Parquet, UTF-8, JSON, pydantic) is a `StoreError` that names the
    file. damage: what is known of it already."""
    try:
        yield
    except (StoreError, FileNotFoundError):
        raise
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: {damage or f'damaged ({one_line(error)})'}; delete it and {AGAIN}") from None


def open_shard(path: Path) -> pq.ParquetFile:
    """Raises `StoreError` for a file that is not whole."""
    with naming_damage(path):
        return pq.ParquetFile(pa.OSFile(str(path)))


def read_footer(file: pq.ParquetFile, path: Path) -> Footer:
    """Raises `StoreError` for a file of something else, of another schema version, or with other columns."""
    with naming_damage(path):
        schema = file.schema_arrow
        record = (schema.metadata or {}).get(_FOOTER_KEY)
        if record is None:
            raise StoreError(f"{path}: not a shard of a V* store; move it elsewhere")
        tree = json.loads(record)
        check_version(path, tree["fingerprint"])
        tree["settings"] = tree.pop(SETTINGS_KEY)
        footer = Footer(**tree | {"fingerprint": Fingerprint.model_validate(tree["fingerprint"])})
        if not any(schema.equals(found) for found in (SCHEMA, SCHEMA.append(RESPONSES))):
            raise ValueError("it has other columns than a shard")
        return footer


def check_version(path: Path, record: Any) -> None:
    """Raise `OtherStoreError` unless `record`, which holds a schema version, has this program's."""
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise OtherStoreError(
            f"{path}: schema version {version!r}, this program reads {SCHEMA_VERSION}; "
            "use the version of this program that wrote it, or make it again"
        )


def check_same_store(
    path: Path,
    footer: Footer,
    fingerprint: Fingerprint,
    num_shards: int,
    settings: Mapping[str, Any],
    damage: str | None = None,
) -> None:
    """Raise `StoreError` for a shard of another store, one that was made otherwise, or one under another's name.

    damage: what is known to be wrong with the file, which may be all that makes it look like another store's.
    """
    if footer.fingerprint != fingerprint:
        differences = footer.fingerprint.differences(fingerprint)
        what = f"a shard of another {fingerprint.words.name}" + (f", or {damage}" if damage else "")
        fix = f"{fingerprint.words.elsewhere}, or delete it"
        raise OtherStoreError("\n".join([f"{path}: {what}; {fix}", *differences]))
    if footer.num_shards != num_shards:
        raise StoreError(
            f"{path}: one of {footer.num_shards} shards where this store has {num_shards}; "
            f"keep {fingerprint.words.prompts_per_shard} as it was, or {fingerprint.words.elsewhere}"
        )
    for key in sorted(settings.keys() | footer.settings):
        if settings.get(key) != footer.settings.get(key):
            raise StoreError(
                f"{path}: made with {key}={footer.settings.get(key)} where this store has {settings.get(key)}; "
                f"keep it as it was, or {fingerprint.words.elsewhere}"
            )
    if path.name != shard_name(footer.index):
        raise StoreError(f"{path}: holds shard {footer.index}, which its name does not say; delete it and {AGAIN}")


def read_rewards(
    file: pq.ParquetFile, path: Path, fingerprint: Fingerprint
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.float64]]]:
    """R rows at a time: ([R, 2] prompt ids, [R] samples of each, their rewards in one array). Raises `StoreError`."""
    allowed, columns = fingerprint.sample_counts, ["prompt_id", "rewards"]
    if file.metadata.num_rows <= _READ_ROWS:  # costs half of what the iterator does
        batches: Iterable[pa.RecordBatch] = file.read(columns, use_threads=False).to_batches()
    else:
        batches = file.iter_batches(_READ_ROWS, columns=columns, use_threads=False)
    for batch in batches:
        lists = batch["rewards"]
        offsets = np.from_dlpack(lists.offsets)  # to_numpy() would import pandas, which takes a second
        counts = np.diff(offsets).astype(np.int64, copy=False)
        if counts.min() < allowed.start or counts.max() >= allowed.stop:
            raise StoreError(f"{path}: has prompts without {_counts_in_words(allowed)} rewards; delete it and {AGAIN}")
        rewards = np.asarray(np.from_dlpack(lists.values)[offsets[0] : offsets[-1]], dtype=np.float64)
        if not (np.isfinite(rewards) | (fingerprint.masks & np.isnan(rewards))).all():
            raise StoreError(f"{path}: has rewards that are not finite; delete it and {AGAIN}")
        yield uint64_pairs(batch["prompt_id"]), counts, rewards


def read_text_hashes(path: Path) -> dict[str, str]:
    """The hash of each prompt's text, by the prompt's id. Raises `StoreError`."""
    with naming_damage(path):
        table = open_shard(path).read(["prompt_id", "text_hash"])
        return dict(zip(*([one.hex() for one in column.to_pylist()] for column in table.columns), strict=True))


def check_whole(path: Path) -> tuple[int, int]:
    """Rows and rewards of a shard, every page read and its checksum compared. Raises `StoreError`."""
    num_rows = num_rewards = 0
    with naming_damage(path), pq.ParquetFile(pa.OSFile(str(path)), page_checksum_verification=True) as file:
        for batch in file.iter_batches(_READ_ROWS):
            num_rows += len(batch)
            num_rewards += len(batch["rewards"].flatten())
    return num_rows, num_rewards


def source_of(path: Path, num_bytes: int) -> pa.NativeFile:
    """To read a shard from: a small one comes into memory at once. Raises `OSError`."""
    return pa.OSFile(str(path)) if num_bytes > _MOST_BYTES_AT_ONCE else pa.BufferReader(path.read_bytes())


def sha256(source: BufferedReader) -> str:
    return hashlib.file_digest(source, "sha256").hexdigest()


def sync_folder(path: Path) -> None:
    """Make names in a folder durable."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _table(rows: Sequence[StoreRow], fingerprint: Fingerprint, name: str) -> pa.Table:
    allowed = fingerprint.sample_counts
    for row in rows:
        sizes = {len(row.rewards), len(row.lengths), len(row.finish_reasons)}
        if row.responses is not None:
            sizes.add(len(row.responses))
        if len(sizes) > 1 or sizes.pop() not in allowed:
            found = sorted({len(row.rewards), len(row.lengths), len(row.finish_reasons)})
            raise StoreError(f"{name}: prompt {row.prompt_id} has {found} samples, not {_counts_in_words(allowed)}")
        masked = [fingerprint.masks and reason == "length" for reason in row.finish_reasons]
        if not np.isfinite(np.where(masked, 0.0, row.rewards)).all():
            raise StoreError(f"{name}: a reward is not finite; graders' failures must be given reward.failure_reward")
        if not np.isnan(np.array(row.rewards)[masked]).all():
            raise StoreError(f"{name}: prompt {row.prompt_id} has a reward of a masked response; it must be NaN")
    ids = [row.prompt_id for row in rows]
    if len(set(ids)) != len(ids):
        repeated = next(prompt_id for prompt_id in ids if ids.count(prompt_id) > 1)
        raise StoreError(f"{name}: prompt_id {repeated} is stored twice")
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    columns |= {name: [bytes.fromhex(text) for text in columns[name]] for name in ("prompt_id", "text_hash")}
    schema = SCHEMA
    if rows and rows[0].responses is not None:
        schema = SCHEMA.append(RESPONSES)
        columns["responses"] = [row.responses for row in rows]
    return pa.table(columns, schema)


def _counts_in_words(allowed: range) -> str:
    return str(allowed.start) if len(allowed) == 1 else f"{allowed.start} to {allowed.stop - 1}"


def uint64_pairs(ids: pa.FixedSizeBinaryArray) -> NDArray[np.uint64]:
    """[R, 2] view of 16-byte ids, as big-endian halves so that hex order is numeric order."""
    pairs = np.frombuffer(ids.buffers()[1], dtype=">u8").reshape(-1, 2)
    return pairs[ids.offset : ids.offset + len(ids)]
