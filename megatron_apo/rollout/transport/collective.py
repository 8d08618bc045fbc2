"""`collective`: each pipeline stage broadcasts its own buckets to every worker of every engine, on any host.

    rank 0 (the driver)     which engines, under which name and key -> all ranks
    each stage's owner      opens a meeting point, gathers its stage's buckets, broadcasts them in a group of its own
    each worker             is told by HTTP where the owners are met, joins a group for each, and loads in plan order

An owner is the first rank of its stage (`Gather.buckets("owners")`): what passes through rank 0 is its own stage alone.
Workers get full tensors: vLLM's loaders cut out what they need. Groups stay until the engines are others, or one of
them breaks; a new one has a new store, name and key. The key travels by HTTP, under each engine's token.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_apo.rollout.transport.base import Ranks, Receiver, Source, TransferError, Update, bucket_digests
from megatron_apo.rollout.transport.groups import Group, MeetingPoint, find
from megatron_apo.runtime.hosts import route
from megatron_apo.weights.plan import Bucket, Plan

NUM_BUFFERS = 2  # one on its way, one that is put together, or loaded
PATIENCE = 2 / 3  # of sync.timeout_s, for one step of a transfer; the rest is for telling who is silent


@dataclass(frozen=True)
class _Session:
    """What holds from the making of the groups to their end. members: workers of each engine, and its name."""

    name: str
    key: bytes
    hosts: tuple[str, ...]
    members: tuple[int, ...]

    @property
    def size(self) -> int:
        return 1 + sum(self.members)

    def engine_of(self, member: int) -> int:
        """The engine of a member of a group, which is not the sender."""
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
        worker = member - 1 - sum(self.members[:engine])
        return f"worker {worker} of the engine at {self.hosts[engine]}"


@dataclass(frozen=True)
class _Outcome:
    """What came of a rank's part. broken: why it did not send all of it; blamed: engines, by their places."""

    digests: dict[str, str]
    broken: str | None = None
    blamed: tuple[int, ...] = ()
    failure: str | None = None  # of gathering


class CollectiveSender:
    """The trainer's side. See `Sender`."""

    def __init__(self, plan: Plan, ranks: Ranks | None = None, timeout_s: float = 120.0):
        self._ranks = ranks or Ranks()
        self._timeout_s = timeout_s
        self._plan = plan
        self._largest_bytes = plan.largest_bucket_bytes
        self._buffers: list[Tensor] = []
        self._session: _Session | None = None
        self._point: MeetingPoint | None = None
        self._group: Group | None = None
        # The driver's:
        self._receivers: tuple[tuple[Receiver, int], ...] = ()  # with how often each was started
        self._next_session: _Session | None = None
        self._points: list[tuple[str, int]] = []  # by stage

    def open(self, receivers: Sequence[Receiver]) -> None:
        chosen = tuple((receiver, receiver.num_starts) for receiver in receivers)
        if chosen == self._receivers and self._session is not None:
            return
        self._receivers = chosen
        self._next_session = _Session(
            name=secrets.token_urlsafe(16),
            key=secrets.token_bytes(32),
            hosts=tuple(receiver.host for receiver in receivers),
            members=tuple(receiver.num_workers for receiver in receivers),
        )

    def meet(self) -> None:
        session = self._ranks.broadcast(self._next_session)
        self._next_session = None
        if session is None:
            return
        self._end_group()
        self._session, point, problem = session, None, ""
        stage = self._ranks.owned_stage
        if stage is not None:
            try:
                self._point = MeetingPoint(_own_address(session.hosts))
                point = (stage, (self._point.address, self._point.port))
            except (OSError, RuntimeError) as error:
                problem = f"no port can be opened for the engines: {error}"
        told = self._ranks.gather((point, problem))
        if problems := [text for _, text in told if text]:
            raise ValueError(problems[0])
        self._points = [address for _, address in sorted(point for point, _ in told if point)]

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
            "timeout_s": PATIENCE * self._timeout_s,
        }

    def send(self, source: Source, update: Update | None) -> dict[str, str]:
        try:
            outcome = _Outcome(self._send(source, update))
        except TransferError as error:
            assert self._session is not None
            blamed = {self._session.engine_of(member) for member in error.silent if member}
            outcome = _Outcome({}, str(error), tuple(blamed))
        except (ValueError, RuntimeError, OSError) as error:
            outcome = _Outcome({}, failure=f"rank {self._ranks.rank}: {error}")
        outcomes: list[_Outcome] = self._ranks.gather(outcome)
        if any(one.broken or one.failure for one in outcomes):
            self._end_group()
            self._session = None
        for one in outcomes:
            if one.failure:
                raise RuntimeError(one.failure)
        broken = [one for one in outcomes if one.broken]
        if broken:
            blamed = {engine for one in broken for engine in one.blamed}
            first = next((one for one in broken if one.blamed), broken[0])
            raise TransferError(str(first.broken), sorted(blamed))
        found = {name: value for one in outcomes for name, value in one.digests.items()}
        return {meta.name: found[meta.name] for meta in self._plan.tensors} if update else {}

    def drop(self, receiver: Receiver) -> None:
        pass

    def start_anew(self) -> None:
        self._receivers = ()

    def give_up(self) -> None:
        """A group that is left in the middle of a transfer has ended with it."""

    def close(self) -> None:
        pass

    # --- an owner's

    def _send(self, source: Source, update: Update | None) -> dict[str, str]:
        """This rank's part. Digests of what it has sent."""
        digests: dict[str, str] = {}
        is_owner = self._ranks.owned_stage is not None
        phase = update.watch.phase if update else lambda name: nullcontext()
        with closing(source.buckets("owners", self._buffer if is_owner else None)) as buckets, phase("gather"):
            for bucket, buffer in buckets:
                if self._group is None:  # only now, so that who sends to this rank hears of a failure
                    with phase("meet"):
                        self._group = self._make_group()
                self._group.post(buffer[: bucket.num_bytes])
                with phase("digest"):
                    digests |= bucket_digests(bucket, buffer, self._ranks.digest_kind)
            with phase("wait"):
                while self._group and self._group.num_posted:
                    self._group.wait()
        return digests

    def _buffer(self, bucket: Bucket) -> Tensor:
        """Where a bucket is put together, once what was there is sent. They are used in turns."""
        if self._group:
            while self._group.num_posted >= NUM_BUFFERS:
                self._group.wait()
        if len(self._buffers) < NUM_BUFFERS:
            self._buffers.append(torch.empty(self._largest_bytes, dtype=torch.uint8, device=self._ranks.device))
            return self._buffers[-1]
        self._buffers.append(self._buffers.pop(0))
        return self._buffers[-1]

    def _make_group(self) -> Group:
        session, point = self._session, self._point
        assert session is not None and point is not None
        return Group(
            point.store,
            name=f"{session.name}/{self._ranks.owned_stage}",
            key=session.key,
            rank=0,
            size=session.size,
            device=self._ranks.device,
            address=point.address,
            timeout_s=PATIENCE * self._timeout_s,
            names=session.name_of,
        )

    def _end_group(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = self._point = None


class CollectiveReader:
    """A worker's side. See `Reader`. rank: the worker's within its engine; device: where it has the weights."""

    def __init__(self, buckets: Sequence[Bucket], rank: int, device: torch.device):
        self._buckets = buckets
        self._rank = rank
        self._device = device
        self._session = ""
        self._groups: list[Group] = []  # by stage
        largest = max((bucket.num_bytes for bucket in buckets), default=0)
        self._memory = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(NUM_BUFFERS)]

    def buckets(self, where: dict[str, Any]) -> Generator[tuple[Bucket, Tensor], None, None]:
        if self._session != where["session"]:
            self._join(where)
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
        for stage, (address, port) in enumerate(where["points"]):
            self._groups.append(
                Group(
                    find(address, port, where["timeout_s"]),
                    name=f"{where['session']}/{stage}",
                    key=bytes.fromhex(where["key"]),
                    rank=where["first"] + self._rank,
                    size=where["size"],
                    device=self._device,
                    address=route(address),
                    timeout_s=where["timeout_s"],
                )
            )
        self._session = where["session"]

    def _post(self, index: int) -> None:
        bucket = self._buckets[index]
        self._groups[bucket.pp_rank].post(self._memory[index % NUM_BUFFERS][: bucket.num_bytes])


def _own_address(hosts: Sequence[str]) -> str:
    """Of this host, by which all of `hosts` reach it: loopback only where they all are this host."""
    routes = [found for host in hosts if (found := route(host))]
    return next((found for found in routes if not ipaddress.ip_address(found).is_loopback), "127.0.0.1")
