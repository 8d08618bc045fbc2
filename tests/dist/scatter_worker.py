"""One rank of the test of `scatter`: what it holds of the driver's batch. Started by test_scatter.py.

    main(WORK, LAYOUT)

Each rank writes WORK/LAYOUT.RANK.json: what it knows of all rows, and the rows that it holds.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from megatron_apo.config import build_recipe
from megatron_apo.data.layout import plan_batch
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.parallel.groups import distributed
from megatron_apo.parallel.scatter import scatter
from tests.batches import make_batch
from tests.dist.ranks import parallel_of

NUM_ROWS = 24


def batch() -> RolloutBatch:
    draw = random.Random(7)
    prompts = [[draw.randrange(2**20) for _ in range(draw.randint(1, 8))] for _ in range(NUM_ROWS)]
    responses = [[draw.randrange(2**20) for _ in range(draw.randint(1, 90))] for _ in range(NUM_ROWS)]
    return make_batch(
        prompts,
        responses,
        rewards=[draw.random() for _ in range(NUM_ROWS)],
        log_probs=[[-draw.random() for _ in response] for response in responses],
        prompt_ids=[f"{draw.randrange(10):032x}" for _ in range(NUM_ROWS)],
        finish_reasons=[draw.choice(("stop", "length")) for _ in range(NUM_ROWS)],
        seconds=[draw.random() for _ in range(NUM_ROWS)],
        weight_version=5,
    )


def rows_of(whole: RolloutBatch, dp: int) -> list[list[int]]:
    small = ["data.max_prompt_tokens=10", "sampling.max_response_tokens=90", "train.tokens_per_micro_batch=200"]
    recipe = build_recipe({}, ["model.path=m", "data.train=t", "vstar.dir=v", *small])
    plan = plan_batch(recipe, whole.sequences, num_minibatches=2, dp=dp)
    return [plan.rows_of(replica) for replica in range(dp)]


def main(work: str, layout: str) -> None:
    with distributed(parallel_of(layout)) as topology:
        whole = batch() if topology.is_driver else None
        part = scatter(topology, whole, lambda known: rows_of(known, topology.dp))
        again = scatter(topology, whole, lambda known: rows_of(known, topology.dp))
        assert part.sequences.token_ids_T.tobytes() == again.sequences.token_ids_T.tobytes()
        held = part.sequences.held_H.tolist()
        told = {
            "replica": topology.dp_rank,
            "held": held,
            "bytes": part.sequences.token_ids_T.nbytes + part.log_prob_R.nbytes,
            "prompt_ids": part.prompt_ids,
            "rewards": part.reward_B.tolist(),
            "groups": part.group_B.tolist(),
            "lengths": [part.sequences.prompt_lengths_B.tolist(), part.sequences.response_lengths_B.tolist()],
            "truncated": part.truncated_B.tolist(),
            "versions": part.weight_version_B.tolist(),
            "seconds": part.seconds_B.tolist(),
            "rows": [part.sequences.row(row).tolist() for row in held],
            "log_probs": [part.log_probs([row]).astype(np.float64).tolist() for row in held],
        }
        (Path(work) / f"{layout}.{topology.rank}.json").write_text(json.dumps(told))
