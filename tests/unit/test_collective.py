"""The `collective` transport between a sender and its readers, here in threads, over real gloo groups: what is read is
what was sent, and a member that fails, is missing, falls silent or is a stranger ends a transfer for all in time."""

from __future__ import annotations

import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_apo.rollout.transport import collective, groups
from megatron_apo.rollout.transport.base import PATIENCE, Outcome, TransferError, heard, settled, told
from megatron_apo.rollout.transport.collective import NUM_BUFFERS, CollectiveReader, CollectiveSender
from megatron_apo.rollout.transport.groups import Meeting, MeetingPoint
from megatron_apo.telemetry.timers import Stopwatch
from megatron_apo.weights.digest import digest
from megatron_apo.weights.plan import Plan
from tests.engines import until
from tests.weights import Receiver, TensorSource

CPU = torch.device("cpu")
TIMEOUT_S = 6.0
CONNECT_S = 5 * PATIENCE * TIMEOUT_S  # gloo's, for a first connection


def tensors(version: int) -> dict[str, torch.Tensor]:
    return {f"t{index}": torch.full((5, 3), 100.0 * version + index) for index in range(7)}


PLAN: Plan = TensorSource(tensors(0), 64).plan
NUM_BUCKETS = len(PLAN.buckets)


def reader(rank: int = 0) -> CollectiveReader:
    return CollectiveReader(heard(told(PLAN)), rank, CPU)


def read(one: CollectiveReader, info: dict[str, Any]) -> list[float]:
    found = []
    try:
        for bucket, buffer in one.buckets(info):
            (view,) = bucket.views(buffer)
            assert (view == view[0, 0]).all()
            found.append(float(view[0, 0]))
    except TransferError:
        one.give_up(info)
        raise
    return found


def opened(sender: CollectiveSender, engines: list[Receiver]) -> list[dict[str, Any]]:
    """An update begins: what each engine is told."""
    sender.open(engines)
    sender.meet()
    return [sender.update_info(engine) for engine in engines]


def values(version: int) -> list[float]:
    return [float(value[0, 0]) for value in tensors(version).values()]


def update(
    sender: CollectiveSender, engines: list[Receiver], readers: list[list[CollectiveReader]], version: int
) -> str:
    """One update that arrives; the name of its session."""
    with ThreadPoolExecutor(8) as threads:
        infos = opened(sender, engines)
        reading = [threads.submit(read, one, info) for info, own in zip(infos, readers, strict=True) for one in own]
        digests = sender.send(TensorSource(tensors(version), 64), DRIVER)
        assert [future.result(20) for future in reading] == [values(version)] * len(reading)
    assert digests == {name: digest(value) for name, value in tensors(version).items()}
    return infos[0]["session"]


class Driver:
    """Of an update, what a sender asks."""

    watch = Stopwatch()


DRIVER: Any = Driver()


def test_every_worker_reads_every_bucket_of_every_update() -> None:
    """Groups stay as long as the engines do; an engine that was started again, or joins, has new ones."""
    sender = CollectiveSender(PLAN, timeout_s=TIMEOUT_S)
    engines, readers = [Receiver(num_workers=2), Receiver()], [[reader(0), reader(1)], [reader()]]
    first = update(sender, engines, readers, 1)
    assert update(sender, engines, readers, 2) == first
    engines[1].num_starts, readers[1] = 2, [reader()]
    second = update(sender, engines, readers, 3)
    assert second != first and update(sender, engines, readers, 4) == second
    assert update(sender, engines[:1], readers[:1], 5) != second


def test_what_is_on_its_way_is_not_written_over() -> None:
    """By the buckets after it, which a reader that takes its time lets wait; none fits into what the network holds."""
    source = TensorSource({f"t{index}": torch.full((2**21,), float(index)) for index in range(7)}, 2**20)
    sender, engine = CollectiveSender(source.plan, timeout_s=TIMEOUT_S), Receiver()
    slow = CollectiveReader(heard(told(source.plan)), 0, CPU)

    def read_slowly(info: dict[str, Any]) -> list[tuple[float, float]]:
        found = []
        for _, buffer in slow.buckets(info):
            time.sleep(0.05)
            found.append((float(buffer.view(torch.float32).min()), float(buffer.view(torch.float32).max())))
        return found

    with ThreadPoolExecutor(1) as threads:
        (info,) = opened(sender, [engine])
        reading = threads.submit(read_slowly, info)
        sender.send(source, DRIVER)
        assert reading.result(20) == [(float(index), float(index)) for index in range(7)]


def test_while_a_bucket_is_loaded_the_next_are_on_their_way() -> None:
    """The reader has one and receives one; for as many more there is memory on the sender's side."""
    sender, source = CollectiveSender(PLAN, timeout_s=TIMEOUT_S), TensorSource(tensors(1), 64)
    with ThreadPoolExecutor(1) as threads:
        (info,) = opened(sender, [Receiver()])
        sending = threads.submit(sender.send, source, DRIVER)
        buckets = reader().buckets(info)
        next(buckets)
        until(lambda: source.num_begun >= 2 + NUM_BUFFERS or sending.done())
        time.sleep(0.1)
        begun = source.num_begun
        rest = len(list(buckets))
        sending.result(20)
    assert (begun, rest) == (4, NUM_BUCKETS - 1)


def broken(sender: CollectiveSender, engines: list[Receiver], *members: Callable[[list[dict[str, Any]]], Any]):
    """An update that does not arrive: what the sender raised, what became of each member, and after how long."""
    with ThreadPoolExecutor(8) as threads:
        infos = opened(sender, engines)
        futures: list[Future[Any]] = [threads.submit(member, infos) for member in members]
        start = time.monotonic()
        with pytest.raises(TransferError) as caught:
            sender.send(TensorSource(tensors(1), 64), DRIVER)
        took_s = time.monotonic() - start
        outcomes = [future.exception(CONNECT_S + 10) for future in futures]
    return caught.value, outcomes, took_s


def test_a_reader_that_fails_ends_it_for_all_and_the_next_update_is_right() -> None:
    sender, engines = CollectiveSender(PLAN, timeout_s=TIMEOUT_S), [Receiver(), Receiver()]
    good, bad = reader(), reader()

    def fail(infos: list[dict[str, Any]]) -> None:
        buckets = bad.buckets(infos[1])
        next(buckets), next(buckets)
        bad.give_up(infos[1])

    error, outcomes, took_s = broken(sender, engines, lambda infos: read(good, infos[0]), fail)
    assert "broke off" in str(error) and error.silent == ()
    assert isinstance(outcomes[0], TransferError) and outcomes[1] is None
    assert took_s < TIMEOUT_S / 2
    update(sender, engines, [[good], [bad]], 2)


def test_who_does_not_come_is_named() -> None:
    sender, engines = CollectiveSender(PLAN, timeout_s=1.5), [Receiver(), Receiver(num_workers=2)]
    error, outcomes, took_s = broken(sender, engines, lambda infos: read(reader(), infos[0]))
    expected = "worker 0 of the engine at 127.0.0.1, worker 1 of the engine at 127.0.0.1 did not come within 1 s"
    assert (str(error), error.silent, took_s < 1.5) == (expected, (1,), True)
    assert isinstance(outcomes[0], TransferError)


def test_who_does_not_come_to_a_later_update_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its group is there, and its connections are open."""
    monkeypatch.setattr(collective, "_seen_from_elsewhere", lambda host: host)
    sender, engines = CollectiveSender(PLAN, timeout_s=3.0), [Receiver(), Receiver(host="127.0.0.2")]
    readers = [[reader()], [reader()]]
    update(sender, engines, readers, 1)
    error, outcomes, took_s = broken(sender, engines, lambda infos: read(readers[0][0], infos[0]))
    assert (str(error), error.silent) == ("worker 0 of the engine at 127.0.0.2 did not come within 2 s", (1,))
    assert isinstance(outcomes[0], TransferError) and took_s < 4.0


def test_all_whom_any_rank_blames_are_blamed() -> None:
    outcomes = [Outcome(broken="gone"), Outcome(broken="silent", blamed=(2,)), Outcome(broken="so too", blamed=(0, 2))]
    ranks: Any = SimpleNamespace(rank=0, gather=lambda outcome: outcomes)
    with pytest.raises(TransferError, match="^silent$") as caught:
        settled(ranks, outcomes[0], PLAN)
    assert caught.value.silent == (0, 2)


def test_who_falls_silent_ends_it_in_time() -> None:
    sender, engines = CollectiveSender(PLAN, timeout_s=3.0), [Receiver(), Receiver()]
    silent = reader()

    def fall_silent(infos: list[dict[str, Any]]) -> None:
        next(silent.buckets(infos[1]))

    error, outcomes, took_s = broken(sender, engines, lambda infos: read(reader(), infos[0]), fall_silent)
    assert error.silent == (), "who it is, is found by who has not loaded"
    assert isinstance(outcomes[0], TransferError) and took_s < 3.0
    silent.give_up({})


def test_a_stranger_in_a_members_place_gets_nothing() -> None:
    sender, engines = CollectiveSender(PLAN, timeout_s=TIMEOUT_S), [Receiver(), Receiver()]
    stranger = reader()
    error, outcomes, _ = broken(
        sender,
        engines,
        lambda infos: read(reader(), infos[0]),
        lambda infos: read(stranger, infos[1] | {"key": "00" * 32}),
    )
    assert "was written by somebody who does not know the key" in str(error)
    assert all(isinstance(outcome, TransferError) for outcome in outcomes)


def test_an_address_that_a_stranger_writes_is_used_by_nobody() -> None:
    """He has the port, and is before the engine with what would lead the trainer to him."""
    sender, engines = CollectiveSender(PLAN, timeout_s=TIMEOUT_S), [Receiver()]
    (info,) = opened(sender, engines)
    ((address, port),) = info["points"]
    store = dist.TCPStore(address, port, None, False, wait_for_workers=False)
    theirs = dist.PrefixStore("group", dist.PrefixStore(f"{info['session']}/0", store))
    with ThreadPoolExecutor(2) as threads:
        reading = threads.submit(read, reader(), info)
        sending = threads.submit(sender.send, TensorSource(tensors(1), 64), DRIVER)
        with suppress(RuntimeError):  # when the trainer has closed it
            while not sending.done():
                for rank in range(2):
                    theirs.set(f"0/{rank}", b"x" * 200)  # gloo's own name of an address
        errors = [future.exception(CONNECT_S + 10) for future in (sending, reading)]
    assert all(isinstance(error, TransferError) for error in errors), errors
    assert any("does not know the key" in str(error) for error in errors), errors


def test_a_value_that_a_stranger_copies_to_another_name_is_used_by_nobody() -> None:
    point = MeetingPoint("127.0.0.1")
    sealed = Meeting(point.store, "m", b"k" * 32).sealed()
    theirs = dist.PrefixStore("group", dist.PrefixStore("m", point.store))
    sealed.set("0/0", b"an address")
    theirs.set("0/1", theirs.get("0/0"))
    assert sealed.get("0/0") == b"an address"
    with pytest.raises(RuntimeError, match="0/1 was written by somebody who does not know the key"):
        sealed.get("0/1")


def test_a_stranger_who_connects_in_a_members_place_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo asks nobody who he is: whoever is first at the address that the trainer's rank says is taken for the member.
    The store shows that address to all."""
    got: list[bytes] = []

    class Late(groups._SealedStore):
        """The engine's: it hears of the address when the stranger is there already."""

        def get(self, name: str) -> bytes:
            time.sleep(0.5 if threading.current_thread().name == "engine" else 0)
            return super().get(name)

    def connect(info: dict[str, Any]) -> None:
        ((address, port),) = info["points"]
        store = dist.PrefixStore(f"{info['session']}/0/group", dist.TCPStore(address, port, None, False))
        store.wait(["0/0"], timedelta(seconds=TIMEOUT_S))
        said = store.get("0/0")  # a seal and a socket's address, in which the port comes after the family
        begin = said.index(b"\x02\x00", 40) + 2
        for pair in range(4):
            threading.Thread(target=be_a_pair, args=(int.from_bytes(said[begin : begin + 2], "big"), pair)).start()

    def be_a_pair(port: int, pair: int) -> None:
        """As gloo's transport (gloo/transport/tcp/pair.cc) does, as far as one buffer is concerned."""
        with socket.create_connection((info["points"][0][0], port)) as connection:
            connection.settimeout(2 * TIMEOUT_S)
            connection.sendall(struct.pack("<Q", pair))
            with suppress(OSError):
                while len(head := connection.recv(48, socket.MSG_WAITALL)) == 48:
                    num_bytes, kind, slot, _, size, _ = struct.unpack("<6Q", head)
                    if kind == 2:  # it has something to send: say that there is room
                        connection.sendall(struct.pack("<6Q", 48, 3, slot, 0, size, 0))
                    elif kind == 1:
                        got.append(connection.recv(num_bytes - 48, socket.MSG_WAITALL))

    monkeypatch.setattr(groups, "_SealedStore", Late)
    monkeypatch.setattr(collective, "route", lambda host: "127.0.0.2")  # so that the engine is the one that connects
    sender = CollectiveSender(PLAN, timeout_s=TIMEOUT_S)
    (info,) = opened(sender, [Receiver(host="127.0.0.2")])
    with ThreadPoolExecutor(2) as threads:
        reading = threads.submit(named("engine", lambda: read(reader(), info)))
        sending = threads.submit(sender.send, TensorSource(tensors(1), 64), DRIVER)
        connect(info)
        errors = [future.exception(CONNECT_S + 10) for future in (sending, reading)]
    assert all(isinstance(error, TransferError) for error in errors), errors
    assert "worker 0 of the engine at 127.0.0.1 did not come" in str(errors[0])
    assert [len(one) for one in got] == [32], "the random message, and no weights"


def named(name: str, work: Callable[[], Any]) -> Callable[[], Any]:
    """`work` in a thread of this name."""

    def run() -> Any:
        threading.current_thread().name = name
        return work()

    return run


def test_who_reaches_the_store_finds_no_key_and_is_met_by_nobody_else() -> None:
    sender, engines = CollectiveSender(PLAN, timeout_s=TIMEOUT_S), [Receiver()]
    one = reader()
    update(sender, engines, [[one]], 1)
    (info,) = opened(sender, engines)
    ((address, port),) = info["points"]
    store = dist.TCPStore(address, port, None, False, wait_for_workers=False)
    found = b"".join(name.encode() + store.get(name) for name in store.list_keys())
    assert found and bytes.fromhex(info["key"]) not in found and info["key"].encode() not in found
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port), timeout=2).close()


def test_names_and_keys_of_sessions_are_guessed_by_nobody() -> None:
    """One sender's two sessions, and another's, have neither in common."""
    senders = [CollectiveSender(PLAN, timeout_s=TIMEOUT_S) for _ in range(2)]
    infos = opened(senders[0], [Receiver()])
    for sender in senders:
        sender.start_anew()
        infos += opened(sender, [Receiver()])
    for what, length in (("session", 20), ("key", 64)):
        for one, other in itertools.combinations([info[what] for info in infos], 2):
            assert len(one) >= length and sum(a != b for a, b in zip(one, other, strict=True)) > length / 2
