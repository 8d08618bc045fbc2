"""Stage 2 under torchrun on two agents, one of which goes: nothing outlives it, and each rank's log says why.

(`test_main_job.py` has a run under torchrun that ends well.)
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_apo.runtime import guard
from tests.batches import UNSAMPLED
from tests.e2e.command import Command
from tests.e2e.conftest import assert_all_gone, traces
from tests.e2e.torchrun import start_agents
from tests.runs import write_batches, write_run

LOST = "the connection to another rank was lost; see what that rank said"


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return sum("loss" in json.loads(line) for line in path.read_text().splitlines()) if path.is_file() else 0


def test_sigkill_of_an_agent(command: Callable[..., Command], tmp_path: Path) -> None:
    """Of rank 0's, below which vLLM is. Neither asks the kernel for a signal at its death."""
    run = write_run(tmp_path, "parallel.pp=2", "train.steps=1000").run.dir
    agents = start_agents(command, tmp_path / "agents", "train", "-r", str(tmp_path / "recipe.yaml"))
    agents[0].wait_for(lambda: steps_done(run) >= 1)
    (server,) = agents[0].processes("guard.py")
    everything = traces([server.pid, *guard.descendants(server.pid)])
    assert agents[0].send(signal.SIGKILL) == -signal.SIGKILL
    assert_all_gone(everything)
    assert agents[1].wait() == 1, agents[1].output
    log = (run / "logs" / "rank1.log").read_text()
    assert log.endswith(f"error: rank 1: {LOST}\n") and "Traceback" in log and "stages/train.py" in log, log
    assert LOST not in agents[1].output


@pytest.mark.full
def test_sigterm_of_an_agent(command: Callable[..., Command], tmp_path: Path) -> None:
    """Of rank 1's, without vLLM."""
    recipe = write_run(tmp_path, "parallel.pp=2", "train.steps=500", *UNSAMPLED)
    write_batches(recipe, tmp_path / "batches", range(500))
    replay = f"train.replay={tmp_path / 'batches'}"
    agents = start_agents(command, tmp_path / "agents", "train", "-r", str(tmp_path / "recipe.yaml"), replay)
    agents[0].wait_for(lambda: steps_done(recipe.run.dir) >= 1)
    assert agents[1].send(signal.SIGTERM) == 1, agents[1].output
    assert agents[0].wait() == 1, agents[0].output
    assert f"error: rank 0: {LOST}" in agents[0].output
