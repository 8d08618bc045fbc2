"""A rank gets the tokens of its replica's sequences and no others; lengths, rewards and ids are everyone's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.dist.ranks import parallel_of, start_ranks
from tests.dist.scatter_worker import batch, rows_of

LAYOUTS = ["tp2-dp2", "pp2-dp2", "cp2-dp2"]
MORE = ["tp1", "pp2", "dp4", "tp2-pp2-dp2"]


@pytest.mark.parametrize("layout", LAYOUTS + [pytest.param(layout, marks=pytest.mark.full) for layout in MORE])
def test_every_rank_holds_its_replicas_rows(layout: str, tmp_path: Path) -> None:
    start_ranks("tests.dist.scatter_worker", tmp_path, layout)
    whole, parallel = batch(), parallel_of(layout)
    rows = rows_of(whole, parallel.dp)
    assert sorted(row for part in rows for row in part) == list(range(len(whole))) and all(rows)
    ranks = [json.loads((tmp_path / f"{layout}.{rank}.json").read_text()) for rank in range(parallel.world_size)]
    assert [rank["replica"] for rank in ranks].count(0) == parallel.world_size // parallel.dp
    for rank, told in enumerate(ranks):
        assert told["held"] == (list(range(len(whole))) if rank == 0 else rows[told["replica"]]), rank
        assert told["rows"] == [whole.sequences.row(row).tolist() for row in told["held"]]
        assert told["log_probs"] == [whole.log_probs([row]).astype(np.float64).tolist() for row in told["held"]]
        lengths = whole.sequences
        assert told["bytes"] == 4 * sum(
            int(lengths.num_tokens_B[row] + lengths.response_lengths_B[row]) for row in told["held"]
        )
        assert told["prompt_ids"] == list(whole.prompt_ids)
        assert told["rewards"] == whole.reward_B.tolist() and told["groups"] == whole.group_B.tolist()
        assert told["lengths"] == [lengths.prompt_lengths_B.tolist(), lengths.response_lengths_B.tolist()]
        assert told["truncated"] == whole.truncated_B.tolist() and told["versions"] == [5] * len(whole)
        assert told["seconds"] == whole.seconds_B.tolist()
