"""A rank that falls silent ends the run in time, by name; one that works, or has finished, does not."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_apo.runtime.ports import free_port
from megatron_apo.runtime.signals import RANK_LOST
from tests import hosts
from tests.dist.ranks import Rank, forks, running_ranks, start_ranks

TIMEOUT_S = 6.0  # the last third is room for a machine that is busy
WORKER = "tests.dist.alive_worker"
NO_NAMESPACES = hosts.why_none()
needs_namespaces = pytest.mark.skipif(bool(NO_NAMESPACES), reason=NO_NAMESPACES)


def wait_for(what: Callable[[], bool], limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def joined(folder: Path) -> Callable[[], bool]:
    return lambda: len(list(folder.glob("joined*"))) == 2


def last_line(rank: Rank) -> str:
    return rank.log.read_text().splitlines()[-1]


def end_in_time(rank: Rank, since: float) -> None:
    """It ends with RANK_LOST, and by its own clock within the timeout: a busy machine may take longer."""
    rank.process.join(since + TIMEOUT_S + 10 - time.monotonic())
    took_s = time.monotonic() - since
    assert rank.process.exitcode == RANK_LOST, rank.log.read_text()
    print(f"{rank.log.stem} ended {took_s:.2f} s after it, of {TIMEOUT_S:g} s")
    assert took_s < 2 * TIMEOUT_S
    assert float(last_line(rank).partition(" silent for ")[2].split()[0]) < TIMEOUT_S, last_line(rank)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_ends_the_run(stopped: int, tmp_path: Path) -> None:
    with running_ranks(WORKER, tmp_path, "pp2", str(TIMEOUT_S), "wait") as ranks:
        wait_for(joined(tmp_path))
        time.sleep(0.5)  # into the collective
        os.kill(ranks[stopped].process.pid, signal.SIGSTOP)
        end_in_time(ranks[1 - stopped], time.monotonic())
    said = last_line(ranks[1 - stopped])
    assert said.startswith(f"error: rank {stopped} ({socket.gethostname()}) has been silent for "), said
    assert said.endswith(f" s (parallel.timeout_s={TIMEOUT_S:g})"), said


def test_a_third_rank_is_told_which(tmp_path: Path) -> None:
    """Rank 2 looks at rank 0 alone, which lives."""
    with running_ranks(WORKER, tmp_path, "pp3", str(TIMEOUT_S), "60,60,60") as ranks:
        wait_for(lambda: len(list(tmp_path.glob("joined*"))) == 3)
        os.kill(ranks[1].process.pid, signal.SIGSTOP)
        since = time.monotonic()
        for rank in (ranks[0], ranks[2]):
            end_in_time(rank, since)
    assert last_line(ranks[2]) == last_line(ranks[0])
    assert last_line(ranks[0]).startswith("error: rank 1 (")


def test_a_store_of_torchruns_that_falls_silent_ends_the_run(tmp_path: Path) -> None:
    """An agent's that was stopped: no rank is blamed."""
    port = free_port("127.0.0.1")
    agent = forks().Process(target=serve_store, args=(port,))
    agent.start()
    try:
        told = {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        with running_ranks(WORKER, tmp_path, "pp2", str(TIMEOUT_S), "wait", **told) as ranks:
            wait_for(joined(tmp_path))
            os.kill(agent.pid, signal.SIGSTOP)
            since = time.monotonic()
            for rank in ranks:
                end_in_time(rank, since)
                assert last_line(rank).startswith(f"error: the job's store at 127.0.0.1:{port} has been silent for ")
    finally:
        agent.kill()
        agent.join()


def serve_store(port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    while store:
        time.sleep(1)


@pytest.mark.parametrize("seconds", [f"0,{1.5 * TIMEOUT_S}", f"{1.5 * TIMEOUT_S},0"])
def test_a_rank_that_has_finished_is_not_missed(seconds: str, tmp_path: Path) -> None:
    start_ranks(WORKER, tmp_path, "pp2", str(TIMEOUT_S), seconds)


def test_ranks_that_are_done_end_at_once(tmp_path: Path) -> None:
    """Though beats are ten seconds apart."""
    with running_ranks(WORKER, tmp_path, "pp2", "1800", "0,0") as ranks:
        wait_for(joined(tmp_path))
        since = time.monotonic()
        for rank in ranks:
            rank.process.join(9)
            assert rank.process.exitcode == 0, rank.log.read_text()
        print(f"ended {time.monotonic() - since:.2f} s after they were done")


def test_a_job_that_is_stopped_as_a_whole_goes_on(tmp_path: Path) -> None:
    with running_ranks(WORKER, tmp_path, "pp2", str(TIMEOUT_S), "1,1") as ranks:
        wait_for(joined(tmp_path))
        for number, pause_s in ((signal.SIGSTOP, 1.5 * TIMEOUT_S), (signal.SIGCONT, 0)):
            for rank in ranks:
                os.kill(rank.process.pid, number)
            time.sleep(pause_s)
        for rank in ranks:
            rank.process.join(30)
            assert rank.process.exitcode == 0, rank.log.read_text()


@needs_namespaces
def test_a_link_that_is_cut_ends_both_sides(tmp_path: Path) -> None:
    """Between hosts whose own names resolve to loopback: gloo connects, by the interface that leads to the other."""
    with hosts.network(tmp_path) as network:
        there = {"hosts": network.hosts, "MASTER_ADDR": "h0"}
        with running_ranks(WORKER, tmp_path, "pp2", "60", "sum", **there) as ranks:
            for rank in ranks:
                rank.process.join(60)
                assert rank.process.exitcode == 0, rank.log.read_text()
        # 1 + 2 on both, summed again over both
        assert [(tmp_path / f"sum{rank}").read_text() for rank in range(2)] == ["6.0", "6.0"]
        for path in tmp_path.glob("joined*"):
            path.unlink()
        with running_ranks(WORKER, tmp_path, "pp2", str(TIMEOUT_S), "wait", **there) as ranks:
            wait_for(joined(tmp_path))
            time.sleep(0.5)
            network.cut(1)
            since = time.monotonic()
            for rank in ranks:
                end_in_time(rank, since)
            assert last_line(ranks[0]).startswith("error: rank 1 (h1) has been silent for ")
            assert last_line(ranks[1]).startswith("error: rank 0 (h0) has been silent for ")


@needs_namespaces
def test_a_loopback_master_of_several_hosts_is_refused(tmp_path: Path) -> None:
    with hosts.network(tmp_path) as network:
        with running_ranks(WORKER, tmp_path, "pp2", "2", "sum", hosts=network.hosts) as ranks:
            for rank in ranks:
                rank.process.join(60)
                assert rank.process.exitcode == 1, rank.log.read_text()
    assert "MASTER_ADDR=127.0.0.1 has to be an address by which" in last_line(ranks[0])
    said = ranks[1].log.read_text()
    assert said.count("\n") == 1 and "127.0.0.1" in said and "(h1) in 2 s" in said, said
    assert said.endswith("if rank 0 is on one, give the address of that\n")
