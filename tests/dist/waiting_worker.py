"""A driver that works alone for longer than a collective may wait. Each rank leaves what it was told."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_apo.parallel.topology import distributed
from megatron_apo.rollout.failures import on_driver
from tests.dist.ranks import parallel_of

TIMEOUT_S = 10.0


def work() -> str:
    time.sleep(1.5 * TIMEOUT_S)
    return "done"


def main(folder: str, layout: str) -> None:
    with distributed(parallel_of(layout).model_copy(update={"timeout_s": TIMEOUT_S})) as topology:
        (Path(folder) / f"told{topology.rank}").write_text(on_driver(topology, work))
