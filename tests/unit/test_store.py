"""The V* store: what goes in comes out, every kind of damage is refused in one line, a killed job resumes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from math import e, log
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_apo.values import store as store_module
from megatron_apo.values.store import SCHEMA_VERSION, Fingerprint, StoreError, StoreRow, StoreWriter, VStarStore

FINGERPRINT = Fingerprint(
    model_hash="ab" * 32,
    tokenizer_hash="cd" * 32,
    template_hash="ef" * 32,
    template="chat",
    thinking="on",
    temperature=1.0,
    top_p=1.0,
    top_k=-1,
    max_response_tokens=32,
    stop_token_ids=[1, 2],
    reward_name="arithmetic",
    reward_version="1",
    reward_options={"strict": True},
    failure_reward=0.0,
    dataset_hash="01" * 32,
    max_prompt_tokens=16,
    samples_per_prompt=2,
    seed=3,
)


def prompt_id(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def rows(start: int, stop: int, **changes) -> list[StoreRow]:
    """Prompt i of three kinds: none, one or both of its two samples right."""
    return [
        StoreRow(
            prompt_id=prompt_id(i),
            text_hash=prompt_id(-i),
            rewards=[float(i % 3 > 0), float(i % 3 > 1)],
            lengths=[i, i + 1],
            finish_reasons=["stop", "length"],
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
    assert store.rewards.tolist() == [[float(i % 3 > 0), float(i % 3 > 1)] for i in range(10)]
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


def test_every_flipped_byte_of_a_shard_is_refused(folder):
    path = folder / "shard-00002.parquet"
    data = path.read_bytes()
    for position in range(0, len(data), 97):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(StoreError, match="shard-00002"):
            VStarStore.open(folder)


def test_a_truncated_file_is_refused(folder):
    path = folder / "shard-00000.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    assert "shard-00000.parquet: truncated" in refusal(folder)


def test_a_missing_shard_is_refused(folder):
    (folder / "shard-00002.parquet").unlink()
    assert "shard-00002.parquet: missing" in refusal(folder)


def test_a_shard_missing_from_the_manifest_is_refused(folder):
    edit_manifest(folder, lambda tree: tree["shards"].pop(1))
    assert "shard-00001.parquet" in refusal(folder)


def test_a_wrong_row_count_is_refused(folder):
    edit_manifest(folder, lambda tree: tree["shards"][1].update(rows=5))
    assert "shard-00001.parquet: 4 rows where the manifest has 5" in refusal(folder)


def test_another_schema_version_is_refused(folder):
    edit_manifest(folder, lambda tree: tree.update(schema_version=SCHEMA_VERSION + 1))
    assert f"schema version {SCHEMA_VERSION + 1}, this program reads {SCHEMA_VERSION}" in refusal(folder)


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


def test_a_shard_in_another_ones_place_is_refused(folder):
    shutil.copy(folder / "shard-00000.parquet", folder / "shard-00001.parquet")
    accept_changed_shard(folder, 1)
    assert "holds shard 0, not shard 1" in refusal(folder)


def test_too_few_rewards_of_a_prompt_are_refused(folder):
    path = folder / "shard-00002.parquet"
    table = pq.read_table(path)
    ragged = [[1.0]] + table["rewards"].to_pylist()[1:]
    column = table.schema.get_field_index("rewards")
    pq.write_table(table.set_column(column, table.schema.field("rewards"), [ragged]), path)
    accept_changed_shard(folder, 2)
    assert "without 2 rewards" in refusal(folder)


def test_a_damaged_or_absent_manifest_is_refused(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-30])
    assert "manifest.json: damaged" in refusal(folder)
    path.write_text(json.dumps({"schema_version": SCHEMA_VERSION}))
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
        f"model_hash: store has '{'ab' * 32}', this run has '{'99' * 32}'; set by model.reference",
        f"template_hash: store has '{'ef' * 32}', this run has '{'88' * 32}'; set by model.path (its chat template)",
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
    assert len(again.finish()) == 10
    assert not list(tmp_path.glob(".*"))


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


def test_a_shard_is_durable_before_it_is_named(tmp_path, monkeypatch):
    """temp file, its fsync, rename, fsync of the folder: in this order."""
    events = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(fd):
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{fd}")).name))
        real_fsync(fd)

    def replace(source, target):
        events.append(("rename", Path(target).name))
        real_replace(source, target)

    monkeypatch.setattr(store_module.os, "fsync", fsync)
    monkeypatch.setattr(store_module.os, "replace", replace)
    StoreWriter(tmp_path, FINGERPRINT, 1).write_shard(0, rows(0, 2))
    name = "shard-00000.parquet"
    assert events == [("fsync", f".{name}.partial"), ("rename", name), ("fsync", tmp_path.name)]
