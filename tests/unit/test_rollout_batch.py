"""A rollout batch is what was put into it: in parts, and as a file; and every other file is refused in one line."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_apo.data.rollouts import RolloutBatch, RolloutFolder
from tests.batches import assert_same_batch, make_batch


def random_batch(seed: int, count: int) -> RolloutBatch:
    draw = random.Random(seed)

    def tokens() -> list[int]:
        return [draw.randrange(2**31 - 1) for _ in range(draw.randint(1, 9))]

    responses = [tokens() for _ in range(count)]
    return make_batch(
        [tokens() for _ in range(count)],
        responses,
        rewards=[draw.gauss(0, 1) for _ in range(count)],
        log_probs=[[-draw.expovariate(1) for _ in response] for response in responses],
        prompt_ids=[f"{draw.randrange(max(1, count // 2)):032x}" for _ in range(count)],
        finish_reasons=[draw.choice(("stop", "length")) for _ in range(count)],
        seconds=[draw.random() for _ in range(count)],
        weight_version=draw.randrange(2**40),
    )


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 12))
def test_a_file_holds_every_bit(seed: int, count: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    batch, path = random_batch(seed, count), tmp_path_factory.mktemp("batch") / "step.parquet"
    batch.write(path)
    again = RolloutBatch.read(path)
    assert_same_batch(again, batch)
    assert again.seconds_B.tolist() == batch.seconds_B.tolist()
    assert [file.name for file in path.parent.iterdir()] == ["step.parquet"]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 12), data=st.data())
def test_a_part_knows_all_lengths_and_its_own_tokens(seed: int, count: int, data: st.DataObject) -> None:
    whole = random_batch(seed, count)
    rows = sorted(data.draw(st.sets(st.integers(0, count - 1))))
    part = whole.select(rows)
    assert len(part) == count and part.reward_B is whole.reward_B
    assert part.sequences.positions_B.tolist() == whole.sequences.positions_B.tolist()
    for row in rows:
        assert part.sequences.prompt(row).tolist() == whole.sequences.prompt(row).tolist()
        assert part.sequences.response(row).tolist() == whole.sequences.response(row).tolist()
    assert part.log_probs(rows[::-1]).tolist() == whole.log_probs(rows[::-1]).tolist()
    assert part.sequences.token_ids_T.nbytes == 4 * int(whole.sequences.num_tokens_B[rows].sum())
    assert part.log_prob_R.nbytes == 4 * int(whole.sequences.response_lengths_B[rows].sum())
    for other in set(range(count)) - set(rows):
        with pytest.raises(AssertionError, match=f"row {other} is not held here"):
            part.sequences.row(other)
        with pytest.raises(AssertionError, match=f"row {other} is not held here"):
            part.log_probs([other])


def test_columns_are_what_a_person_would_look_for(tmp_path: Path) -> None:
    batch = make_batch(
        [[5, 6]], [[7, 8, 1]], rewards=[0.5], log_probs=[[-1.0, -2.0, -0.5]], prompt_ids=["ab"], weight_version=3
    )
    path = RolloutFolder(tmp_path / "rollouts").write(3, batch)
    assert path.name == "step-000004.parquet"
    assert pq.read_table(path).to_pylist() == [
        {
            "prompt_id": "ab",
            "group": 0,
            "prompt": [5, 6],
            "response": [7, 8, 1],
            "log_probs": [-1.0, -2.0, -0.5],
            "reward": 0.5,
            "finish_reason": "stop",
            "weight_version": 3,
            "seconds": 0.0,
            "wave": 0,
        }
    ]


def damaged(path: Path) -> dict[str, str]:
    """{what was done to the file's copy: the line that is wanted}; copies are written beside it, by that name."""
    table = pq.read_table(path)

    def changed(name: str, values: pa.Array) -> pa.Table:
        index = table.schema.get_field_index(name)
        return table.set_column(index, table.schema.field(name), values)

    data = path.read_bytes()
    middle = bytearray(data)
    middle[len(data) // 8] ^= 1
    writes = {
        "cut": data[:-20],
        "flipped": bytes(middle),
        "empty": b"",
        "text": b"not a batch at all",
    }
    for name, content in writes.items():
        (path.parent / name).write_bytes(content)
    tables = {
        "other columns": pa.table({"a": [1]}),
        "other format": table.replace_schema_metadata({b"megatron_apo.rollouts": b'{"format": 99}'}),
        "unknown reason": changed("finish_reason", pa.array(["abort"] * len(table))),
        "nulls": changed("reward", pa.array([None] * len(table), pa.float64())),
        "fewer log-probs": changed("log_probs", pa.array([[-1.0]] * len(table), pa.list_(pa.float32()))),
        "empty response": changed("response", pa.array([[]] * len(table), pa.list_(pa.int32()))),
        "no rows": table.slice(0, 0),
    }
    for name, content in tables.items():
        pq.write_table(content, path.parent / name)
    return {
        **dict.fromkeys(writes, "the file is damaged"),
        "other columns": "not a rollout batch of format 2",
        "other format": "not a rollout batch of format 2",
        "unknown reason": r"finish reasons \['abort'\] are not known",
        "nulls": "reward has nulls",
        "fewer log-probs": "not as many log-probs as tokens",
        "empty response": "an empty prompt or response",
        "no rows": "no responses",
        "missing": "no such file; record the step with train --record",
    }


def test_every_other_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "step.parquet"
    random_batch(0, 40).write(path)
    for name, message in damaged(path).items():
        with pytest.raises(ValueError, match=message) as caught:
            RolloutBatch.read(tmp_path / name)
        assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value), name


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    """Pages have checksums; what lies between them is the format's own."""
    path, batch = tmp_path / "step.parquet", random_batch(1, 8)
    batch.write(path)
    data = path.read_bytes()
    for position in range(0, len(data), 41):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        (tmp_path / "flipped").write_bytes(flipped)
        try:
            found = RolloutBatch.read(tmp_path / "flipped")
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert_same_batch(found, batch)


def test_truncated_is_what_the_cap_ended() -> None:
    batch = make_batch([[1], [1]], [[2], [3]], finish_reasons=["length", "stop"])
    assert batch.truncated_B.tolist() == [True, False] and batch.finish_reason_B.dtype == np.uint8
