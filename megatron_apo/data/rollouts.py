"""A batch of sampled and graded responses as flat arrays, from the engines to the loss, and as a file.

Shapes: B responses of the step, H of them held here, R response tokens of those. Rewards, lengths and ids of all B are
everyone's; tokens and log-probs are those of the rows that a rank holds (`Sequences`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megatron_apo.data.sequences import Int32s, Sequences, starts_of

FINISH_REASONS = ("stop", "length")
FORMAT = 2
_METADATA = b"megatron_apo.rollouts"
_SCHEMA = pa.schema(
    {
        "prompt_id": pa.string(),
        "group": pa.int32(),
        "prompt": pa.list_(pa.int32()),
        "response": pa.list_(pa.int32()),
        "log_probs": pa.list_(pa.float32()),
        "reward": pa.float64(),
        "finish_reason": pa.string(),
        "weight_version": pa.int64(),
        "seconds": pa.float64(),
        "wave": pa.int32(),
    }
)


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """The responses of one step, in the order of its prompts. A response ends with its stop id if one ended it."""

    prompt_ids: tuple[str, ...]  # [B], 32 hex digits each
    group_B: Int32s  # of the step's prompts, which one's it is; a prompt that is drawn twice has two groups
    sequences: Sequences
    log_prob_R: NDArray[np.float32]  # of the held responses' tokens, as the engine that sampled computed them
    reward_B: NDArray[np.float64]  # NaN where a response was not graded, since it is masked
    finish_reason_B: NDArray[np.uint8]  # index of FINISH_REASONS
    weight_version_B: NDArray[np.int64]  # of the weights that sampled the response
    seconds_B: NDArray[np.float64]  # from the step's requests to this response
    wave_B: Int32s  # with which others it was learned from while more was sampled; 0 where all were waited for

    def __post_init__(self) -> None:
        num_tokens = int(self.sequences.response_lengths_B[self.sequences.held_H].sum())
        assert num_tokens == len(self.log_prob_R), f"{len(self.log_prob_R)} log-probs for {num_tokens} tokens"

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def truncated_B(self) -> NDArray[np.bool_]:
        """Whether the length cap ended it."""
        return self.finish_reason_B == FINISH_REASONS.index("length")

    def masked_B(self, rule: str) -> NDArray[np.bool_]:
        """Whether it is in no loss: by the rule "mask" of reward.truncated, where the length cap ended it."""
        return self.truncated_B & (rule == "mask")

    @property
    def groups(self) -> list[list[int]]:
        """The rows of each group, in the order of the groups."""
        found: dict[int, list[int]] = {}
        for row, group in enumerate(self.group_B.tolist()):
            found.setdefault(group, []).append(row)
        return list(found.values())

    def log_probs_of(self, row: int) -> NDArray[np.float32]:
        """Those of one response's tokens; the row must be held."""
        start = self._starts_B[row]
        assert start >= 0, f"row {row} is not held here"
        return self.log_prob_R[start : start + self.sequences.response_lengths_B[row]]

    def log_probs(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """Those of several responses' tokens, one after the other."""
        return np.concatenate([np.empty(0, dtype=np.float32), *(self.log_probs_of(row) for row in rows)])

    @classmethod
    def of_groups(cls, batches: Sequence[RolloutBatch], chosen: Sequence[tuple[int, int]]) -> RolloutBatch:
        """A batch of some groups, each (number of the batch, number of the group), of batches that are held whole; the
        groups are numbered anew."""
        groups = [batch.groups for batch in batches]
        parts = [(batches[batch], row) for batch, group in chosen for row in groups[batch][group]]
        sizes = [len(groups[batch][group]) for batch, group in chosen]

        def column(name: str) -> NDArray:
            return np.array([getattr(batch, name)[row] for batch, row in parts], dtype=getattr(batches[0], name).dtype)

        return cls(
            prompt_ids=tuple(batch.prompt_ids[row] for batch, row in parts),
            group_B=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
            sequences=Sequences.of(
                [batch.sequences.prompt(row).tolist() for batch, row in parts],
                [batch.sequences.response(row).tolist() for batch, row in parts],
            ),
            log_prob_R=np.concatenate([batch.log_probs_of(row) for batch, row in parts]),
            reward_B=column("reward_B"),
            finish_reason_B=column("finish_reason_B"),
            weight_version_B=column("weight_version_B"),
            seconds_B=column("seconds_B"),
            wave_B=column("wave_B"),
        )

    @classmethod
    def of_waves(cls, waves: Sequence[Wave]) -> RolloutBatch:
        """The batch that came in these, which are held whole; each wave is numbered in it."""
        firsts = {
            wave.rows[members[0]]: (number, group)
            for number, wave in enumerate(waves)
            for group, members in enumerate(wave.batch.groups)
        }
        whole = cls.of_groups([wave.batch for wave in waves], [firsts[row] for row in sorted(firsts)])
        wave_B = np.empty(len(whole), dtype=np.int32)
        for number, wave in enumerate(waves):
            wave_B[wave.rows] = number
        return replace(whole, wave_B=wave_B)

    @property
    def waves(self) -> list[Wave]:
        """What the batch, which is held whole, came in."""
        groups, found = self.groups, []
        for number in sorted({*self.wave_B.tolist()}):
            own = [group for group, rows in enumerate(groups) if self.wave_B[rows[0]] == number]
            rows = [row for group in own for row in groups[group]]
            found.append(Wave(rows, RolloutBatch.of_groups([self], [(0, group) for group in own])))
        return found

    def select(self, rows: Sequence[int]) -> RolloutBatch:
        """The same batch with tokens and log-probs of `rows` (ascending) alone; they must be held."""
        return replace(self, sequences=self.sequences.select(rows), log_prob_R=self.log_probs(rows))

    @cached_property
    def _starts_B(self) -> NDArray[np.int64]:
        return starts_of(self.sequences.response_lengths_B, self.sequences.held_H)

    def write(self, path: Path) -> None:
        """Write a batch that is held whole as one Parquet file, a row a response; whole or not at all."""
        sequences = self.sequences
        assert len(sequences.held_H) == len(self), "this rank holds a part of the batch"
        prompts = [sequences.prompt(index) for index in range(len(self))]
        responses = [sequences.response(index) for index in range(len(self))]
        columns = {
            "prompt_id": pa.array(self.prompt_ids, pa.string()),
            "group": pa.array(self.group_B),
            "prompt": _lists(sequences.prompt_lengths_B, np.concatenate(prompts)),
            "response": _lists(sequences.response_lengths_B, np.concatenate(responses)),
            "log_probs": _lists(sequences.response_lengths_B, self.log_prob_R),
            "reward": pa.array(self.reward_B),
            "finish_reason": pa.array([FINISH_REASONS[code] for code in self.finish_reason_B], pa.string()),
            "weight_version": pa.array(self.weight_version_B),
            "seconds": pa.array(self.seconds_B),
            "wave": pa.array(self.wave_B),
        }
        table = pa.table(columns, schema=_SCHEMA.with_metadata({_METADATA: json.dumps({"format": FORMAT})}))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        pq.write_table(
            table,
            partial,
            compression="zstd",
            use_dictionary=["prompt_id", "finish_reason"],
            write_page_checksum=True,
            row_group_size=max(len(self), 1),
        )
        os.replace(partial, path)

    @classmethod
    def read(cls, path: Path) -> RolloutBatch:
        """The batch that `write` wrote, bit for bit. Raises `ValueError` of one line for any other file."""
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                known = json.loads((file.schema_arrow.metadata or {}).get(_METADATA, b"{}"))
                table = file.read() if known.get("format") == FORMAT and file.schema_arrow.equals(_SCHEMA) else None
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; record the step with train --record") from None
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{path}: the file is damaged ({' '.join(str(error).split())[:200]})") from error
        if table is None:
            raise ValueError(f"{path}: not a rollout batch of format {FORMAT}; give a file of train --record")
        column = {name: table.column(name).combine_chunks() for name in table.column_names}
        if nulls := [name for name, values in column.items() if _has_nulls(values)]:
            raise ValueError(f"{path}: {', '.join(nulls)} has nulls; a recorded batch has none")
        prompt_lengths_B, prompt_ids_T = _flat(column["prompt"])
        response_lengths_B, response_ids_R = _flat(column["response"])
        log_prob_lengths_B, log_prob_R = _flat(column["log_probs"])
        reasons = column["finish_reason"].to_pylist()
        if unknown := set(reasons) - set(FINISH_REASONS):
            raise ValueError(f"{path}: finish reasons {sorted(unknown)} are not known; these are: {FINISH_REASONS}")
        if not len(table) or not (prompt_lengths_B.all() and response_lengths_B.all()):
            raise ValueError(f"{path}: it has no responses, or an empty prompt or response")
        if not np.array_equal(log_prob_lengths_B, response_lengths_B):
            raise ValueError(f"{path}: a response has not as many log-probs as tokens")
        prompts = np.split(prompt_ids_T, np.cumsum(prompt_lengths_B)[:-1])
        responses = np.split(response_ids_R, np.cumsum(response_lengths_B)[:-1])
        token_ids = [ids for pair in zip(prompts, responses, strict=True) for ids in pair]
        return cls(
            prompt_ids=tuple(column["prompt_id"].to_pylist()),
            group_B=column["group"].to_numpy(),
            sequences=Sequences(prompt_lengths_B, response_lengths_B, np.arange(len(table)), np.concatenate(token_ids)),
            log_prob_R=log_prob_R,
            reward_B=column["reward"].to_numpy(),
            finish_reason_B=np.array([FINISH_REASONS.index(reason) for reason in reasons], dtype=np.uint8),
            weight_version_B=column["weight_version"].to_numpy(),
            seconds_B=column["seconds"].to_numpy(),
            wave_B=column["wave"].to_numpy(),
        )


@dataclass(frozen=True)
class Wave:
    """Whole groups of a step's batch that came together: `rows` of it, ascending within a group, and these alone as a
    batch, whose groups are numbered by themselves."""

    rows: list[int]
    batch: RolloutBatch


@dataclass(frozen=True)
class RolloutFolder:
    """Recorded batches, a file a step."""

    folder: Path

    def path(self, step: int) -> Path:
        """Of the batch that step `step`, counted from 0, learned from; named as metrics count, from 1."""
        return self.folder / f"step-{step + 1:06d}.parquet"

    def write(self, step: int, batch: RolloutBatch) -> Path:
        batch.write(self.path(step))
        return self.path(step)

    def read(self, step: int) -> RolloutBatch:
        return RolloutBatch.read(self.path(step))


def _lists(lengths_B: Int32s, values: NDArray) -> pa.ListArray:
    """B lists that lie one after the other in `values`."""
    offsets = np.concatenate([[0], np.cumsum(lengths_B)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _has_nulls(values: pa.Array) -> bool:
    return bool(values.null_count or (isinstance(values, pa.ListArray) and values.flatten().null_count))


def _flat(lists: pa.ListArray) -> tuple[Int32s, NDArray]:
    """(Lengths, values one after the other)."""
    return np.diff(lists.offsets.to_numpy()).astype(np.int32), lists.flatten().to_numpy()
