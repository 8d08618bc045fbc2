"""The V* store: a folder of Parquet shards and a manifest. Rewards are stored; V* is derived on load.

    STORE/shard-00000.parquet ...   a row is a prompt, see `StoreRow`
    STORE/manifest.json             schema version, fingerprint, and of each shard its rows, bytes and sha256

A shard appears whole or not at all (temporary file, fsync, rename, fsync of the folder) and carries the fingerprint in
its own footer, so a killed job finds its finished shards without any other record. The manifest is written last.
Shapes: P prompts, N samples of each. No Python object per row is made on the load path.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_apo.values.estimators import ESTIMATORS

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_FOOTER_KEY = b"megatron_apo"
_HASH_BYTES = 16  # ids and text hashes are 128 bit
_HASH_BLOCK_BYTES = 1 << 22
_VALUE_ROWS = 1 << 16  # rows estimated at once: bounds the temporaries of a large store
_AGAIN = "run estimate-vstar again, which samples only the shards that are not there"

# Where a run sets what the store was made with: the fix named when the two differ.
_SET_BY = {
    "schema_version": "the version of this program",
    "model_hash": "model.reference",
    "tokenizer_hash": "model.path (its tokenizer)",
    "template_hash": "model.path (its chat template)",
    "template": "data.template",
    "thinking": "data.thinking",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "top_k": "sampling.top_k",
    "max_response_tokens": "sampling.max_response_tokens",
    "stop_token_ids": "sampling.stop_token_ids",
    "reward_name": "reward.name",
    "reward_version": "the installed version of the reward",
    "reward_options": "reward.options",
    "failure_reward": "reward.failure_reward",
    "dataset_hash": "data.train (and its columns)",
    "max_prompt_tokens": "data.max_prompt_tokens",
    "samples_per_prompt": "vstar.samples_per_prompt",
    "seed": "vstar.seed",
}


class StoreError(ValueError):
    """A V* store that cannot be trusted or does not fit the run, one line for each reason."""


class Fingerprint(BaseModel):
    """Everything that the rewards of a store depend on."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    schema_version: int = SCHEMA_VERSION
    model_hash: str
    tokenizer_hash: str
    template_hash: str
    template: str
    thinking: str
    temperature: float
    top_p: float
    top_k: int
    max_response_tokens: int
    stop_token_ids: list[int]
    reward_name: str
    reward_version: str
    reward_options: dict[str, Any]
    failure_reward: float
    dataset_hash: str
    max_prompt_tokens: int
    samples_per_prompt: int
    seed: int

    def differences(self, other: Fingerprint) -> list[str]:
        """One line for each field in which `other`, a run's fingerprint, departs from this one, the store's."""
        return [
            f"{name}: store has {mine!r}, this run has {theirs!r}; set by {_SET_BY[name]}"
            for name in type(self).model_fields
            if (mine := getattr(self, name)) != (theirs := getattr(other, name))
        ]


@dataclass(frozen=True)
class StoreRow:
    """One prompt: `rewards`, `lengths` (response tokens) and `finish_reasons` of its N samples, in sample order.

    `rewards` holds the failure reward where a grader failed; `num_failures` says how often that was.
    """

    prompt_id: str
    text_hash: str
    rewards: list[float]
    lengths: list[int]
    finish_reasons: list[str]
    responses: list[list[int]] | None = None
    num_failures: int = 0


@dataclass(frozen=True)
class _Footer:
    """What a shard says of itself."""

    fingerprint: Fingerprint
    index: int
    num_shards: int


class StoreWriter:
    """Writes the `num_shards` shards of a store into `folder`; several writers may share it, each with its own shards.

    Raises `StoreError` if the folder already holds shards of another fingerprint or another division into shards.
    """

    def __init__(self, folder: Path | str, fingerprint: Fingerprint, num_shards: int):
        self.folder, self.fingerprint, self.num_shards = Path(folder), fingerprint, num_shards
        self.folder.mkdir(parents=True, exist_ok=True)
        self.finished_shards()

    def finished_shards(self) -> set[int]:
        """Indices of the shards that need not be sampled again."""
        finished = set()
        for path in sorted(self.folder.glob("shard-*.parquet")):
            footer = _footer(_parquet_file(path), path)
            _check_same_store(path, footer, self.fingerprint, self.num_shards)
            finished.add(footer.index)
        return finished

    def write_shard(self, index: int, rows: Sequence[StoreRow]) -> Path:
        """Write shard `index` for good. Rows must have N samples each and distinct ids."""
        assert 0 <= index < self.num_shards, f"shard {index} of {self.num_shards}"
        path = self.folder / shard_name(index)
        table = _table(rows, self.fingerprint.samples_per_prompt, path.name)
        fingerprint = self.fingerprint.model_dump(mode="json")
        footer = json.dumps({"fingerprint": fingerprint, "index": index, "num_shards": self.num_shards})
        table = table.replace_schema_metadata({_FOOTER_KEY: footer.encode()})
        partial = path.with_name(f".{path.name}.partial")
        with open(partial, "wb") as file:
            pq.write_table(table, file, compression="zstd", write_page_checksum=True)
            file.flush()
            os.fsync(file.fileno())
        _rename_durably(partial, path)
        return path

    def finish(self) -> VStarStore:
        """Check every shard's content, write the manifest, and return the store opened."""
        missing = sorted(set(range(self.num_shards)) - self.finished_shards())
        if missing:
            raise StoreError(
                f"{self.folder}: {len(missing)} of {self.num_shards} shards missing, {missing[:8]}; {_AGAIN}"
            )
        shards = []
        for index in range(self.num_shards):
            path = self.folder / shard_name(index)
            try:
                num_rows = pq.read_table(path, page_checksum_verification=True).num_rows
            except (OSError, pa.ArrowException) as error:
                raise StoreError(f"{path}: damaged ({_one_line(error)}); delete it and {_AGAIN}") from None
            size = path.stat().st_size
            shards.append({"file": path.name, "rows": num_rows, "bytes": size, "sha256": _sha256(path)})
        for partial in self.folder.glob(".shard-*.partial"):
            partial.unlink()
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.fingerprint.model_dump(mode="json"),
            "num_shards": self.num_shards,
            "shards": shards,
        }
        store = VStarStore(self.folder, manifest)
        partial = self.folder / f".{MANIFEST}.partial"
        with open(partial, "w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _rename_durably(partial, self.folder / MANIFEST)
        return store


class PromptValues:
    """V* by prompt id. A prompt that is not in the store raises `StoreError`; there is no default."""

    def __init__(self, store: VStarStore, values_P: NDArray[np.float64]):
        self._store, self.values_P = store, values_P

    def __getitem__(self, prompt_id: str) -> float:
        return float(self.lookup([prompt_id])[0])

    def __len__(self) -> int:
        return len(self.values_P)

    def lookup(self, prompt_ids: Sequence[str]) -> NDArray[np.float64]:
        """[len(prompt_ids)] values, in the order asked for."""
        return self.values_P[self._store.rows_of(prompt_ids)]


class VStarStore:
    """A store that was checked: use `VStarStore.open(folder)`.

    rewards: [P, N] float64. ids: [P, 2] uint64, the halves of each 128-bit prompt id.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        self.fingerprint, self.num_shards, shards = _read_manifest(folder / MANIFEST, manifest)
        num_rows = sum(shard["rows"] for shard in shards)
        self.rewards = np.empty((num_rows, self.fingerprint.samples_per_prompt))
        self.ids = np.empty((num_rows, 2), dtype=np.uint64)
        start = 0
        for index, shard in enumerate(shards):
            stop = start + shard["rows"]
            self._load_shard(index, shard, self.ids[start:stop], self.rewards[start:stop])
            start = stop
        # Sorted by id, for look-ups and to see repetitions.
        self._order = np.argsort(self.ids[:, 0])
        if (np.diff(self.ids[self._order, 0]) == 0).any():  # rare, and three times the work: two ids share 64 bits
            self._order = np.lexsort((self.ids[:, 1], self.ids[:, 0]))
        self._sorted_ids = self.ids[self._order]
        self._refuse_repeated_ids(np.cumsum([shard["rows"] for shard in shards]))

    @classmethod
    def open(cls, folder: Path | str) -> VStarStore:
        """Read and check a finished store: schema version, every shard's size, sha256, fingerprint, row count and ids.

        Raises `StoreError`, one line that names the file or field.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise StoreError(f"{path}: not there; run estimate-vstar, or point vstar.dir at a finished store")
        try:
            manifest = json.loads(path.read_text())
        except ValueError as error:
            raise StoreError(f"{path}: damaged ({_one_line(error)}); delete it and {_AGAIN}") from None
        return cls(Path(folder), manifest)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def prompt_ids(self) -> list[str]:
        """[P] hex ids in stored order (made on demand: a Python string each)."""
        return _hex_ids(self.ids)

    def check(self, expected: Fingerprint) -> None:
        """Raise `StoreError` with one line for each field in which this store is not what a run expects."""
        differences = self.fingerprint.differences(expected)
        if differences:
            fix = "change the recipe back, or estimate V* into another vstar.dir"
            raise StoreError("\n".join([f"{self.folder}: not the V* store of this run; {fix}", *differences]))

    def values(self, beta1: float, estimator: str) -> PromptValues:
        """V* of every prompt under `estimator` (a key of `ESTIMATORS`)."""
        blocks = [self.rewards[start : start + _VALUE_ROWS] for start in range(0, len(self), _VALUE_ROWS)]
        return PromptValues(self, np.concatenate([ESTIMATORS[estimator](block, beta1) for block in blocks]))

    def rows_of(self, prompt_ids: Sequence[str]) -> NDArray[np.intp]:
        """[len(prompt_ids)] rows that hold these prompts. Raises `StoreError` naming one that is not in the store."""
        wanted = _binary_ids(prompt_ids)
        position = np.searchsorted(self._sorted_ids[:, 0], wanted[:, 0])
        found = np.full(len(wanted), -1, dtype=np.intp)
        # Almost always one round: as many as ids share their first 64 bits.
        while (open_ := np.flatnonzero((found < 0) & (position < len(self)))).size:
            candidates = self._sorted_ids[position[open_]]
            same = (candidates == wanted[open_]).all(axis=1)
            found[open_[same]] = position[open_[same]]
            position[open_] += 1
            position[open_[candidates[:, 0] != wanted[open_, 0]]] = len(self)
        absent = np.flatnonzero(found < 0)
        if absent.size:
            raise StoreError(
                f"{self.folder}: {absent.size} of {len(wanted)} prompts have no V*, the first is "
                f"{prompt_ids[absent[0]]}; estimate V* of the data that is trained on"
            )
        return self._order[found]

    def filtered_ids(self, name: str) -> set[str]:
        """Ids of prompts a filter leaves out: all_wrong (no reward above 0), all_right (none below 1), both, none."""
        wrong = (self.rewards <= 0).all(axis=1)
        right = (self.rewards >= 1).all(axis=1)
        left_out = {"none": np.zeros_like(wrong), "all_wrong": wrong, "all_right": right, "both": wrong | right}[name]
        return set(_hex_ids(self.ids[left_out]))

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of all shards (a field of `StoreRow`), in stored order, read when asked for."""
        paths = [self.folder / shard_name(index) for index in range(self.num_shards)]
        return pa.chunked_array([chunk for path in paths for chunk in pq.read_table(path, columns=[name])[name].chunks])

    def _load_shard(
        self, index: int, shard: dict[str, Any], ids: NDArray[np.uint64], rewards: NDArray[np.float64]
    ) -> None:
        path = self.folder / shard["file"]
        again = f"delete it and {_AGAIN}"
        if not path.is_file():
            raise StoreError(f"{path}: missing; {_AGAIN}")
        damage = None
        if (num_bytes := path.stat().st_size) != shard["bytes"]:
            damage = f"truncated or changed, {num_bytes} bytes where the manifest has {shard['bytes']}"
        elif (digest := _sha256(path)) != shard["sha256"]:
            damage = f"damaged, its sha256 is {digest} where the manifest has {shard['sha256']}"
        try:
            file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"{path}: {damage or _one_line(error)}; {again}") from None
        # Before the checksum: a shard of another store is told apart from a damaged one.
        footer = _footer(file, path)
        _check_same_store(path, footer, self.fingerprint, self.num_shards)
        if footer.index != index:
            raise StoreError(f"{path}: holds shard {footer.index}, not shard {index}; put the original file back")
        if damage:
            raise StoreError(f"{path}: {damage}; {again}")
        if file.metadata.num_rows != shard["rows"]:
            raise StoreError(f"{path}: {file.metadata.num_rows} rows where the manifest has {shard['rows']}; {again}")
        table = file.read(columns=["prompt_id", "rewards"]).combine_chunks()
        if len(table) == 0:
            return
        num_samples = rewards.shape[1]
        lists = table["rewards"].chunk(0)
        if not (np.diff(lists.offsets.to_numpy()) == num_samples).all():
            raise StoreError(f"{path}: has prompts without {num_samples} rewards; {again}")
        rewards[:] = lists.flatten().to_numpy().reshape(-1, num_samples)
        if not np.isfinite(rewards).all():
            raise StoreError(f"{path}: has rewards that are not finite; {again}")
        ids[:] = _uint64_pairs(table["prompt_id"].chunk(0))

    def _refuse_repeated_ids(self, shard_stops: NDArray[np.int64]) -> None:
        repeated = np.flatnonzero((self._sorted_ids[1:] == self._sorted_ids[:-1]).all(axis=1))
        if repeated.size:
            rows = self._order[repeated[0] : repeated[0] + 2]
            names = sorted({shard_name(int(index)) for index in np.searchsorted(shard_stops, rows, side="right")})
            prompt_id = _hex_ids(self._sorted_ids[repeated[:1]])[0]
            raise StoreError(
                f"{self.folder}: prompt_id {prompt_id} is stored twice ({', '.join(names)}; {repeated.size} such ids); "
                f"delete the shard that does not belong here and {_AGAIN}"
            )


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.parquet"


def _table(rows: Sequence[StoreRow], num_samples: int, name: str) -> pa.Table:
    for row in rows:
        sizes = {len(row.rewards), len(row.lengths), len(row.finish_reasons)}
        if row.responses is not None:
            sizes.add(len(row.responses))
        if sizes != {num_samples}:
            raise StoreError(f"{name}: prompt {row.prompt_id} has {sorted(sizes)} samples, not {num_samples}")
    ids = [row.prompt_id for row in rows]
    if len(set(ids)) != len(ids):
        repeated = next(prompt_id for prompt_id in ids if ids.count(prompt_id) > 1)
        raise StoreError(f"{name}: prompt_id {repeated} is stored twice")
    if not np.isfinite([row.rewards for row in rows]).all():
        raise StoreError(f"{name}: a reward is not finite; graders' failures must be given reward.failure_reward")
    columns: dict[str, pa.Array] = {
        "prompt_id": pa.array([bytes.fromhex(i) for i in ids], pa.binary(_HASH_BYTES)),
        "text_hash": pa.array([bytes.fromhex(row.text_hash) for row in rows], pa.binary(_HASH_BYTES)),
        "rewards": pa.array([row.rewards for row in rows], pa.list_(pa.float64())),
        "lengths": pa.array([row.lengths for row in rows], pa.list_(pa.int32())),
        "finish_reasons": pa.array([row.finish_reasons for row in rows], pa.list_(pa.string())),
        "num_failures": pa.array([row.num_failures for row in rows], pa.int32()),
    }
    if rows and rows[0].responses is not None:
        columns["responses"] = pa.array([row.responses for row in rows], pa.list_(pa.list_(pa.int32())))
    return pa.table(columns)


def _read_manifest(path: Path, manifest: Any) -> tuple[Fingerprint, int, list[dict[str, Any]]]:
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"{path}: schema version {version!r}, this program reads {SCHEMA_VERSION}; "
            "use the version of this program that wrote it, or estimate V* again"
        )
    try:
        fingerprint = Fingerprint.model_validate(manifest["fingerprint"])
        num_shards, shards = manifest["num_shards"], manifest["shards"]
        listed = [(shard["file"], int(shard["rows"]), int(shard["bytes"]), shard["sha256"])[0] for shard in shards]
    except (KeyError, TypeError, ValidationError, ValueError) as error:
        raise StoreError(f"{path}: damaged ({_one_line(error)}); delete it and {_AGAIN}") from None
    absent = sorted({shard_name(index) for index in range(num_shards)} - set(listed))
    if absent or len(listed) != num_shards:
        raise StoreError(f"{path}: lists {len(listed)} of {num_shards} shards, without {absent[:8]}; {_AGAIN}")
    return fingerprint, num_shards, shards


def _parquet_file(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{path}: not a whole Parquet file ({_one_line(error)}); delete it and {_AGAIN}") from None


def _footer(file: pq.ParquetFile, path: Path) -> _Footer:
    record = (file.schema_arrow.metadata or {}).get(_FOOTER_KEY)
    if record is None:
        raise StoreError(f"{path}: not a shard of a V* store; move it elsewhere")
    try:
        tree = json.loads(record)
        return _Footer(Fingerprint.model_validate(tree["fingerprint"]), tree["index"], tree["num_shards"])
    except (ValueError, KeyError, TypeError) as error:
        reason = _one_line(error)
        raise StoreError(f"{path}: damaged, or of another version of this program ({reason}); {_AGAIN}") from None


def _check_same_store(path: Path, footer: _Footer, fingerprint: Fingerprint, num_shards: int) -> None:
    differences = footer.fingerprint.differences(fingerprint)
    if differences:
        fix = "use another vstar.dir, or delete it"
        raise StoreError("\n".join([f"{path}: a shard of another V* store; {fix}", *differences]))
    if footer.num_shards != num_shards:
        raise StoreError(
            f"{path}: one of {footer.num_shards} shards where this store has {num_shards}; "
            "keep vstar.prompts_per_shard as it was, or use another vstar.dir"
        )


def _rename_durably(partial: Path, path: Path) -> None:
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _uint64_pairs(ids: pa.FixedSizeBinaryArray) -> NDArray[np.uint64]:
    """[rows, 2] view of 16-byte ids, as big-endian halves so that hex order is numeric order."""
    start = ids.offset * _HASH_BYTES
    data = np.frombuffer(ids.buffers()[1], dtype=np.uint8)[start : start + len(ids) * _HASH_BYTES]
    return data.view(">u8").reshape(-1, 2)


def _binary_ids(prompt_ids: Iterable[str]) -> NDArray[np.uint64]:
    data = b"".join(bytes.fromhex(prompt_id) for prompt_id in prompt_ids)
    return np.frombuffer(data, dtype=">u8").reshape(-1, 2).astype(np.uint64)


def _hex_ids(ids: NDArray[np.uint64]) -> list[str]:
    text = ids.astype(">u8").tobytes().hex()
    return [text[i : i + 2 * _HASH_BYTES] for i in range(0, len(text), 2 * _HASH_BYTES)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
