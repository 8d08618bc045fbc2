"""A driver that works alone for longer than a collective may wait. Each rank leaves what it was told."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from megatron_apo.parallel.topology import distributed
from megatron_apo.rollout.failures import on_driver
from tests.dist.ranks import parallel_of

TIMEOUT_S = 10.0


def work() -> str:
    time.sleep(1.5 * TIMEOUT_S)
    return "done"


def main() -> None:
    folder, layout = Path(sys.argv[1]), sys.argv[2]
    with distributed(parallel_of(layout).model_copy(update={"timeout_s": TIMEOUT_S})) as topology:
        (folder / f"told{topology.rank}").write_text(on_driver(topology, work))


if __name__ == "__main__":
    main()
