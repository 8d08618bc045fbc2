"""The `ipc` transport between a rank and the workers on its device, here in threads and in shared memory: whose memory
a worker opens, when a slot is used again, and that nobody waits for a worker that fails."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from time import sleep
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_apo.rollout.transport.base import TransferError, heard, told
from megatron_apo.rollout.transport.ipc import IpcReader, IpcSender, Place, _rank_at
from megatron_apo.rollout.transport.shm import NUM_SLOTS
from megatron_apo.telemetry.timers import Stopwatch
from tests.engines import until
from tests.weights import Receiver, TensorSource

NUM_BUCKETS = 7
VALUES = [float(index) for index in range(NUM_BUCKETS)]
DRIVER: Any = SimpleNamespace(watch=Stopwatch())


@pytest.fixture
def source() -> TensorSource:
    """Each tensor is a bucket."""
    return TensorSource({f"t{index}": torch.full((5, 3), value) for index, value in enumerate(VALUES)}, 64)


@pytest.fixture
def sender(source: TensorSource) -> Iterator[IpcSender]:
    """An update of one engine of two workers has begun."""
    made = IpcSender(source.plan, timeout_s=6.0)
    made.open([Receiver(num_workers=2)])
    made.meet()
    yield made
    made.give_up()
    made.close()


def reader(source: TensorSource, rank: int) -> IpcReader:
    return IpcReader(heard(told(source.plan)), rank, torch.device("cpu"))


def info(sender: IpcSender) -> dict[str, Any]:
    return sender.update_info(sender._receivers[0])


def read(reader: IpcReader, where: dict[str, Any]) -> Iterator[float]:
    for bucket, buffer in reader.buckets(where):
        yield float(bucket.views(buffer)[0][0, 0])


def test_a_slot_is_used_again_when_all_workers_have_read_it(sender: IpcSender, source: TensorSource) -> None:
    one, other = (read(reader(source, rank), info(sender)) for rank in range(2))
    with ThreadPoolExecutor(2) as threads:
        sending, reading = threads.submit(sender.send, source, DRIVER), threads.submit(list, one)
        first = next(other)
        until(lambda: source.num_begun >= NUM_SLOTS)
        sleep(0.1)
        begun = source.num_begun
        rest = list(other)
        sending.result(20)
        assert (reading.result(20), [first, *rest]) == (VALUES, VALUES)
    assert begun == NUM_SLOTS, "the second worker has not read the first slot"


def test_a_worker_that_fails_is_named_and_not_taken_for_silent(sender: IpcSender, source: TensorSource) -> None:
    reader(source, 1).give_up(info(sender))
    with pytest.raises(TransferError, match="^worker 1 of engine 0 reads no more$") as caught:
        sender.send(source, DRIVER)
    assert caught.value.silent == ()


def test_a_workers_memory_is_of_the_rank_on_its_device() -> None:
    first = Place("h0", "GPU-a", "ipc:[1] pid:[1]", "/tmp")
    ranks = [first, replace(first, device="GPU-b"), replace(first, host="h1")]
    for number, place in enumerate(ranks):
        assert _rank_at(place, ranks, "worker 0 of engine 0") == number
    with pytest.raises(ValueError, match="worker 0 of engine 0 is in another IPC or PID namespace than rank 1"):
        _rank_at(replace(ranks[1], namespaces="ipc:[1] pid:[2]"), ranks, "worker 0 of engine 0")
    with pytest.raises(ValueError, match=r"on a device that no rank of the trainer has \(GPU-c\)"):
        _rank_at(replace(first, device="GPU-c"), ranks, "worker 0 of engine 0")
