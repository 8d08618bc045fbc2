"""Puts the ranks' shards together to full Hugging Face tensors, a bucket at a time, where they are needed.

    gather = Gather(chunks, spec, topology)
    for bucket, buffer in gather.buckets("driver"):     on every rank; yields where buckets are received
        bucket.views(buffer)                            the bucket's full tensors

A stage's weights are held by the tensor ranks of its first data-parallel replica, and its experts by those of the
replicas that hold the others (`Topology.owner_ranks`). Each of these gives its pieces (`Rule.pieces`): it copies them
one after the other into a flat tensor of the plan's dtype, which it sends, and the receiver copies each to its place.

Who receives is ahead of the caller by one bucket: while the caller works on one, the next is under way. A rank sends
when the receiver says that it receives, and waits for that on the host, so that the caller may take longer over a
bucket than a collective may wait. What is under way when the caller ends early, or fails, is received to its end, and
whoever would still send is told that nobody receives. So the ranks can gather again at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_apo.model.hf_config import ModelSpec
from megatron_apo.model.precision import plain
from megatron_apo.runtime.topology import Topology
from megatron_apo.weights.parameters import stage_parameters
from megatron_apo.weights.plan import BUCKET_BYTES, Bucket, Plan

Destination = Literal["driver", "owners", "all"]
BufferOf = Callable[[Bucket], Tensor]  # flat, uint8, of at least the bucket's bytes
HasRoom = Callable[[Bucket], bool]

# What a receiver says to a rank that holds a part of a bucket: that it receives it, or that it will receive no more.
_NEXT, _NO_MORE = 1, 0
# What a rank answers that writes its part itself.
_WRITTEN, _FAILED = 1, 0


class GatherError(RuntimeError):
    """Another rank could not give its part of the weights."""


class Gather:
    """The model's Hugging Face tensors in buckets. `plan` is the same on every rank.

    chunks: the rank's model chunks, as `build_model` made them. dtype: what the tensors are sent in; none: what the
    first parameter is in. tensor_of: which tensor of a parameter to send, asked anew for each bucket; the default is
    its value (tests send gradients).
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        spec: ModelSpec,
        topology: Topology,
        *,
        dtype: torch.dtype | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        tensor_of: Callable[[torch.nn.Parameter], Tensor] = plain,
    ):
        self._spec = spec
        self._topology = topology
        self._tensor_of = tensor_of
        self._own = stage_parameters(chunks, spec, topology)
        self.dtype = dtype or tensor_of(next(iter(self._own.values()))).dtype
        self.plan = Plan.of(spec, self.dtype, bucket_bytes, pp=topology.pp, ep=topology.ep, vpp=topology.vpp)
        self._parts: dict[int, list[_Part]] = {}

    def buckets(
        self,
        to: Destination,
        buffer_of: BufferOf | None = None,
        has_room: HasRoom | None = None,
        shared: bool = False,
    ) -> Generator[tuple[Bucket, Tensor], None, None]:
        """Gather every bucket once, in the plan's order. Collective: every rank iterates, and gets (bucket, flat uint8
        buffer) for each bucket that it receives. Close it, or drop it, before the next one begins.

        to:
          "driver"  global rank 0 receives every bucket.
          "owners"  tensor rank 0 of each stage's first replica receives the stage's buckets, whatever other stages do.
          "all"     every rank receives every bucket. It ends on all ranks, one bucket later at most, where it ends
                    early on any.

        buffer_of: where a receiver puts a bucket together; none: in new memory each time, since callers keep views. It
        may wait until there is room.
        shared: `buffer_of` is memory that the receiver ("driver" or "owners") shares with all ranks that hold a part of
        the bucket. Each writes its own there; the receiver asks `buffer_of` first, and then the others do. has_room: on
        the receiver, whether `buffer_of` would not wait for this bucket, which is then written while the caller works
        on the one before it; none: it would.

        A rank other than the receiver that fails ends the job, except with shared memory or "all": there `GatherError`,
        or an early end, is what the others see.
        """
        assert to in get_args(Destination), to
        if to == "all":
            yield from self._exchange(buffer_of)
            return
        stage = self._topology.pp_rank
        leader = self._topology.owner_ranks(stage)[0] if to == "owners" else 0
        buckets = [bucket for bucket in self.plan.buckets if to != "owners" or bucket.pp_rank == stage]
        leads = self._topology.rank == leader
        if shared:
            assert buffer_of is not None, "the memory that is shared"
            if leads:
                begin = partial(self._begin_writing, buffer_of=buffer_of)
                yield from self._lead(buckets, begin, self._written, has_room or (lambda bucket: False))
            else:
                self._write(buckets, leader, buffer_of)
        elif leads:
            complete = partial(self._put_together, buffer_of=buffer_of)
            yield from self._lead(buckets, self._begin_receiving, complete, lambda bucket: True)
        else:
            self._send(buckets, leader)

    @torch.no_grad()
    def place(self, bucket: Bucket, buffer: Tensor) -> None:
        """Copy what this rank gives to a bucket to its place in the bucket's `buffer`, each piece once."""
        part = self._own_part(bucket)
        if part is not None:
            _copy(self._shards(part), bucket.views(buffer))

    def _lead(
        self,
        buckets: Sequence[Bucket],
        begin: Callable[[Bucket], _Begun],
        complete: Callable[[_Begun], Tensor],
        may_be_ahead: HasRoom,
    ) -> Iterator[tuple[Bucket, Tensor]]:
        """The receiver's side. `begin` tells the others and waits for none of them, `complete` gives the buffer."""
        begun: deque[_Begun] = deque()
        num_begun = 0

        def go_ahead(index: int) -> None:
            """Begin bucket `index`, if there is one and it is not begun, without waiting for room."""
            nonlocal num_begun
            if num_begun == index < len(buckets) and may_be_ahead(buckets[index]):
                begun.append(begin(buckets[index]))
                num_begun += 1

        try:
            for index, bucket in enumerate(buckets):
                if num_begun == index:
                    begun.append(begin(bucket))
                    num_begun += 1
                go_ahead(index + 1)
                buffer = complete(begun[0])
                begun.popleft()
                go_ahead(index + 1)  # there may be room by now
                yield bucket, buffer
                del buffer  # it is the caller's
        finally:
            for one in begun:
                one.wait()
            self._say_no_more(buckets[num_begun:])

    def _say_no_more(self, buckets: Sequence[Bucket]) -> None:
        """Tell every other rank that has a part of one of these buckets that nobody receives them."""
        ranks = {part.rank for bucket in buckets for part in self._parts_of(bucket)}
        for rank in sorted(ranks - {self._topology.rank}):
            dist.send(_word(_NO_MORE), dst=rank, group=self._topology.host_group)

    def _send(self, buckets: Sequence[Bucket], leader: int) -> None:
        """A sender's side of "driver" and "owners"."""
        sending: deque[_Begun] = deque()
        for bucket in buckets:
            part = self._own_part(bucket)
            if part is None:
                continue
            if not self._is_next(leader):
                break
            if len(sending) > 1:  # a bucket being received and one ahead of it
                sending.popleft().wait()
            flat = self._pack(part)
            sending.append(_Begun(bucket, [(part, flat)], works=[dist.isend(_bytes(flat), dst=leader)]))
        for one in sending:
            one.wait()

    def _write(self, buckets: Sequence[Bucket], leader: int, buffer_of: BufferOf) -> None:
        """A rank's side of shared memory. After an error it answers to the end, so that nobody is left waiting."""
        failure: Exception | None = None
        for bucket in buckets:
            if self._own_part(bucket) is None:
                continue
            if not self._is_next(leader):
                break
            try:
                if failure is None:
                    self.place(bucket, buffer_of(bucket))
            except Exception as error:  # raised below, when nobody waits any more
                failure = error
            dist.send(_word(_WRITTEN if failure is None else _FAILED), dst=leader, group=self._topology.host_group)
        if failure is not None:
            raise failure

    def _is_next(self, leader: int) -> bool:
        """Wait until the receiver says whether it receives the next bucket that this rank has a part of."""
        word = _word(_NO_MORE)
        dist.recv(word, src=leader, group=self._topology.host_group)
        return word.item() == _NEXT

    def _exchange(self, buffer_of: BufferOf | None) -> Iterator[tuple[Bucket, Tensor]]:
        """Every rank's side of "all": whoever holds a part broadcasts it, once all ranks have agreed to go on."""
        buckets = self.plan.buckets
        begun: deque[_Begun] = deque()
        num_agreed, all_go_on = 0, True
        try:
            for index, bucket in enumerate(buckets):
                while all_go_on and num_agreed < min(index + 2, len(buckets)):
                    begun.append(self._prepared(buckets[num_agreed]))
                    all_go_on = self._agree(True)
                    if all_go_on:
                        num_agreed += 1
                        self._broadcast(begun[-1])
                    else:
                        begun.pop()
                if not begun:
                    break
                buffer = self._put_together(begun[0], buffer_of)
                begun.popleft()
                yield bucket, buffer
                del buffer  # it is the caller's
        finally:
            for one in begun:
                one.wait()
            if all_go_on and num_agreed < len(buckets):
                self._agree(False)

    def _prepared(self, bucket: Bucket) -> _Begun:
        """Memory for all parts of a bucket, with this rank's own in it."""
        own = self._topology.rank
        flats = [(part, self._pack(part) if part.rank == own else self._flat(part)) for part in self._parts_of(bucket)]
        return _Begun(bucket, flats)

    def _broadcast(self, begun: _Begun) -> None:
        for part, flat in begun.flats:
            begun.works.append(dist.broadcast(_bytes(flat), src=part.rank, async_op=True))

    def _agree(self, go_on: bool) -> bool:
        """Whether all ranks go on to the next bucket. Each may keep the others waiting."""
        word = _word(int(go_on))
        dist.all_reduce(word, op=dist.ReduceOp.MIN, group=self._topology.host_group)
        return bool(word.item())

    def _begin_receiving(self, bucket: Bucket) -> _Begun:
        """Tell every other rank that has a part of the bucket to send it."""
        parts = [part for part in self._parts_of(bucket) if part.rank != self._topology.rank]
        begun = _Begun(bucket, [(part, self._flat(part)) for part in parts])
        for part, flat in begun.flats:
            begun.works.append(dist.isend(begun.word, dst=part.rank, group=self._topology.host_group))
            begun.works.append(dist.irecv(_bytes(flat), src=part.rank))
        return begun

    def _begin_writing(self, bucket: Bucket, buffer_of: BufferOf) -> _Begun:
        """Tell every other rank that has a part of the bucket to write it where `buffer_of` says."""
        ranks = [part.rank for part in self._parts_of(bucket) if part.rank != self._topology.rank]
        begun = _Begun(bucket, answers={rank: _word(_FAILED) for rank in ranks}, buffer=buffer_of(bucket))
        for rank, answer in begun.answers.items():
            begun.works.append(dist.isend(begun.word, dst=rank, group=self._topology.host_group))
            begun.works.append(dist.irecv(answer, src=rank, group=self._topology.host_group))
        return begun

    def _written(self, begun: _Begun) -> Tensor:
        """The buffer that all have written to."""
        assert begun.buffer is not None
        self.place(begun.bucket, begun.buffer)
        begun.wait()
        failed = [str(rank) for rank, answer in begun.answers.items() if answer.item() == _FAILED]
        if failed:
            raise GatherError(f"rank {', '.join(failed)} could not write its part of the weights; see what it said")
        return begun.buffer

    @torch.no_grad()
    def _put_together(self, begun: _Begun, buffer_of: BufferOf | None) -> Tensor:
        """The bucket's buffer, of its parts as they are received and of this rank's own pieces."""
        bucket = begun.bucket
        if buffer_of is not None:
            buffer = buffer_of(bucket)
        else:
            buffer = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=self._topology.device)
        views = bucket.views(buffer)
        own = self._own_part(bucket)
        if own is not None and all(part is not own for part, _ in begun.flats):
            _copy(self._shards(own), views)  # while the others' are under way
        begun.wait()
        for part, flat in begun.flats:
            _copy(((placed, flat[placed.packed].view(placed.shape)) for placed in part.placed), views)
        return buffer

    def _flat(self, part: _Part) -> Tensor:
        """Memory for a part as it is sent."""
        return torch.empty(part.num_elements, dtype=self.dtype, device=self._topology.device)

    @torch.no_grad()
    def _pack(self, part: _Part) -> Tensor:
        """This rank's part of a bucket as it is sent: its pieces one after the other."""
        flat = self._flat(part)
        for placed, shard in self._shards(part):
            flat[placed.packed].view(placed.shape).copy_(shard)
        return flat

    def _shards(self, part: _Part) -> Iterator[tuple[_Placed, Tensor]]:
        """The pieces of this rank's part, as its parameters hold them now. Views of them are not kept: a parameter may
        be given other memory, and an FP8 one is another tensor each time."""
        for parameter, pieces in part.own:
            value = self._tensor_of(parameter)
            for placed in pieces:
                yield placed, value[placed.shard]

    def _own_part(self, bucket: Bucket) -> _Part | None:
        return next((part for part in self._parts_of(bucket) if part.rank == self._topology.rank), None)

    def _parts_of(self, bucket: Bucket) -> list[_Part]:
        """Of each rank that gives something to the bucket; made once."""
        if bucket.index not in self._parts:
            parts = []
            for ep_rank in range(self._topology.ep):
                for tp_rank, rank in enumerate(self._topology.owner_ranks(bucket.pp_rank, ep_rank)):
                    part = self._part(bucket, rank, ep_rank, tp_rank)
                    if part.placed:
                        parts.append(part)
            self._parts[bucket.index] = parts
        return self._parts[bucket.index]

    def _part(self, bucket: Bucket, rank: int, ep_rank: int, tp_rank: int) -> _Part:
        """What a rank gives to a bucket: its experts, and of the first expert rank what all of them hold."""
        part = _Part(rank)
        first = 0  # of the entry's tensors in the bucket
        for entry in bucket.entries:
            if (entry.ep_rank or 0) == ep_rank:
                begin = len(part.placed)
                for piece in entry.rule.pieces(self._spec, self._topology.tp, tp_rank):
                    shape = bucket.tensors[first + piece.hf].shape
                    shape = (*(one.stop - one.start for one in piece.full), *shape[len(piece.full) :])
                    end = part.num_elements + prod(shape)
                    packed = slice(part.num_elements, end)
                    part.placed.append(_Placed(first + piece.hf, piece.full, piece.shard, packed, shape))
                    part.num_elements = end
                if rank == self._topology.rank and len(part.placed) > begin:
                    part.own.append((self._own[entry], part.placed[begin:]))
            first += len(entry.hf)
        return part


class _Placed(NamedTuple):
    """A piece and its place."""

    tensor: int  # which of the bucket's
    full: tuple[slice, ...]  # where in that tensor
    shard: tuple[slice, ...]  # where in the parameter
    packed: slice  # where in what is sent, elements
    shape: tuple[int, ...]


@dataclass
class _Part:
    """What one rank gives to a bucket."""

    rank: int
    placed: list[_Placed] = field(default_factory=list)
    own: list[tuple[torch.nn.Parameter, list[_Placed]]] = field(default_factory=list)  # the same, if it is this rank
    num_elements: int = 0


@dataclass
class _Begun:
    """A bucket that is under way, and what the works use until then."""

    bucket: Bucket
    flats: list[tuple[_Part, Tensor]] = field(default_factory=list)
    answers: dict[int, Tensor] = field(default_factory=dict)  # by rank
    buffer: Tensor | None = None
    works: list[dist.Work] = field(default_factory=list)
    word: Tensor = field(default_factory=lambda: _word(_NEXT))

    def wait(self) -> None:
        """For each work once: gloo would wait for another message."""
        while self.works:
            self.works.pop(0).wait()


def _copy(pieces: Iterable[tuple[_Placed, Tensor]], views: Sequence[Tensor]) -> None:
    for placed, value in pieces:
        views[placed.tensor][placed.full].copy_(value)


def _word(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.uint8)


def _bytes(flat: Tensor) -> Tensor:
    return flat.view(torch.uint8)
