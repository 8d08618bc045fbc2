"""Ranks that wait for each other for ever, or work and end each at its own time.

    main(WORK, LAYOUT, TIMEOUT_S, WHAT)

Each leaves WORK/joined<rank> once it is in the job. WHAT: "wait", "sum" (an all-reduce over the default group and the
host's, whose result it leaves), or comma-separated seconds that each rank works before it leaves.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_apo.parallel.groups import RankLost, distributed
from tests.dist.ranks import parallel_of


def main(folder: str, layout: str, timeout_s: str, what: str) -> None:
    parallel, path = parallel_of(layout).model_copy(update={"timeout_s": float(timeout_s)}), Path(folder)
    try:
        with distributed(parallel) as topology:
            (path / f"joined{topology.rank}").touch()
            if what == "wait":
                topology.broadcast(None, src=1 - topology.rank)  # from each other: both hang in gloo
            elif what == "sum":
                total = torch.tensor([topology.rank + 1.0])
                dist.all_reduce(total)
                dist.all_reduce(total, group=topology.host_group)
                (path / f"sum{topology.rank}").write_text(str(total.item()))
            else:
                time.sleep(float(what.split(",")[topology.rank]))
    except (OSError, ValueError, RankLost) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
