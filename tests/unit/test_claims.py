"""Claims on shards: one worker each, whoever dies and whenever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_apo.runtime import guard
from megatron_apo.values.claims import Claims


def claims(
    store: Path, num_shards: int = 4, expires_s: float = 5, hangs_s: float = 60, first: int = 0, written=frozenset()
) -> Claims:
    return Claims(store, num_shards, lambda: set(written), expires_s, hangs_s, first)


def elsewhere(store: Path, name: str, age_s: float) -> Path:
    """A claim of another host, last touched `age_s` ago."""
    path = store / "claims" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 0}))
    then = time.time() - age_s
    os.utime(path, (then, then))
    return path


def test_each_shard_has_one_worker_from_its_own_place_on(tmp_path):
    with claims(tmp_path) as one, claims(tmp_path, first=2) as other:
        assert [one.take(), other.take(), one.take(), other.take()] == [0, 2, 1, 3]
        assert one.take() is None and other.take() is None


def test_written_shards_are_not_taken(tmp_path):
    with claims(tmp_path, written={0, 2}) as one:
        assert [one.take(), one.take(), one.take()] == [1, 3, None]


def test_a_claim_of_another_host_expires_by_silence_and_once(tmp_path):
    elsewhere(tmp_path, "shard-00000.0", age_s=4)
    silent = elsewhere(tmp_path, "shard-00001.0", age_s=6)
    with claims(tmp_path, num_shards=2) as one, claims(tmp_path, num_shards=2) as other:
        assert [one.take(), other.take(), one.take()] == [1, None, None]
        assert silent.exists() and (tmp_path / "claims" / "shard-00001.1").exists()


def hide(path: Path) -> None:
    """Make a claim one of a host that nobody can look at."""
    path.write_text(path.read_text().replace('"host": "', '"host": "not '))


def test_a_live_workers_claims_are_kept_alive_until_it_hangs(tmp_path):
    with claims(tmp_path, num_shards=1, expires_s=0.5, hangs_s=1) as one:
        assert one.take() == 0
        hide(tmp_path / "claims" / "shard-00000.0")
        with claims(tmp_path, num_shards=1, expires_s=0.5) as other:
            for _ in range(15):
                time.sleep(0.15)
                one.alive()
                assert other.take() is None
            end = time.monotonic() + 5
            while other.take() is None:
                assert time.monotonic() < end
                time.sleep(0.05)


def test_a_worker_does_not_take_its_own_shard_again(tmp_path):
    """It was suspended, or the file system was away, for longer than a claim lasts."""
    with claims(tmp_path, num_shards=2) as one:
        assert one.take() == 0
        path = tmp_path / "claims" / "shard-00000.0"
        hide(path)
        os.utime(path, (0, 0))
        assert [one.take(), one.take()] == [1, None]


def test_a_shard_that_is_written_between_the_look_and_the_claim_is_not_taken(tmp_path):
    looks = iter([set(), {0}, {0}])
    with Claims(tmp_path, 1, lambda: next(looks), 5, 60) as one:
        assert [one.take(), one.take()] == [None, None]


def test_the_end_of_the_job_beside_an_old_listing(tmp_path):
    """Another worker has closed the store, and this one's file system still shows the last shard missing."""
    with claims(tmp_path, num_shards=1) as one:
        (tmp_path / "claims").rmdir()
        assert one.take() is None


def test_a_claims_owner_is_told_apart_from_a_later_process_of_its_number(tmp_path):
    with claims(tmp_path, num_shards=1, expires_s=1000) as one, claims(tmp_path, num_shards=1) as other:
        assert one.take() == 0
        path = tmp_path / "claims" / "shard-00000.0"
        owner = json.loads(path.read_text())
        since_boot_s = owner["started"] / os.sysconf("SC_CLK_TCK")
        assert psutil.boot_time() + since_boot_s == pytest.approx(psutil.Process().create_time(), abs=2)
        assert other.take() is None
        path.write_text(json.dumps(owner | {"started": owner["started"] - 1}))
        assert other.take() == 0


def test_a_claim_without_an_owner_waits_for_the_clock(tmp_path):
    """Its maker was killed between making the file and writing it."""
    path = elsewhere(tmp_path, "shard-00000.0", age_s=0)
    path.write_text("")
    with claims(tmp_path, num_shards=1) as one:
        assert one.take() is None
        os.utime(path, (0, 0))
        assert one.take() == 0


TAKE = """
import sys, time
from pathlib import Path
from megatron_apo.values.claims import Claims
with Claims(Path(sys.argv[1]), 60, lambda: set(), 5, 60) as claims:
    print("ready", flush=True)
    sys.stdin.readline()
    print(*iter(claims.take, None), flush=True)
    sys.stdin.readline()
    print("done", flush=True)
"""


def start(store: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE, str(store)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("expired", [False, True])
def test_workers_at_once_share_out_every_shard(expired: bool, tmp_path):
    """Also where all of them find the same dead claims."""
    if expired:
        for index in range(60):
            elsewhere(tmp_path, f"shard-{index:05d}.0", age_s=60)
    workers = [start(tmp_path) for _ in range(4)]
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    taken = [[int(index) for index in worker.stdout.readline().split()] for worker in workers]
    assert [worker.communicate("end\n")[0] for worker in workers] == ["done\n"] * 4
    assert sorted(sum(taken, [])) == list(range(60))


def test_a_killed_worker_on_this_host_is_known_at_once(tmp_path):
    worker = start(tmp_path)
    worker.stdin.write("go\n")
    worker.stdin.flush()
    with claims(tmp_path, num_shards=60, expires_s=1000) as one:
        while len(list((tmp_path / "claims").glob("shard-*"))) < 60:
            time.sleep(0.02)
        assert one.take() is None
        worker.kill()
        while not guard.is_zombie(worker.pid):
            time.sleep(0.02)
        assert one.take() == 0
        worker.communicate()
        assert one.take() == 1


def test_removal_leaves_nothing(tmp_path):
    with claims(tmp_path) as one:
        one.take()
        (tmp_path / "claims" / "clock-1-1").touch()  # of a worker that was killed
        one.remove()
        assert not (tmp_path / "claims").exists()
    with claims(tmp_path, written={0, 1, 2, 3}) as late:
        assert late.take() is None
        late.remove()
    assert list(tmp_path.iterdir()) == []
