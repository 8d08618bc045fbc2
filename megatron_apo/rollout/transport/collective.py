"""`collective`: each pipeline stage broadcasts its own buckets to every worker of every engine, on any host.

    rank 0 (the driver)     which engines, under which name and key -> all ranks
    each stage's owner      opens a meeting point, gathers its stage's buckets, broadcasts them in a group of its own,
                            to workers that have come as far as its stage
    its stage's others      give it their parts: on its host and without a GPU they write them where it sends from
    each worker             is told by HTTP where the owners are met, joins a group for each, and loads in plan order

An owner is the first rank of its stage (`Gather.buckets("owners")`): what passes through rank 0 is its own stage alone.
Workers get full tensors: vLLM's loaders cut out what they need. Groups stay until the engines are others, or one of
them breaks; a new one has a new store, name and key. The key travels by HTTP, under each engine's token.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_apo.rollout.transport.base import (
    PATIENCE,
    Ranks,
    Receiver,
    Source,
    TransferError,
    Update,
    bucket_digests,
    outcome_of,
    phases_of,
    settled,
)
from megatron_apo.rollout.transport.groups import Group, Meeting, MeetingPoint, find
from megatron_apo.rollout.transport.memory import accepted, offered, slot_size
from megatron_apo.runtime.hosts import is_loopback, own_address, route
from megatron_apo.weights.plan import Bucket, Plan

NUM_BUFFERS = 2  # one on its way, one that is put together, or loaded
FIND_S = 1.0  # to tell all owners that the transfer broke off


@dataclass(frozen=True)
class _Session:
    """What holds from the making of the groups to their end. members: workers of each engine, and its name."""

    name: str
    key: bytes = field(repr=False)
    hosts: tuple[str, ...]
    members: tuple[int, ...]

    @property
    def size(self) -> int:
        return 1 + sum(self.members)

    def engine_of(self, member: int) -> int | None:
        """The engine of a member of a group; None for the sender."""
        if member == 0:
            return None
        member -= 1
        for index, count in enumerate(self.members):
            if member < count:
                return index
            member -= count
        raise AssertionError

    def name_of(self, member: int) -> str:
        if member == 0:
            return "the trainer's rank"
        engine = self.engine_of(member)
        assert engine is not None
        worker = member - 1 - sum(self.members[:engine])
        return f"worker {worker} of the engine at {self.hosts[engine]}"


class CollectiveSender:
    """The trainer's side. See `Sender`."""

    def __init__(self, plan: Plan, ranks: Ranks | None = None, timeout_s: float = 120.0):
        self._ranks = ranks or Ranks()
        self._timeout_s = timeout_s
        self._plan = plan
        own = [bucket.index for bucket in plan.buckets if bucket.pp_rank == self._ranks.stage]
        self._places = {index: place for place, index in enumerate(own)}  # among the stage's
        firsts = {bucket.pp_rank: bucket.index for bucket in reversed(plan.buckets)}
        self._is_first = firsts.get(self._ranks.stage) == 0
        # Stages whose first bucket comes after one of this stage's, by the place of that.
        self._followed_by = {self._places[first - 1]: stage for stage, first in firsts.items() if first - 1 in own}
        self._slot_bytes = slot_size(plan)
        self._memory: Tensor | None = None  # where this stage's buckets are put together, used in turns
        self._is_shared: bool | None = None  # by all who give a part of them; none: not asked yet
        self._num_sent = 0  # of an owner's buckets in the present transfer
        self._session: _Session | None = None
        self._point: MeetingPoint | None = None
        self._group: Group | None = None
        self._points: list[tuple[str, int]] = []  # by stage
        self._others: dict[int, Meeting] = {}  # of other stages, as far as this one tells them something
        self._update = 0  # the number of the present one in this session
        # The driver's:
        self._receivers: tuple[tuple[Receiver, int], ...] = ()  # with how often each was started
        self._next_session: _Session | None = None

    def open(self, receivers: Sequence[Receiver]) -> None:
        chosen = tuple((receiver, receiver.num_starts) for receiver in receivers)
        if chosen == self._receivers and self._session is not None:
            return
        self._receivers = chosen
        self._next_session = _Session(
            name=secrets.token_urlsafe(16),
            key=secrets.token_bytes(32),
            hosts=tuple(_seen_from_elsewhere(receiver.host) for receiver in receivers),
            members=tuple(receiver.num_workers for receiver in receivers),
        )

    def meet(self) -> None:
        session = self._ranks.broadcast(self._next_session)
        self._next_session = None
        self._update += 1
        if session is None:
            return
        self._end_group()
        self._session, self._update, point, problem = session, 1, None, ""
        if self._ranks.is_owner:
            try:
                self._point = MeetingPoint(_own_address(session.hosts))
                point = (self._ranks.stage, (self._point.address, self._point.port))
            except (OSError, RuntimeError, ValueError) as error:
                problem = f"rank {self._ranks.rank}: no port can be opened for the engines: {error}"
        told = self._ranks.gather((point, problem))
        if problems := [text for _, text in told if text]:
            raise ValueError(problems[0])
        self._points = [address for _, address in sorted(point for point, _ in told if point)]
        if self._is_shared is None:
            self._share_memory()

    def update_info(self, receiver: Receiver) -> dict[str, Any]:
        session = self._session
        assert session is not None
        place = [one for one, _ in self._receivers].index(receiver)
        return {
            "session": session.name,
            "key": session.key.hex(),
            "points": self._points,
            "first": 1 + sum(session.members[:place]),
            "size": session.size,
            "update": self._update,
            "timeout_s": PATIENCE * self._timeout_s,
        }

    def send(self, source: Source, update: Update | None) -> dict[str, str]:
        session = self._session
        assert session is not None
        outcome = None
        try:
            outcome = outcome_of(self._ranks, lambda: self._send(source, update), session.engine_of)
        finally:  # also of what is raised here: readers and other owners wait
            if outcome is None or not outcome.is_sent:
                self._break_off(session)
                self._end_group()
        try:
            return settled(self._ranks, outcome, self._plan)
        except BaseException:
            self._end_group()
            self._session = None
            raise

    def drop(self, receiver: Receiver) -> None:
        pass

    def fail(self, receiver: Receiver) -> None:
        if (session := self._session) is not None:
            threading.Thread(target=self._break_off, args=(session,), daemon=True).start()

    def start_anew(self) -> None:
        self._receivers = ()

    def give_up(self) -> None:
        """A transfer that did not end has taken its group with it (`send`)."""

    def close(self) -> None:
        pass

    # --- an owner's

    def _send(self, source: Source, update: Update | None) -> dict[str, str]:
        """This rank's part. Digests of what it has sent."""
        digests: dict[str, str] = {}
        self._num_sent = 0
        phase, buffer_of = phases_of(update), self._free_slot if self._ranks.is_owner else self._slot
        given = source.buckets("owners", buffer_of, self._has_room, shared=bool(self._is_shared))
        with closing(given) as buckets, phase("gather"):
            for bucket, buffer in buckets:
                if not digests:  # only now, so that who sends to this rank hears of a failure
                    with phase("meet"):
                        self._wait_for_readers()
                assert self._group is not None
                self._group.post(buffer[: bucket.num_bytes])
                with phase("digest"):
                    digests |= bucket_digests(bucket, buffer, self._ranks.digest_kind)
            with phase("wait"):
                while self._group and self._group.num_posted:
                    self._wait_for_first()
        return digests

    def _free_slot(self, bucket: Bucket) -> Tensor:
        """Where a bucket is put together, once what was there is sent."""
        while not self._is_free(bucket):
            self._wait_for_first()
        return self._slot(bucket)

    def _has_room(self, bucket: Bucket) -> bool:
        while self._group and self._group.first_has_ended:
            self._wait_for_first()
        return self._is_free(bucket)

    def _is_free(self, bucket: Bucket) -> bool:
        """Whether what was in the bucket's slot is known to be sent."""
        return self._places[bucket.index] < self._num_sent + NUM_BUFFERS

    def _wait_for_first(self) -> None:
        assert self._group is not None
        self._group.wait()
        if (stage := self._followed_by.get(self._num_sent)) is not None:
            self._meeting_of(stage).say(f"before/{self._update}", 0)
        self._num_sent += 1

    def _slot(self, bucket: Bucket) -> Tensor:
        assert self._memory is not None
        start = self._places[bucket.index] % NUM_BUFFERS * self._slot_bytes
        return self._memory[start : start + bucket.num_bytes]

    def _share_memory(self) -> None:
        """Collective. A stage's memory is its owner's, and shared where all can who give a part of its weights."""
        ranks, num_bytes, offer, problem = self._ranks, NUM_BUFFERS * self._slot_bytes, None, ""
        on_cpu = ranks.device.type == "cpu"
        try:
            if ranks.is_owner and on_cpu:
                self._memory, offer = offered(num_bytes)
            elif ranks.is_owner:
                self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=ranks.device)
        except (OSError, RuntimeError) as error:
            problem = f"rank {ranks.rank}: no memory to send weights from (sync.bucket_mib): {error}"
        with closing(offer) if offer else nullcontext():
            told = ranks.gather((ranks.stage, offer, problem))
            if problems := [text for *_, text in told if text]:
                raise ValueError(problems[0])
            offers = {stage: one for stage, one, _ in told if one}
            if ranks.gives and not ranks.is_owner and on_cpu:
                self._memory = accepted(offers[ranks.stage])
            answers = ranks.gather((ranks.stage, on_cpu and (self._memory is not None or not ranks.gives)))
        self._is_shared = all(can for stage, can in answers if stage == ranks.stage)

    def _wait_for_readers(self) -> None:
        """Until all read this stage's buckets: a time-out counts from when a bucket is posted. They come when they have
        received what is before; whoever sends that sees who is silent until then."""
        session, point, stage = self._session, self._point, self._ranks.stage
        assert session is not None and point is not None
        patience_s = PATIENCE * self._timeout_s
        if self._group is None:
            meeting = Meeting(point.store, f"{session.name}/{stage}", session.key)
            meeting.say("here", 0)
            self._group = Group(
                meeting,
                rank=0,
                size=session.size,
                device=self._ranks.device,
                address=point.address,
                timeout_s=patience_s,
                names=session.name_of,
            )
        if not self._is_first:
            whole_s = len(self._points) * self._timeout_s
            self._group.meeting.wait_for(f"before/{self._update}", [0], whole_s, lambda _: "the stage before")
        self._group.meeting.wait_for(f"begun/{self._update}", range(1, session.size), patience_s, session.name_of)

    def _meeting_of(self, stage: int) -> Meeting:
        if stage not in self._others:
            assert self._session is not None
            self._others[stage] = self._found(self._session, stage, PATIENCE * self._timeout_s)
        return self._others[stage]

    def _found(self, session: _Session, stage: int, within_s: float) -> Meeting:
        return Meeting(find(*self._points[stage], within_s), f"{session.name}/{stage}", session.key)

    def _break_off(self, session: _Session) -> None:
        """Tell all owners and workers that wait at a meeting."""

        def tell(stage: int) -> None:
            with suppress(TransferError):
                self._found(session, stage, FIND_S).break_off()

        tellers = [threading.Thread(target=tell, args=(stage,), daemon=True) for stage in range(len(self._points))]
        for teller in tellers:
            teller.start()
        end = time.monotonic() + FIND_S
        for teller in tellers:
            teller.join(max(0.0, end - time.monotonic()))

    def _end_group(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = self._point = None
        self._others.clear()


class CollectiveReader:
    """A worker's side. See `Reader`. rank: the worker's within its engine; device: where it has the weights."""

    def __init__(self, buckets: Sequence[Bucket], rank: int, device: torch.device):
        self._buckets = buckets
        self._rank = rank
        self._device = device
        self._session = ""
        self._groups: list[Group] = []  # by stage
        self._member = 0  # of each group
        self._begun: set[int] = set()  # stages, in the present update
        self._update = 0
        largest = max((bucket.num_bytes for bucket in buckets), default=0)
        self._memory = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(NUM_BUFFERS)]

    def buckets(self, where: dict[str, Any]) -> Generator[tuple[Bucket, Tensor], None, None]:
        if self._session != where["session"]:
            self._join(where)
        self._begun.clear()
        self._update = where["update"]
        for index in range(min(NUM_BUFFERS - 1, len(self._buckets))):
            self._post(index)
        for index, bucket in enumerate(self._buckets):
            if index + NUM_BUFFERS - 1 < len(self._buckets):
                self._post(index + NUM_BUFFERS - 1)  # into what the caller is done with
            self._groups[bucket.pp_rank].wait()
            yield bucket, self._memory[index % NUM_BUFFERS][: bucket.num_bytes]

    def give_up(self, where: dict[str, Any]) -> None:
        groups, self._groups, self._session = self._groups, [], ""
        for group in groups:
            group.close()

    def _join(self, where: dict[str, Any]) -> None:
        self.give_up(where)
        self._member, key = where["first"] + self._rank, bytes.fromhex(where["key"])
        try:
            meetings = [
                Meeting(find(address, port, where["timeout_s"]), f"{where['session']}/{stage}", key)
                for stage, (address, port) in enumerate(where["points"])
            ]
        except TransferError as error:  # of which nobody else hears
            raise TransferError(str(error), silent=[self._member]) from None
        for meeting in meetings:  # at all of them before the first group: who is late there is missed there alone
            meeting.say("here", self._member)
        for meeting, (address, _) in zip(meetings, where["points"], strict=True):
            self._groups.append(
                Group(
                    meeting,
                    rank=self._member,
                    size=where["size"],
                    device=self._device,
                    address=route(address),
                    timeout_s=where["timeout_s"],
                )
            )
        self._session = where["session"]

    def _post(self, index: int) -> None:
        bucket = self._buckets[index]
        if bucket.pp_rank not in self._begun:
            self._begun.add(bucket.pp_rank)
            self._groups[bucket.pp_rank].meeting.say(f"begun/{self._update}", self._member)
        self._groups[bucket.pp_rank].post(self._memory[index % NUM_BUFFERS][: bucket.num_bytes])


def _seen_from_elsewhere(host: str) -> str:
    """An engine's host on the driver's side: in place of loopback the driver's own address, which other ranks reach."""
    found = route(host)
    return own_address(host) if found and is_loopback(found) else host


def _own_address(hosts: Sequence[str]) -> str:
    """Of this host, on the way to the first of `hosts` that is another; loopback only where they all are this one.
    Raises ValueError for a host that there is no way to."""
    for host in hosts:
        if not (found := route(host)):
            raise ValueError(f"there is no way to the engine's host {host} (rollout.advertise_host)")
        if not is_loopback(found):
            return found
    return "127.0.0.1"
