"""The V* store: what goes in comes out, every kind of damage is refused in one line, a killed job resumes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from math import e, log
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_apo.rollout.stored_prompts import check_prompts
from megatron_apo.values.estimators import ESTIMATORS
from megatron_apo.values.fingerprint import SCHEMA_VERSION, Fingerprint, StoreError
from megatron_apo.values.ids import RowsById, hex_of_ids, ids_of_hex
from megatron_apo.values.samples import SampledRewards
from megatron_apo.values.store import StoreRow, StoreWriter, VStarStore
from tests.stores import FINGERPRINT

ADAPTIVE = FINGERPRINT.model_copy(update={"adaptive": {"stderr": 0.1, "step": 1, "most": 5}})  # 2 to 5 samples
RAGGED = [[0.0, 0.0], [1.0, 1.0], [0.0, 1.0, 0.0, 0.0], [0.0] * 5, [1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]


def prompt_id(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def rows(start: int, stop: int, **changes) -> list[StoreRow]:
    """Prompt i of three kinds: none, one or both of its two samples right."""
    return [
        replace(
            StoreRow(
                prompt_id=prompt_id(i),
                text_hash=prompt_id(-i),
                rewards=[float(i % 3 > 0), float(i % 3 > 1)],
                lengths=[i, i + 1],
                finish_reasons=["stop", "length"],
            ),
            **changes,
        )
        for i in range(start, stop)
    ]


def write_store(folder: Path, fingerprint: Fingerprint = FINGERPRINT) -> Path:
    """Prompts 0..9 in shards of 4, 4 and 2, written out of order."""
    writer = StoreWriter(folder, fingerprint, num_shards=3)
    for index in (2, 0, 1):
        writer.write_shard(index, rows(4 * index, min(4 * index + 4, 10)))
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "vstar")


@pytest.fixture
def folder(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "vstar"))


def ragged_row(number: int, rewards: list[float]) -> StoreRow:
    return StoreRow(
        prompt_id=prompt_id(number),
        text_hash=prompt_id(-number),
        rewards=rewards,
        lengths=[3] * len(rewards),
        finish_reasons=["stop"] * len(rewards),
    )


def write_ragged_store(folder: Path) -> VStarStore:
    writer = StoreWriter(folder, ADAPTIVE, num_shards=2)
    writer.write_shard(0, [ragged_row(i, rewards) for i, rewards in enumerate(RAGGED[:4])])
    writer.write_shard(1, [ragged_row(i, rewards) for i, rewards in enumerate(RAGGED[4:], 4)])
    return writer.finish()


def rows_of(rewards: SampledRewards) -> list[list[float]]:
    stops = np.cumsum(rewards.counts_P).tolist()
    return [rewards.flat[stop - n : stop].tolist() for stop, n in zip(stops, rewards.counts_P.tolist(), strict=True)]


def refusal(folder: Path) -> str:
    with pytest.raises(StoreError) as caught:
        VStarStore.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_manifest(folder: Path, edit) -> None:
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))


def accept_changed_shard(folder: Path, index: int) -> None:
    """Make the manifest agree with the shard's bytes, so that only its content can give it away."""
    path = folder / f"shard-{index:05d}.parquet"
    data = path.read_bytes()
    change = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(folder, lambda tree: tree["shards"][index].update(change))


def test_what_goes_in_comes_out(pristine):
    store = VStarStore.open(pristine)
    assert store.prompt_ids == [prompt_id(i) for i in range(10)]
    assert rows_of(store.rewards) == [[float(i % 3 > 0), float(i % 3 > 1)] for i in range(10)]
    assert store.column("lengths").to_pylist() == [[i, i + 1] for i in range(10)]
    assert store.column("finish_reasons").to_pylist() == [["stop", "length"]] * 10
    assert store.column("text_hash").to_pylist() == [bytes.fromhex(prompt_id(-i)) for i in range(10)]
    assert store.fingerprint == FINGERPRINT
    assert sorted(path.name for path in pristine.iterdir()) == ["manifest.json"] + [
        f"shard-0000{i}.parquet" for i in range(3)
    ]


def test_values_are_derived_on_load(pristine):
    store = VStarStore.open(pristine)
    one_of_two = 0.5 * log((1 + e**2) / 2)
    values = store.values(0.5, "log_mean_exp")
    assert [values[prompt_id(i)] for i in range(3)] == pytest.approx([0, one_of_two, 1])
    assert store.values(0.5, "mean").lookup([prompt_id(i) for i in (7, 0, 5)]) == pytest.approx([0.5, 0, 1])
    assert store.values(0.5, "max")[prompt_id(4)] == 1
    assert store.values(0.5, "mean").lookup([]).shape == (0,)


def test_filters(pristine):
    store = VStarStore.open(pristine)
    wrong, right = ({prompt_id(i) for i in range(10) if i % 3 == kind} for kind in (0, 2))
    assert store.filtered_ids("none") == set()
    assert store.filtered_ids("all_wrong") == wrong
    assert store.filtered_ids("all_right") == right
    assert store.filtered_ids("both") == wrong | right


@pytest.mark.parametrize(
    ("success_rate", "kept"),
    [
        ((0.0, 1.0), {0, 1, 2, 3, 4, 5, 6}),
        ((0.25, 1.0), {1, 2, 4, 5, 6}),
        ((0.26, 1.0), {1, 4, 5, 6}),
        ((0.0, 2 / 3), {0, 2, 3, 4, 6}),
        ((0.1, 0.9), {2, 4, 6}),
        ((0.5, 0.5), set()),
    ],
)
def test_filter_by_success_rate_of_ragged_samples(tmp_path, success_rate, kept):
    """Rates: 0, 1, 1/4, 0, 2/3, 1, 1/3. Both ends belong to the range."""
    store = write_ragged_store(tmp_path)
    left_out = {prompt_id(i) for i in range(7)} - {prompt_id(i) for i in kept}
    assert store.filtered_ids("success_rate", success_rate) == left_out
    assert store.left_out("success_rate", success_rate).tolist() == [i not in kept for i in range(7)]


def test_filters_of_ragged_samples(tmp_path):
    store = write_ragged_store(tmp_path)
    assert store.left_out("all_wrong").tolist() == [i in (0, 3) for i in range(7)]
    assert store.left_out("all_right").tolist() == [i in (1, 5) for i in range(7)]
    assert store.left_out("both").tolist() == [i in (0, 1, 3, 5) for i in range(7)]
    assert not store.left_out("none").any()


def test_filters_of_real_rewards(tmp_path):
    """Wrong is at most 0, right at least 1; in between is neither."""
    writer = StoreWriter(tmp_path, FINGERPRINT, 1)
    rewards = [[-1.0, 0.0], [0.0, 0.5], [1.0, 1.5], [0.5, 1.0], [-2.0, 3.0]]
    writer.write_shard(0, [ragged_row(i, row) for i, row in enumerate(rewards)])
    store = writer.finish()
    assert store.left_out("all_wrong").tolist() == [True, False, False, False, False]
    assert store.left_out("all_right").tolist() == [False, False, True, False, False]
    assert store.left_out("success_rate", (0.5, 0.5)).tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_a_ragged_store_comes_out_as_it_went_in(tmp_path, estimator):
    written = write_ragged_store(tmp_path)
    store = VStarStore.open(tmp_path)
    assert rows_of(store.rewards) == rows_of(written.rewards) == RAGGED
    assert store.column("rewards").to_pylist() == RAGGED
    assert str(store.rewards.samples) == "2 to 5 (3.1 on average)"
    expected = ESTIMATORS[estimator](SampledRewards.of_rows(RAGGED), 0.5)
    np.testing.assert_array_equal(store.values(0.5, estimator).values_P, expected)
    used = VStarStore.open(tmp_path, samples_used=3)
    assert rows_of(used.rewards) == [row[:3] for row in RAGGED]
    assert used.filtered_ids("all_wrong") == {prompt_id(0), prompt_id(3)}
    assert rows_of(VStarStore.open(tmp_path, samples_used=1).rewards) == [row[:1] for row in RAGGED]


def test_a_store_of_no_prompts(tmp_path):
    (tmp_path / "none").mkdir()
    store = StoreWriter(tmp_path / "none", FINGERPRINT, 0).finish()
    assert len(store) == len(store.values(0.5, "log_mean_exp")) == 0
    StoreWriter(tmp_path / "empty", FINGERPRINT, 1).write_shard(0, [])
    store = StoreWriter(tmp_path / "empty", FINGERPRINT, 1).finish()
    assert store.prompt_ids == [] and store.filtered_ids("both") == set() and store.rewards.samples.most == 0


def test_hours_are_added_up_by_device(tmp_path):
    writer = StoreWriter(tmp_path, FINGERPRINT, 3)
    for index, (seconds, device) in enumerate([(1800.0, "a"), (900.0, "b"), (2700.0, "a")]):
        writer.write_shard(index, rows(index, index + 1), seconds, device)
    assert writer.finish().hours() == {"a": 1.25, "b": 0.25}


def test_a_prompt_without_a_value_is_an_error_never_zero(pristine):
    values = VStarStore.open(pristine).values(0.5, "log_mean_exp")
    for absent in (prompt_id(10), "0" * 32, "f" * 32, prompt_id(3)[:16] + "0" * 16):
        with pytest.raises(StoreError, match=absent):
            values[absent]
    with pytest.raises(StoreError, match="1 of 2 prompts have no V"):
        values.lookup([prompt_id(0), prompt_id(10)])


def test_ids_that_share_their_first_half(tmp_path):
    ids = ["00" * 8 + suffix * 8 for suffix in ("00", "ff", "80", "01")]
    writer = StoreWriter(tmp_path, FINGERPRINT, 1)
    same = {"text_hash": "0" * 32, "lengths": [1, 1], "finish_reasons": ["stop"] * 2}
    writer.write_shard(0, [StoreRow(prompt_id=i, rewards=[k, k], **same) for k, i in enumerate(ids)])
    values = writer.finish().values(1.0, "mean")
    assert values.lookup(ids).tolist() == [0, 1, 2, 3]
    with pytest.raises(StoreError, match="no V"):
        values["00" * 8 + "02" * 8]


@pytest.mark.parametrize("leading", [1 << 64, 1 << 8, 1], ids=["random", "few first halves", "one first half"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 700])
def test_rows_are_found_by_id(count, leading):
    rng = np.random.default_rng(0)
    halves = rng.integers(0, 2**64 - 1, (2 * count, 2), dtype=np.uint64, endpoint=True)
    halves[:, 0] %= np.uint64(min(leading, 2**64 - 1))
    ids, absent = halves[:count], halves[count:]
    rows = RowsById(ids)
    assert rows.repeated().shape == (0, 2)
    asked = rng.permutation(2 * count)
    assert rows.find(halves[asked]).tolist() == [row if row < count else -1 for row in asked.tolist()]
    assert rows.find(absent).tolist() == [-1] * count


def test_ids_at_the_ends_of_their_range_are_found():
    ids = np.array([[2**64 - 1, 2**64 - 1], [0, 0], [0, 2**64 - 1], [2**64 - 1, 0], [2**63, 0]], dtype=np.uint64)
    assert RowsById(ids).find(ids).tolist() == [0, 1, 2, 3, 4]
    assert ids_of_hex(hex_of_ids(ids)).tolist() == ids.tolist()


def test_repeated_ids_are_found_among_those_that_share_a_first_half():
    """Rows 2 and 9 of one first half, whose others lie between them; row 5 and 6 of ids like no other."""
    ids = np.array([[7, n] for n in (0, 50, 3, 1, 40, 999, 999, 2, 30, 3)], dtype=np.uint64)
    ids[5:7, 0] = 2**60
    assert {tuple(pair) for pair in RowsById(ids).repeated().tolist()} == {(2, 9), (5, 6)}


@pytest.mark.parametrize("read_rows", [1, 2, 3, 5])
def test_a_shard_is_read_in_parts(tmp_path, monkeypatch, read_rows):
    """No part begins with the first row's rewards again, and a bad row is found in any of them."""
    monkeypatch.setattr("megatron_apo.values.shards._READ_ROWS", read_rows)
    writer = StoreWriter(tmp_path, ADAPTIVE, 1)
    writer.write_shard(0, [ragged_row(i, rewards) for i, rewards in enumerate(RAGGED)])
    store = writer.finish()
    assert rows_of(store.rewards) == RAGGED
    assert store.prompt_ids == [prompt_id(i) for i in range(7)]


def test_responses_are_kept_when_given(tmp_path):
    writer = StoreWriter(tmp_path, FINGERPRINT, 1)
    writer.write_shard(0, rows(0, 2, responses=[[5, 6, 1], []], num_failures=1))
    store = writer.finish()
    assert store.column("responses").to_pylist() == [[[5, 6, 1], []]] * 2
    assert store.column("num_failures").to_pylist() == [1, 1]


# --- damage


@pytest.mark.parametrize("position", [0, 4, 300, -1, -9, -300])
def test_a_flipped_byte_is_refused(folder, position):
    path = folder / "shard-00001.parquet"
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)
    message = refusal(folder)
    assert "shard-00001.parquet" in message and "sha256" in message


def flips(path: Path, stride: int):
    """The file with one bit flipped, at every `stride`-th byte: each of the eight bits in turn."""
    data = path.read_bytes()
    for place, position in enumerate(range(0, len(data), stride)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << place % 8]) + data[position + 1 :])
        yield position
    path.write_bytes(data)


def test_a_flipped_bit_anywhere_in_a_shard_is_refused(folder):
    """Also in the names of columns, which are no longer UTF-8 then, and in the seed of the footer's fingerprint."""
    for position in flips(folder / "shard-00002.parquet", stride=7):
        with pytest.raises(StoreError, match=r"shard-00002.*(where the manifest has|another V|schema version)"):
            VStarStore.open(folder)
            pytest.fail(f"byte {position}")


def test_a_flipped_bit_before_the_store_is_signed_changes_nothing_or_is_refused(pristine, folder):
    """Parquet's own checksums are of pages; of the metadata around them only what is read matters."""
    (folder / "manifest.json").unlink()
    expected, num_refused = VStarStore.open(pristine), 0
    for position in flips(folder / "shard-00002.parquet", stride=11):
        try:
            found = StoreWriter(folder, FINGERPRINT, 3).finish()
        except StoreError as error:
            assert "shard-00002.parquet" in str(error)
            num_refused += 1
            continue
        (folder / "manifest.json").unlink()
        assert found.prompt_ids == expected.prompt_ids and rows_of(found.rewards) == rows_of(expected.rewards), position
        for name in ("lengths", "finish_reasons", "num_failures", "num_unfinished"):
            assert found.column(name).to_pylist() == expected.column(name).to_pylist(), (name, position)
    assert num_refused > 100


@pytest.mark.parametrize(
    "footer", [b"\xff", b"{", b"[]", b"{}", b'{"fingerprint": {"schema_version": %d}}' % SCHEMA_VERSION]
)
def test_a_damaged_footer_is_refused(folder, footer):
    path = folder / "shard-00001.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata({b"megatron_apo": footer}), path)
    assert "shard-00001.parquet: truncated or changed" in refusal(folder)
    accept_changed_shard(folder, 1)
    assert "shard-00001.parquet: damaged (" in refusal(folder)
    with pytest.raises(StoreError, match="shard-00001.parquet: damaged"):
        StoreWriter(folder, FINGERPRINT, 3)


def test_a_truncated_file_is_refused(folder):
    path = folder / "shard-00000.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    assert "shard-00000.parquet: truncated" in refusal(folder)
    accept_changed_shard(folder, 0)
    assert "shard-00000.parquet: " in refusal(folder)
    for size in (0, 3, 500):
        path.write_bytes(path.read_bytes()[:size])
        assert "shard-00000.parquet: truncated" in refusal(folder)
        with pytest.raises(StoreError, match=r"shard-00000.parquet: damaged \(Parquet"):
            StoreWriter(folder, FINGERPRINT, 3)


def test_a_file_of_something_else_is_refused(folder):
    pq.write_table(pa.table({"prompt_id": [1]}), folder / "shard-00000.parquet")
    accept_changed_shard(folder, 0)
    assert "shard-00000.parquet: not a shard of a V* store" in refusal(folder)


def test_a_missing_shard_is_refused(folder):
    (folder / "shard-00002.parquet").unlink()
    assert "shard-00002.parquet: missing" in refusal(folder)


def test_a_shard_missing_from_the_manifest_is_refused(folder):
    edit_manifest(folder, lambda tree: tree["shards"].pop(1))
    assert "shard-00001.parquet" in refusal(folder)


def test_a_wrong_row_count_is_refused(folder):
    edit_manifest(folder, lambda tree: tree["shards"][1].update(rows=5))
    assert "shard-00001.parquet: 4 rows where the manifest has 5" in refusal(folder)


@pytest.mark.parametrize("num_rewards", [0, 7, 9])
def test_a_wrong_number_of_rewards_is_refused(folder, num_rewards):
    edit_manifest(folder, lambda tree: tree["shards"][1].update(rewards=num_rewards))
    assert f"shard-00001.parquet: has not the {num_rewards} rewards that the manifest has" in refusal(folder)


@pytest.mark.parametrize("version", [1, SCHEMA_VERSION + 1, None])
def test_a_manifest_of_another_schema_version_is_refused(folder, version):
    edit_manifest(folder, lambda tree: tree.update(schema_version=version))
    assert f"manifest.json: schema version {version}, this program reads {SCHEMA_VERSION}" in refusal(folder)


@pytest.mark.parametrize("version", [1, SCHEMA_VERSION + 1, None])
def test_a_shard_of_another_schema_version_is_refused(folder, version):
    """Its other fields may have other names, so the version is looked at first."""
    path = folder / "shard-00001.parquet"
    table = pq.read_table(path)
    footer = json.loads(table.schema.metadata[b"megatron_apo"])
    footer = {"fingerprint": {"schema_version": version, "model_sha": "ab"}, "index": footer["index"]}
    pq.write_table(table.replace_schema_metadata({b"megatron_apo": json.dumps(footer).encode()}), path)
    message = f"shard-00001.parquet: schema version {version}, this program reads {SCHEMA_VERSION}"
    assert message in refusal(folder)
    accept_changed_shard(folder, 1)
    assert message in refusal(folder)
    with pytest.raises(StoreError, match=message):
        StoreWriter(folder, FINGERPRINT, 3)


def test_a_repeated_prompt_is_refused(tmp_path):
    writer = StoreWriter(tmp_path, FINGERPRINT, 2)
    writer.write_shard(0, rows(0, 4))
    writer.write_shard(1, rows(3, 6))
    with pytest.raises(StoreError, match=f"{prompt_id(3)} is stored twice .shard-00000.parquet, shard-00001.parquet;"):
        writer.finish()
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(StoreError, match=f"{prompt_id(1)} is stored twice"):
        writer.write_shard(0, rows(0, 2) + rows(1, 2))


@pytest.mark.parametrize("consistent", [False, True], ids=["old manifest", "manifest edited to fit"])
def test_a_shard_of_another_store_is_refused(folder, tmp_path, consistent):
    other = write_store(tmp_path / "other", FINGERPRINT.model_copy(update={"temperature": 0.7}))
    shutil.copy(other / "shard-00001.parquet", folder)
    if consistent:
        accept_changed_shard(folder, 1)
    with pytest.raises(StoreError) as caught:
        VStarStore.open(folder)
    head, field = str(caught.value).splitlines()
    assert "shard-00001.parquet: a shard of another V* store" in head
    assert field == "temperature: store has 0.7, this run has 1.0; set by sampling.temperature"


def test_a_shard_of_the_same_recipe_sampled_again_is_refused(folder, tmp_path):
    """Two stores mixed that differ in nothing but their rewards: the manifest knows its own."""
    writer = StoreWriter(tmp_path / "other", FINGERPRINT, 3)
    other = writer.write_shard(1, rows(4, 8, rewards=[1.0, 1.0]))
    shutil.copy(other, folder)
    assert "shard-00001.parquet: " in refusal(folder) and "where the manifest has" in refusal(folder)


def test_a_shard_in_another_ones_place_is_refused(folder):
    """By its reader, and by a writer, which would take one shard for the other."""
    shutil.copy(folder / "shard-00000.parquet", folder / "shard-00001.parquet")
    accept_changed_shard(folder, 1)
    assert "shard-00001.parquet: holds shard 0" in refusal(folder)
    with pytest.raises(StoreError, match="shard-00001.parquet: holds shard 0"):
        StoreWriter(folder, FINGERPRINT, 3)


def test_shards_out_of_order_in_the_manifest_are_refused(folder):
    edit_manifest(folder, lambda tree: tree["shards"].reverse())
    assert "manifest.json: lists 3 shards, not 0 to 2" in refusal(folder)


@pytest.mark.parametrize("rewards", [[], [1.0], [1.0] * 3])
def test_another_number_of_rewards_of_a_prompt_is_refused(folder, rewards):
    path = folder / "shard-00002.parquet"
    table = pq.read_table(path)
    ragged = [rewards] + table["rewards"].to_pylist()[1:]
    column = table.schema.get_field_index("rewards")
    pq.write_table(table.set_column(column, table.schema.field("rewards"), [ragged]), path)
    accept_changed_shard(folder, 2)
    edit_manifest(folder, lambda tree: tree["shards"][2].update(rewards=sum(map(len, ragged))))
    assert "without 2 rewards" in refusal(folder)


@pytest.mark.parametrize("change", [{"rows": -1}, {"rewards": -8}, {"bytes": "many"}, {"rows": None}])
def test_an_impossible_size_in_the_manifest_is_refused(folder, change):
    edit_manifest(folder, lambda tree: tree["shards"][1].update(change))
    assert "manifest.json: damaged" in refusal(folder)


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), None])
def test_a_reward_that_is_not_finite_is_refused(folder, reward):
    path = folder / "shard-00002.parquet"
    table = pq.read_table(path)
    column = table.schema.get_field_index("rewards")
    rewards = table["rewards"].to_pylist()[:-1] + [[1.0, reward]]
    pq.write_table(table.set_column(column, table.schema.field("rewards"), [rewards]), path)
    accept_changed_shard(folder, 2)
    assert "shard-00002.parquet: " in refusal(folder)


def test_a_damaged_or_absent_manifest_is_refused(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-30])
    assert "manifest.json: damaged" in refusal(folder)
    for tree in ({}, {"fingerprint": FINGERPRINT.model_dump(), "num_shards": "x", "shards": []}):
        path.write_text(json.dumps(tree | {"schema_version": SCHEMA_VERSION}))
        assert "manifest.json: damaged" in refusal(folder)
    path.write_text("[]")
    assert "manifest.json: schema version None" in refusal(folder)
    path.write_bytes(b"\xff")
    assert "manifest.json: damaged" in refusal(folder)
    path.unlink()
    assert "manifest.json: not there" in refusal(folder)


# --- provenance


def test_check_names_each_differing_field_with_both_values_and_the_fix(pristine):
    store = VStarStore.open(pristine)
    store.check(FINGERPRINT.model_copy())
    changes = {"model_hash": "99" * 32, "template_hash": "88" * 32, "reward_version": "2", "max_response_tokens": 64}
    with pytest.raises(StoreError) as caught:
        store.check(FINGERPRINT.model_copy(update=changes))
    lines = str(caught.value).splitlines()
    assert str(pristine) in lines[0] and "vstar.dir" in lines[0]
    assert lines[1:] == [
        f"model_hash: store has '{'ab' * 32}', this run has '{'99' * 32}'; set by model.path, model.reference",
        f"template_hash: store has '{'ef' * 32}', this run has '{'88' * 32}'; set by model.path, data.preset, "
        "data.prompt_format, data.system, data.date",
        "max_response_tokens: store has 32, this run has 64; set by sampling.max_response_tokens",
        "reward_version: store has '1', this run has '2'; set by the installed version of the reward",
    ]


def test_every_field_of_the_fingerprint_is_checked(pristine):
    store = VStarStore.open(pristine)
    for name, value in FINGERPRINT.model_dump().items():
        other = {**value, "x": 1} if isinstance(value, dict) else value * 2 + value if value else 0.5
        with pytest.raises(StoreError, match=rf"\n{name}: store has "):
            store.check(FINGERPRINT.model_copy(update={name: other}))


# --- resume


def test_finished_shards_are_not_repeated(tmp_path):
    writer = StoreWriter(tmp_path, FINGERPRINT, 3)
    assert writer.finished_shards() == set()
    writer.write_shard(1, rows(4, 8))
    (tmp_path / ".shard-00000.parquet.partial").write_bytes(b"half")
    again = StoreWriter(tmp_path, FINGERPRINT, 3)
    assert again.finished_shards() == {1}
    with pytest.raises(StoreError, match=r"2 of 3 shards missing, \[0, 2\]"):
        again.finish()
    again.write_shard(0, rows(0, 4))
    again.write_shard(2, rows(8, 10))
    (tmp_path / ".manifest.json.0.partial").write_bytes(b"half")
    assert len(again.finish()) == 10
    assert not list(tmp_path.glob(".*"))


def test_a_writer_makes_no_folder_before_it_has_a_shard(tmp_path):
    writer = StoreWriter(tmp_path / "mistyped", FINGERPRINT, 3)
    with pytest.raises(StoreError, match="3 of 3 shards missing"):
        writer.finish()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["vstar.prompts_per_shard", "vstar.keep_responses", "rollout.dtype"])
def test_shards_that_were_made_otherwise_are_refused(tmp_path, key):
    """Also where the fingerprint and the number of shards are the same: 16 prompts are two shards of 8 or of 9."""
    settings = {"vstar.prompts_per_shard": 8, "vstar.keep_responses": False, "rollout.dtype": "bfloat16"}
    StoreWriter(tmp_path / "store", FINGERPRINT, 2, settings).write_shard(0, rows(0, 8))
    with pytest.raises(
        StoreError, match=f"shard-00000.parquet: made with {key}={settings[key]} where this store has 9;"
    ):
        StoreWriter(tmp_path / "store", FINGERPRINT, 2, settings | {key: 9})
    other = StoreWriter(tmp_path / "other", FINGERPRINT, 2, settings | {key: 9}).write_shard(1, rows(8, 16))
    writer = StoreWriter(tmp_path / "store", FINGERPRINT, 2, settings)
    shutil.copy(other, tmp_path / "store")
    with pytest.raises(
        StoreError, match=f"shard-00001.parquet: made with {key}=9 where this store has {settings[key]};"
    ):
        writer.finish()
    other.unlink()
    (tmp_path / "store" / other.name).unlink()
    writer.write_shard(1, rows(8, 16))
    assert writer.finish().settings == VStarStore.open(tmp_path / "store").settings == settings


def test_a_finished_store_is_not_signed_again(folder):
    """Else a shard that was exchanged since would be given a good checksum."""
    before = (folder / "manifest.json").read_bytes()
    writer = StoreWriter(folder, FINGERPRINT, 3)
    assert len(writer.finish()) == 10
    (folder / "shard-00001.parquet").unlink()
    StoreWriter(folder, FINGERPRINT, 3).write_shard(1, rows(4, 8, rewards=[1.0, 1.0]))
    with pytest.raises(StoreError, match="where the manifest has"):
        writer.finish()
    assert (folder / "manifest.json").read_bytes() == before
    writer.reopen()  # nothing is missing
    assert (folder / "manifest.json").read_bytes() == before


def test_sampling_a_lost_shard_again_leaves_the_others_signatures(folder):
    """Shard 0 is lost and shard 1 was exchanged: what the manifest said of it still counts."""
    good = (folder / "shard-00001.parquet").read_bytes()
    (folder / "shard-00001.parquet").unlink()
    writer = StoreWriter(folder, FINGERPRINT, 3)
    writer.write_shard(1, rows(4, 8, rewards=[1.0, 1.0]))
    (folder / "shard-00000.parquet").unlink()
    with pytest.raises(StoreError, match="shard-00001.parquet: truncated or changed"):
        writer.reopen()
    (folder / "shard-00001.parquet").write_bytes(good)
    writer.reopen()
    assert "lists 2 shards, not 0 to 2; absent: ['shard-00000.parquet']" in refusal(folder)
    writer.write_shard(0, rows(0, 4, rewards=[1.0, 1.0]))
    (folder / "shard-00002.parquet").write_bytes(good[:-1])  # after it was reopened
    with pytest.raises(StoreError, match="shard-00002.parquet: "):
        writer.finish()
    (folder / "shard-00002.parquet").unlink()
    writer.reopen()
    writer.write_shard(2, rows(8, 10))
    assert rows_of(writer.finish().rewards)[:5] == [[1.0, 1.0]] * 4 + [[1.0, 0.0]]
    StoreWriter(folder, FINGERPRINT, 3).reopen()
    assert len(VStarStore.open(folder)) == 10


def test_all_damaged_shards_are_named(folder):
    for index in (0, 2):
        (folder / f"shard-0000{index}.parquet").write_bytes(b"nothing")
    with pytest.raises(StoreError) as caught:
        VStarStore.open(folder)
    lines = str(caught.value).splitlines()
    assert ["shard-00000.parquet: truncated" in lines[0], "shard-00002.parquet: truncated" in lines[1]] == [True, True]
    assert len(lines) == 2


def as_prompt(i, text_hash=None):
    return SimpleNamespace(prompt_id=prompt_id(i), text_hash=text_hash or prompt_id(-i), row=100 + i)


def test_a_store_has_its_runs_prompts_as_they_are_rendered(pristine):
    """Text and token ids of prompts 4 and 9, in shards 1 and 2, are others; in whatever order they are asked for."""
    prompts = [as_prompt(i, "ab" * 16 if i in (4, 9) else None) for i in reversed(range(10))]
    store = VStarStore.open(pristine)
    assert store.other_texts([p.prompt_id for p in prompts], [p.text_hash for p in prompts]) == [0, 5]
    message = (
        f"{pristine}: 2 of 10 prompts were other text or token ids when they were sampled, the first is row 109, "
        f"{prompt_id(9)}; use the versions of transformers, tokenizers and this program that it was sampled with, or "
        "use another vstar.dir"
    )
    with pytest.raises(StoreError, match=f"^{re.escape(message)}$"):
        check_prompts(store, prompts)


@pytest.mark.parametrize("missing", [False, True], ids=["more prompts", "other prompts"])
def test_a_store_has_the_prompts_of_its_run(pristine, missing):
    """The prompts 0 to 9, of which a run has 0 to 8; or 1 to 10."""
    prompts = [as_prompt(i) for i in (range(1, 11) if missing else range(9))]
    with pytest.raises(StoreError, match="1 of 10 prompts have no" if missing else "10 prompts where data.train has 9"):
        check_prompts(VStarStore.open(pristine), prompts)


def test_resuming_with_another_fingerprint_or_division_is_refused(tmp_path):
    StoreWriter(tmp_path, FINGERPRINT, 3).write_shard(0, rows(0, 4))
    with pytest.raises(StoreError, match="seed: store has 3, this run has 4; set by vstar.seed"):
        StoreWriter(tmp_path, FINGERPRINT.model_copy(update={"seed": 4}), 3)
    with pytest.raises(StoreError, match="one of 3 shards where this store has 2; keep vstar.prompts_per_shard"):
        StoreWriter(tmp_path, FINGERPRINT, 2)


def test_finish_reads_what_it_signs(tmp_path):
    """A byte that rotted between the write and the manifest must not be given a good checksum."""
    writer = StoreWriter(tmp_path, FINGERPRINT, 1)
    path = writer.write_shard(0, rows(0, 1000))
    data = bytearray(path.read_bytes())
    data[200] ^= 1  # inside the first column's page
    path.write_bytes(data)
    with pytest.raises(StoreError, match="shard-00000.parquet: damaged"):
        writer.finish()


@pytest.mark.parametrize("change", [{"rewards": [1.0]}, {"lengths": [1]}, {"rewards": [0.0, float("nan")]}])
def test_bad_rows_are_not_written(tmp_path, change):
    row = StoreRow(**{**vars(rows(0, 1)[0]), **change})
    with pytest.raises(StoreError, match="shard-00000"):
        StoreWriter(tmp_path, FINGERPRINT, 1).write_shard(0, [row])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_the_first_of_two_writers_of_a_shard_stays(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    first, second = StoreWriter(tmp_path, FINGERPRINT, 1), StoreWriter(tmp_path, FINGERPRINT, 1)
    path = first.write_shard(0, rows(0, 4), seconds=1.0, device="first")
    assert first.written() == second.written() == {0}
    before = path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino
    assert second.write_shard(0, rows(0, 4), seconds=9.0, device="second") == path
    assert (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) == before
    assert [name.name for name in tmp_path.iterdir()] == [path.name]
    assert first.finish().hours() == {"first": pytest.approx(1 / 3600)}


def test_a_writer_whose_temporary_file_was_swept_away_gives_way(tmp_path, monkeypatch):
    """Another worker finished the store, and removed what it took for leftovers, while this one still wrote."""
    writer = StoreWriter(tmp_path, FINGERPRINT, 1)
    real_link = os.link

    def late_link(source, target):
        monkeypatch.setattr(os, "link", real_link)
        StoreWriter(tmp_path, FINGERPRINT, 1).write_shard(0, rows(0, 4), device="other")
        StoreWriter(tmp_path, FINGERPRINT, 1).finish()
        real_link(source, target)

    monkeypatch.setattr(os, "link", late_link)
    writer.write_shard(0, rows(0, 4), device="late")
    assert list(VStarStore.open(tmp_path).hours()) == ["other"]


@pytest.mark.parametrize("at_once", [False, True])
def test_both_of_two_writers_may_finish(tmp_path, monkeypatch, at_once):
    writers = [StoreWriter(tmp_path, FINGERPRINT, 2) for _ in range(2)]
    for index, writer in enumerate(writers):
        writer.write_shard(index, rows(4 * index, 4 * index + 4))
    real_replace = os.replace

    def late_replace(source, target):
        monkeypatch.setattr(os, "replace", real_replace)
        writers[1].finish()  # which sweeps away the other one's manifest
        real_replace(source, target)

    if at_once:
        monkeypatch.setattr(os, "replace", late_replace)
    for writer in writers:
        assert len(writer.finish()) == 8
    assert VStarStore.open(tmp_path).prompt_ids == [prompt_id(i) for i in range(8)]
    assert not list(tmp_path.glob(".*"))


def no_links(source, target):
    raise PermissionError(1, "Operation not permitted", str(source))


SLOW_JOB = """
import sys, time
sys.path[:0] = {path!r}
from test_store import FINGERPRINT, rows
from megatron_apo.values.store import StoreWriter
writer = StoreWriter({folder!r}, FINGERPRINT, 200)
for index in sorted(set(range(200)) - writer.finished_shards()):
    writer.write_shard(index, rows(2 * index, 2 * index + 2))
"""


def test_a_killed_job_resumes(tmp_path):
    folder = tmp_path / "vstar"
    script = SLOW_JOB.format(path=[str(Path(__file__).parent), *sys.path], folder=str(folder))
    job = subprocess.Popen([sys.executable, "-c", script])
    try:
        limit = time.monotonic() + 60
        while len(list(folder.glob("shard-*"))) < 5:
            assert job.poll() is None and time.monotonic() < limit
            time.sleep(0.001)
    finally:
        os.kill(job.pid, signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
    writer = StoreWriter(folder, FINGERPRINT, 200)
    done = writer.finished_shards()
    assert 5 <= len(done) < 200
    before = {index: (folder / f"shard-{index:05d}.parquet").stat().st_mtime_ns for index in done}
    for index in set(range(200)) - done:
        writer.write_shard(index, rows(2 * index, 2 * index + 2))
    store = writer.finish()
    assert store.prompt_ids == [prompt_id(i) for i in range(400)]
    assert before == {index: (folder / f"shard-{index:05d}.parquet").stat().st_mtime_ns for index in done}


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_shard_is_durable_before_it_is_named(tmp_path, monkeypatch, links):
    """temp file, its fsync, its name, fsync of the folder: in this order."""
    events = []
    real_fsync = os.fsync

    def fsync(fd):
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{fd}")).name))
        real_fsync(fd)

    def named(call):
        def name(source, target):
            call(source, target)
            events.append(("name", Path(target).name))

        return name

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", named(os.link if links else no_links))
    monkeypatch.setattr(os, "replace", named(os.replace))
    StoreWriter(tmp_path, FINGERPRINT, 1).write_shard(0, rows(0, 2))
    name = "shard-00000.parquet"
    (first, partial), *rest = events
    assert first == "fsync" and partial.startswith(f".{name}.") and partial.endswith(".partial")
    assert rest == [("name", name), ("fsync", tmp_path.name)]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_columns_of_ids_have_no_dictionary_and_the_others_one(pristine):
    """A dictionary of ids, which never repeat, slows reading them down; one of rewards makes them small."""
    group = pq.ParquetFile(pristine / "shard-00000.parquet").metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    without = {column.path_in_schema for column in columns if not column.has_dictionary_page}
    assert without == {"prompt_id", "text_hash"}
