"""The `shm` transport between a sender and its readers, here in threads: what is read is what was put in, a slot is
used again only when all have read it, and nobody waits for one that is gone."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from megatron_apo.rollout.transport import shm
from megatron_apo.rollout.transport.base import TransferError, heard, told
from megatron_apo.rollout.transport.shm import NUM_SLOTS, ShmReader, ShmSender
from megatron_apo.telemetry.timers import Stopwatch
from megatron_apo.weights.plan import Plan, TensorMeta
from tests.weights import Receiver, TensorSource

NUM_BUCKETS = 11
CPU = torch.device("cpu")
PLAN = Plan.of_tensors([TensorMeta(f"t{index}", torch.float32, (5, 3)) for index in range(NUM_BUCKETS)], 64)


@pytest.fixture
def engines(tmp_path: Path) -> list[Receiver]:
    made = [Receiver(tmp_path / "a", num_workers=2), Receiver(tmp_path / "b")]
    for engine in made:
        engine.payload_dir.mkdir()
    return made


def send(sender: ShmSender, version: int) -> None:
    for bucket in PLAN.buckets:
        while not sender.has_room(bucket):
            time.sleep(1e-4)
        bucket.views(sender.buffer_of(bucket))[0].fill_(100 * version + bucket.index)
        sender.publish(bucket)


def read(sender: ShmSender, engine: Receiver, rank: int, delay_s: float = 0.0) -> list[float]:
    reader, found = ShmReader(heard(told(PLAN)), rank, CPU), []
    for bucket, buffer in reader.buckets(sender.update_info(engine)):
        time.sleep(delay_s)
        (view,) = bucket.views(buffer)
        assert (view == view[0, 0]).all()
        found.append(float(view[0, 0]))
    return found


def test_the_plan_is_heard_as_it_was_told() -> None:
    metas = [TensorMeta("a", torch.bfloat16, (3, 2)), TensorMeta("b", torch.float32, ())]
    for plan in (PLAN, Plan.of_tensors(metas, 1000)):
        assert heard(told(plan)) == list(plan.buckets)


def test_every_worker_reads_every_bucket_of_every_update(engines: list[Receiver]) -> None:
    """One of them takes its time, and the sender waits for it. The slots are those of the first update."""
    sender, inodes = ShmSender(PLAN), set()
    with ThreadPoolExecutor(3) as threads:
        for version in (1, 2):
            sender.open(engines)
            inodes |= {(engine.payload_dir / "buckets").stat().st_ino for engine in engines}
            readers = [(engines[0], 0, 0.0), (engines[0], 1, 0.002), (engines[1], 0, 0.0)]
            reading = [threads.submit(read, sender, *reader) for reader in readers]
            send(sender, version)
            expected = [100.0 * version + index for index in range(NUM_BUCKETS)]
            assert [future.result() for future in reading] == [expected] * 3
            sender.close()
    assert len(inodes) == 1
    assert all([path.name for path in engine.payload_dir.iterdir()] == ["buckets"] for engine in engines)


def test_a_slot_is_free_when_all_workers_have_read_it(engines: list[Receiver]) -> None:
    sender = ShmSender(PLAN)
    sender.open(engines)
    for bucket in PLAN.buckets[:NUM_SLOTS]:
        assert sender.has_room(bucket)
        sender.publish(bucket)
    assert not sender.has_room(PLAN.buckets[NUM_SLOTS])
    reading = [ShmReader(PLAN.buckets, 0, CPU).buckets(sender.update_info(engine)) for engine in engines]
    for buckets in reading:
        next(buckets), next(buckets)
    assert not sender.has_room(PLAN.buckets[NUM_SLOTS]), "worker 1 of the first engine has not read it"
    sender.drop(engines[0])
    assert sender.has_room(PLAN.buckets[NUM_SLOTS]) and not sender.has_room(PLAN.buckets[NUM_SLOTS + 1])
    sender.close()


def test_a_worker_reads_slots_that_were_made_anew(engines: list[Receiver]) -> None:
    reader, found = ShmReader(PLAN.buckets, 0, CPU), []
    for version in (1, 2):
        sender = ShmSender(PLAN)  # of another trainer, which finds the first one's slots there
        sender.open(engines[1:])
        with ThreadPoolExecutor(1) as threads:
            info = sender.update_info(engines[1])
            reading = threads.submit(
                lambda info: [float(buffer.view(torch.float32)[0]) for _, buffer in reader.buckets(info)], info
            )
            send(sender, version)
            found.append(reading.result())
        sender.close()
    assert found == [[100.0 * version + index for index in range(NUM_BUCKETS)] for version in (1, 2)]


def test_an_engine_that_joins_later_gets_a_name_of_the_same_slots(engines: list[Receiver]) -> None:
    sender = ShmSender(PLAN)
    inodes = set()
    for engine in engines:  # one at a time, as after a restart
        sender.open([engine])
        inodes.add((engine.payload_dir / "buckets").stat().st_ino)
        sender.close()
    assert len(inodes) == 1


def test_a_worker_that_fails_is_waited_for_by_nobody(engines: list[Receiver]) -> None:
    sender = ShmSender(PLAN)
    sender.open(engines)
    for bucket in PLAN.buckets[:NUM_SLOTS]:
        sender.publish(bucket)
    info = sender.update_info(engines[0])
    others = ShmReader(PLAN.buckets, 0, CPU).buckets(info)
    for _ in range(NUM_SLOTS):
        next(others)
    assert not sender.has_room(PLAN.buckets[NUM_SLOTS])
    ShmReader(PLAN.buckets, 1, CPU).give_up(info)
    with pytest.raises(TransferError, match="another worker failed before t3 was sent"):
        next(others)
    reading = ShmReader(PLAN.buckets, 0, CPU).buckets(sender.update_info(engines[1]))
    assert not sender.has_room(PLAN.buckets[NUM_SLOTS]), "the other engine's worker has not read it"
    next(reading), next(reading)
    assert sender.has_room(PLAN.buckets[NUM_SLOTS])
    sender.close()


def test_an_engine_that_dies_takes_its_names_alone(engines: list[Receiver]) -> None:
    """Also one that the slots were made for; a new one shares those that the other has."""
    import shutil

    sender = ShmSender(PLAN)
    sender.open(engines)
    inode = (engines[1].payload_dir / "buckets").stat().st_ino
    shutil.rmtree(engines[0].payload_dir)
    sender.publish(PLAN.buckets[0])
    assert next(ShmReader(PLAN.buckets, 0, CPU).buckets(sender.update_info(engines[1])))[0].index == 0
    sender.close()
    engines[0].payload_dir.mkdir()
    sender.open(engines)
    assert (engines[0].payload_dir / "buckets").stat().st_ino == inode
    sender.close()
    for engine in engines:
        shutil.rmtree(engine.payload_dir)
        engine.payload_dir.mkdir()
    with ThreadPoolExecutor(1) as threads:  # all are new
        sender.open(engines[1:])
        reading = threads.submit(read, sender, engines[1], 0)
        send(sender, 3)
        assert reading.result()[-1] == 300 + NUM_BUCKETS - 1
        sender.close()


def test_an_engine_that_reads_nothing_is_left_behind(engines: list[Receiver]) -> None:
    """The others get all of it."""
    told_of: list[tuple[list[Receiver], str]] = []

    class Driver:
        watch = Stopwatch()
        require_readers = staticmethod(lambda bucket: None)
        silent = staticmethod(lambda receivers, why: told_of.append((list(receivers), why)))

    sender = ShmSender(PLAN, timeout_s=0.3)
    with ThreadPoolExecutor(1) as threads:
        sender.open(engines)
        reading = threads.submit(read, sender, engines[1], 0)
        source = TensorSource({f"t{index}": torch.full((5, 3), float(index)) for index in range(NUM_BUCKETS)}, 64)
        sender.send(source, Driver())
        assert reading.result() == [float(index) for index in range(NUM_BUCKETS)]
    sender.close()
    assert told_of == [([engines[0]], "it has read no bucket of weights for 0.3 s")]


def test_other_ranks_write_into_the_same_memory(engines: list[Receiver]) -> None:
    sender, rank = ShmSender(PLAN), ShmSender(PLAN)
    sender.open(engines)
    path, inode = sender._place()
    assert not rank._join(path, inode + 1), "another host has another file, or none"
    assert not rank._join(f"{path}-elsewhere", inode)
    assert rank._join(path, inode) and rank._join(path, inode)
    rank.buffer_of(PLAN.buckets[4]).fill_(7)
    assert (sender.buffer_of(PLAN.buckets[4]) == 7).all()
    sender.close()


def test_a_worker_waits_for_no_trainer_that_gave_up_or_is_silent(engines: list[Receiver]) -> None:
    sender = ShmSender(PLAN)
    sender.open(engines)
    info = sender.update_info(engines[0])
    failures: list[str] = []

    def wait() -> None:
        try:
            list(ShmReader(PLAN.buckets, 0, CPU).buckets(info))
        except TransferError as error:
            failures.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    sender.publish(PLAN.buckets[0])
    while not (Path(info["folder"]) / "read.0").exists():
        time.sleep(1e-3)
    sender.close()
    waiting.join(10)
    sender = ShmSender(PLAN, timeout_s=0.005)
    sender.open(engines)
    info = sender.update_info(engines[0])
    wait()
    sender.close()
    assert failures == [
        "the trainer gave up before t1 was sent",
        "the trainer fell silent before t0 was sent",
    ]


def test_no_room_is_said_before_anything_is_sent(engines: list[Receiver], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shm.os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=rf"^sync.dir: 3 buckets of weights take .* MiB, and {engines[0].payload_dir}"):
        ShmSender(PLAN).open(engines)
    assert not list(engines[0].payload_dir.iterdir())
