"""The V* store: a folder of Parquet shards and a manifest. Rewards are stored; V* is derived on load.

    STORE/shard-00000.parquet ...   a row is a prompt, see `shards.py`
    STORE/manifest.json             schema version, fingerprint, and of each shard its rows, rewards, bytes and sha256
    STORE/claims/                   while it is filled: which worker is at which shard, see `claims.py`

Each shard carries the fingerprint in its own footer: a killed job finds its finished shards without any other record.
The manifest is written last, and once: what it signed is not signed again. Shapes: P prompts. No Python object per row
is made on the load path.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megatron_apo.config.vstar import MANIFEST
from megatron_apo.values.estimators import ESTIMATORS
from megatron_apo.values.fingerprint import SCHEMA_VERSION, Fingerprint, StoreError
from megatron_apo.values.ids import RowsById, hex_of_ids, ids_of_hex
from megatron_apo.values.samples import SampledRewards, all_wrong
from megatron_apo.values.shards import (
    AGAIN,
    SETTINGS_KEY,
    Footer,
    OtherStoreError,
    StoreRow,
    check_same_store,
    check_version,
    check_whole,
    naming_damage,
    open_shard,
    read_footer,
    read_rewards,
    sha256,
    shard_index,
    shard_name,
    source_of,
    sync_folder,
    uint64_pairs,
    write_shard,
)

NO_VALUE = "each of its responses was cut at the length cap, and reward.truncated is mask"
_READERS = 2  # shards read at once: waiting for files, hashing and decoding release the interpreter
_MOST_TOLD = 8  # shards that an error names
_RUN = 32  # shards that a reader takes at once: handing over a small one takes longer than reading it


class StoreWriter:
    """Writes the `num_shards` shards of a store into `folder`; several writers may share it.

    settings: see `Footer`. Raises `StoreError` if the folder already holds shards of another store or made otherwise.
    """

    def __init__(
        self, folder: Path | str, fingerprint: Fingerprint, num_shards: int, settings: Mapping[str, Any] | None = None
    ):
        self.folder, self.fingerprint, self.num_shards, self.settings = (
            Path(folder),
            fingerprint,
            num_shards,
            settings or {},
        )
        self.finished_shards()

    def finished_shards(self) -> set[int]:
        """Indices of the shards that need not be sampled again."""
        finished = set()
        for path in sorted(self.folder.glob("shard-*.parquet")):
            footer = read_footer(open_shard(path), path)
            check_same_store(path, footer, self.fingerprint, self.num_shards, self.settings)
            finished.add(footer.index)
        return finished

    def written(self) -> set[int]:
        """Indices of the shards whose files are there, by one look at the folder; nothing is read."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:  # the first shard makes it
            names = []
        return {index for index in map(shard_index, names) if index is not None}

    def reopen(self) -> None:
        """Strike the shards that are gone from the manifest of a finished store, so that they can be sampled again.

        What it says of the others still holds: raises `StoreError`, one line for each, for those that are not what it
        signed.
        """
        signed = self._signed()
        kept = [shard for shard in signed if (self.folder / shard["file"]).exists()]
        if len(kept) == len(signed):
            return
        _raise_all([_damage_of(self.folder, shard) for shard in kept])
        self._write_manifest(kept)

    def write_shard(self, index: int, rows: Sequence[StoreRow], seconds: float = 0.0, device: str = "") -> Path:
        """Write shard `index` for good; one that is there already stays as it is.

        Rows must have distinct ids and as many samples as the fingerprint allows. seconds, device: what they cost.
        """
        assert 0 <= index < self.num_shards, f"shard {index} of {self.num_shards}"
        path = self.folder / shard_name(index)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_shard(
            path, rows, Footer(self.fingerprint, index, self.num_shards, round(seconds, 2), device, self.settings)
        )
        return path

    def finish(self) -> VStarStore:
        """Check every shard's content, write the manifest if there is none, and return the store opened."""
        is_signed = (self.folder / MANIFEST).exists() and len(self._signed()) == self.num_shards
        store = VStarStore.open(self.folder) if is_signed else self._close()
        for leftover in self.folder.glob(".*.partial"):
            leftover.unlink(missing_ok=True)
        return store

    def _close(self) -> VStarStore:
        missing = sorted(set(range(self.num_shards)) - self.finished_shards())
        if missing:
            raise StoreError(
                f"{self.folder}: {len(missing)} of {self.num_shards} shards missing, {missing[:8]}; {AGAIN}"
            )
        shards = {shard["file"]: shard for shard in self._signed()}
        for path in (self.folder / shard_name(index) for index in range(self.num_shards)):
            if path.name in shards:
                continue
            num_rows, num_rewards = check_whole(path)
            size = path.stat().st_size
            with open(path, "rb") as file:
                digest = sha256(file)
            shards[path.name] = {
                "file": path.name,
                "rows": num_rows,
                "rewards": num_rewards,
                "bytes": size,
                "sha256": digest,
            }
        listed = [shards[shard_name(index)] for index in range(self.num_shards)]
        store = VStarStore(self.folder, self._manifest(listed))
        self._write_manifest(listed)
        return store

    def _signed(self) -> list[dict[str, Any]]:
        """What the manifest says of shards; nothing where there is none yet."""
        path = self.folder / MANIFEST
        return list(_parse_manifest(path)["shards"]) if path.exists() else []

    def _manifest(self, shards: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.fingerprint.model_dump(mode="json"),
            "num_shards": self.num_shards,
            SETTINGS_KEY: dict(self.settings),
            "shards": shards,
        }

    def _write_manifest(self, shards: list[dict[str, Any]]) -> None:
        partial = self.folder / f".{MANIFEST}.{uuid.uuid4().hex}.partial"
        with open(partial, "w") as file:
            json.dump(self._manifest(shards), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.replace(partial, self.folder / MANIFEST)
        except FileNotFoundError:
            pass  # swept away by another worker, which has closed the store
        sync_folder(self.folder)


class PromptValues:
    """V* by prompt id. A prompt that is not in the store, or has no V*, raises `StoreError`; there is no default.

    values_P: NaN where a prompt has none.
    """

    def __init__(self, store: VStarStore, values_P: NDArray[np.float64]):
        self._store, self.values_P = store, values_P

    def __getitem__(self, prompt_id: str) -> float:
        return float(self.lookup([prompt_id])[0])

    def __len__(self) -> int:
        return len(self.values_P)

    def lookup(self, prompt_ids: Sequence[str]) -> NDArray[np.float64]:
        """[len(prompt_ids)] values, in the order asked for."""
        values = self.values_P[self._store.rows_of(prompt_ids)]
        if np.isnan(values).any():
            first = prompt_ids[int(np.isnan(values).argmax())]
            raise StoreError(f"{self._store.folder}: prompt {first} has no V*: {NO_VALUE}; leave it out")
        return values


class VStarStore:
    """A store that was checked: use `VStarStore.open(folder)`.

    drawn: `SampledRewards` of the P prompts, NaN for masked samples. rewards: the same without these, which all that
    is derived is of. ids: [P, 2] uint64, the halves of each 128-bit prompt id.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], samples_used: int | None = None):
        self.folder = folder
        self.fingerprint, self.num_shards, self.settings, self._shards = _read_manifest(folder / MANIFEST, manifest)
        # Where each shard's rows and rewards begin, and at the end the number of all. Shards are read into their place.
        self._row_starts, self._reward_starts = (
            np.cumsum([0] + [shard[name] for shard in self._shards], dtype=np.int64) for name in ("rows", "rewards")
        )
        num_prompts = self._row_starts[-1]
        self.ids = np.empty((num_prompts, 2), dtype=np.uint64)
        self.drawn = SampledRewards(np.empty(self._reward_starts[-1]), np.empty(num_prompts, dtype=np.int64))
        runs = [range(self.num_shards)[start : start + _RUN] for start in range(0, self.num_shards, _RUN)]
        with ThreadPoolExecutor(_READERS) as readers:
            _raise_all([problem for problems in readers.map(self._load_shards, runs) for problem in problems])
        if samples_used is not None:
            self.drawn = self.drawn.first(samples_used)
        self.rewards = self.drawn.known()
        self._rows = RowsById(self.ids)
        self._refuse_repeated_ids()

    @classmethod
    def open(cls, folder: Path | str, samples_used: int | None = None) -> VStarStore:
        """Read and check a finished store: schema version, every shard's size, sha256, fingerprint, row count and ids.

        samples_used: keep each prompt's first so many samples, masked ones among them; none: all. Raises `StoreError`,
        one line that names the file or field.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise StoreError(f"{path}: not there; run estimate-vstar, or point vstar.dir at a finished store")
        return cls(Path(folder), _parse_manifest(path), samples_used)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def prompt_ids(self) -> list[str]:
        """[P] hex ids in stored order (made on demand: a Python string each)."""
        return hex_of_ids(self.ids)

    def check(self, expected: Fingerprint) -> None:
        """Raise `StoreError` with one line for each field in which this store is not what a run expects."""
        differences = self.fingerprint.differences(expected)
        if differences:
            fix = "change the recipe back, or estimate V* into another vstar.dir"
            raise StoreError("\n".join([f"{self.folder}: not the V* store of this run; {fix}", *differences]))

    def values(self, beta1: float, estimator: str) -> PromptValues:
        """V* of every prompt that has one, under `estimator` (a key of `ESTIMATORS`)."""
        return PromptValues(self, ESTIMATORS[estimator](self.rewards, beta1))

    def rows_of(self, prompt_ids: Sequence[str]) -> NDArray[np.intp]:
        """[len(prompt_ids)] rows that hold these prompts. Raises `StoreError` naming one that is not in the store."""
        rows = self._rows.find(ids_of_hex(prompt_ids))
        absent = np.flatnonzero(rows < 0)
        if absent.size:
            raise StoreError(
                f"{self.folder}: {absent.size} of {len(rows)} prompts have no V*, the first is "
                f"{prompt_ids[absent[0]]}; estimate V* of the data that is trained on"
            )
        return rows

    def other_texts(self, prompt_ids: Sequence[str], text_hashes: Sequence[str]) -> list[int]:
        """Which of these prompts, counted from 0, have another hash of their text here. Raises `StoreError` as
        `rows_of`."""
        rows, found = self.rows_of(prompt_ids), self.column("text_hash").combine_chunks()
        stored_P2, asked_B2 = uint64_pairs(found), ids_of_hex(text_hashes)
        return np.flatnonzero((stored_P2[rows] != asked_B2).any(axis=1)).tolist()

    def left_out(self, name: str, success_rate: tuple[float, float] = (0.0, 1.0)) -> NDArray[np.bool_]:
        """[P] which prompts a filter leaves out, of those that have a V*.

        all_wrong: no reward above 0. all_right: none below 1. both. success_rate: the share of rewards of at least 1
        lies outside the range given. none.
        """
        low, high = success_rate
        rules = {
            "none": lambda rewards_RN: np.zeros(len(rewards_RN), dtype=bool),
            "all_wrong": all_wrong,
            "all_right": lambda rewards_RN: (rewards_RN >= 1).all(axis=1),
            "both": lambda rewards_RN: all_wrong(rewards_RN) | (rewards_RN >= 1).all(axis=1),
            "success_rate": lambda rewards_RN: ((rate_R := (rewards_RN >= 1).mean(axis=1)) < low) | (rate_R > high),
        }
        return self.rewards.per_prompt(rules[name], bool)

    def without_value(self) -> NDArray[np.bool_]:
        """[P] which prompts have no V*: all of their samples are masked."""
        return self.rewards.counts_P == 0

    def filtered_ids(self, name: str, success_rate: tuple[float, float] = (0.0, 1.0)) -> set[str]:
        """Ids of the prompts that `left_out` names, and of those without V*."""
        return set(hex_of_ids(self.ids[self.left_out(name, success_rate) | self.without_value()]))

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of all shards (a field of `StoreRow`), in stored order, read when asked for."""
        paths = [self.folder / shard_name(index) for index in range(self.num_shards)]
        return pa.chunked_array([chunk for path in paths for chunk in open_shard(path).read([name])[name].chunks])

    def hours(self) -> dict[str, float]:
        """Hours that the samples took, each of one device, by device."""
        found: dict[str, float] = {}
        for index in range(self.num_shards):
            path = self.folder / shard_name(index)
            footer = read_footer(open_shard(path), path)
            found[footer.device] = found.get(footer.device, 0.0) + footer.seconds / 3600
        return found

    def _load_shards(self, indices: range) -> list[StoreError]:
        """What is wrong with those that cannot be taken."""
        problems = []
        for index in indices:
            try:
                self._load_shard(index)
            except StoreError as error:
                problems.append(error)
        return problems

    def _load_shard(self, index: int) -> None:
        """Check shard `index` and read it into its place."""
        shard = self._shards[index]
        path = self.folder / shard["file"]
        damage = None
        try:
            num_bytes = path.stat().st_size
            with naming_damage(path), source_of(path, num_bytes) as source:
                damage = _difference(shard, num_bytes, source)
                source.seek(0)
                file = pq.ParquetFile(source)
                check_same_store(
                    path, read_footer(file, path), self.fingerprint, self.num_shards, self.settings, damage
                )
                if not damage:
                    self._fill(index, file, path)
        except FileNotFoundError:
            raise StoreError(f"{path}: missing; {AGAIN}") from None
        except OtherStoreError:
            raise
        except StoreError:
            if not damage:
                raise
        if damage:
            raise StoreError(f"{path}: {damage}; delete it and {AGAIN}")

    def _fill(self, index: int, file: pq.ParquetFile, path: Path) -> None:
        shard, again = self._shards[index], f"delete it and {AGAIN}"
        if file.metadata.num_rows != shard["rows"]:
            raise StoreError(f"{path}: {file.metadata.num_rows} rows where the manifest has {shard['rows']}; {again}")
        row, reward = self._row_starts[index], self._reward_starts[index]
        reward_stop = self._reward_starts[index + 1]
        for ids, counts, rewards in read_rewards(file, path, self.fingerprint):
            rows, row = slice(row, row + len(ids)), row + len(ids)
            places, reward = slice(reward, reward + len(rewards)), reward + len(rewards)
            if reward > reward_stop:
                break
            self.ids[rows], self.drawn.counts_P[rows], self.drawn.flat[places] = ids, counts, rewards
        if reward != reward_stop:
            raise StoreError(f"{path}: has not the {shard['rewards']} rewards that the manifest has; {again}")

    def _refuse_repeated_ids(self) -> None:
        repeated = self._rows.repeated()
        if repeated.size:
            places = np.searchsorted(self._row_starts, repeated[0], side="right") - 1
            names = sorted({shard_name(int(index)) for index in places})
            prompt_id = hex_of_ids(self.ids[repeated[0, :1]])[0]
            raise StoreError(
                f"{self.folder}: prompt_id {prompt_id} is stored twice ({', '.join(names)}; {len(repeated)} such ids); "
                f"delete the shard that does not belong here and {AGAIN}"
            )


def _raise_all(problems: Sequence[StoreError | None]) -> None:
    """Raise the first few of what there is, a line each, as one `StoreError`."""
    found = [str(problem) for problem in problems if problem]
    if len(found) > _MOST_TOLD:
        found[_MOST_TOLD:] = [f"and {len(found) - _MOST_TOLD} other shards"]
    if found:
        raise StoreError("\n".join(found))


def _damage_of(folder: Path, shard: Mapping[str, Any]) -> StoreError | None:
    """What is wrong with a shard that a manifest lists."""
    path = folder / shard["file"]
    with open(path, "rb") as file:
        damage = _difference(shard, path.stat().st_size, file)
    return StoreError(f"{path}: {damage}; delete it and {AGAIN}") if damage else None


def _difference(shard: Mapping[str, Any], num_bytes: int, source: Any) -> str | None:
    """In what a file is not the shard that a manifest lists."""
    if num_bytes != shard["bytes"]:
        return f"truncated or changed, {num_bytes} bytes where the manifest has {shard['bytes']}"
    if (digest := sha256(source)) != shard["sha256"]:
        return f"damaged, its sha256 is {digest} where the manifest has {shard['sha256']}"
    return None


def is_whole(folder: Path) -> bool:
    """Whether a store was closed and still has all of its shards, as far as their names tell."""
    try:
        manifest, there = _parse_manifest(folder / MANIFEST), set(os.listdir(folder))
        names = {shard["file"] for shard in manifest["shards"]}
        return len(names) == int(manifest["num_shards"]) and names <= there
    except (OSError, StoreError, KeyError):  # what is wrong with it, estimate-vstar says
        return False


def _parse_manifest(path: Path) -> dict[str, Any]:
    with naming_damage(path):
        manifest = json.loads(path.read_text())
        check_version(path, manifest)
        if not isinstance(manifest["shards"], list):
            raise TypeError("it lists no shards")
        return manifest


def _read_manifest(path: Path, manifest: Any) -> tuple[Fingerprint, int, dict[str, Any], list[dict[str, Any]]]:
    check_version(path, manifest)
    with naming_damage(path):
        fingerprint = Fingerprint.model_validate(manifest["fingerprint"])
        num_shards, settings, shards = (
            int(manifest["num_shards"]),
            dict(manifest.get(SETTINGS_KEY, {})),
            manifest["shards"],
        )
        for shard in shards:
            shard |= {name: int(shard[name]) for name in ("rows", "rewards", "bytes")}
            if min(shard["rows"], shard["rewards"]) < 0:
                raise ValueError(f"{shard['file']} has a negative size")
        listed = [(shard["file"], shard["sha256"])[0] for shard in shards]
    names = [shard_name(index) for index in range(num_shards)]
    if listed != names:
        absent = sorted(set(names) - set(listed))
        raise StoreError(
            f"{path}: lists {len(listed)} shards, not 0 to {num_shards - 1}; absent: {absent[:8]}; {AGAIN}"
        )
    return fingerprint, num_shards, settings, shards
