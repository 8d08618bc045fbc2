"""One rank that gathers weights to every destination. Each rank leaves what it received.

    main(WORK, LAYOUT, VARIANT)

WORK/models has the model. Rank R writes WORK/LAYOUT.R.json: {case: {"buckets": indices in the order they were received,
"wrong": tensors that are not the checkpoint's, bit by bit}}, of a case that is broken off what was received until then,
and the error.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_apo.model.build import build_model
from megatron_apo.model.hf_config import ModelConfigError, read_hf_config
from megatron_apo.parallel.groups import distributed
from megatron_apo.runtime.topology import Topology
from megatron_apo.weights.gather import Gather
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.parameters import load_weights
from megatron_apo.weights.plan import Bucket, Plan
from tests.dist.ranks import parallel_of

DESTINATIONS = ("driver", "owners", "all", "driver shared", "owners shared")
SHARED = [to for to in DESTINATIONS if to.endswith("shared")]
# What breaks a gathering off at its second bucket.
FAULTS = {
    "ends": "the caller on rank 0 has had enough",
    "raises": "the caller on rank 0 fails",
    "no memory": "rank 0 has no memory for it",
    "last has none": "the last rank has no memory for it",
}
BUCKET_BYTES = 12_000  # of a layer several
NUM_SLOTS = 2
LIMIT_S = 20.0


class Watched(Gather):
    """Remembers how much memory for parts is in use at most, bytes."""

    most_bytes = 0

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._in_use: list[weakref.ref[Tensor]] = []

    def _flat(self, part) -> Tensor:
        flat = super()._flat(part)
        self._in_use = [one for one in self._in_use if one() is not None] + [weakref.ref(flat)]
        self.most_bytes = max(self.most_bytes, sum(one().nbytes for one in self._in_use))  # type: ignore[union-attr]
        return flat


class Slots:
    """A file for each receiver, with room for some of its buckets, that all ranks map who give to them. They tell who
    has asked for which bucket."""

    def __init__(self, folder: Path, topology: Topology, plan: Plan, to: str):
        self.folder, self.topology, self.slot_bytes = folder, topology, plan.largest_bucket_bytes
        self.received = [one.index for one in plan.buckets if to == "driver" or one.pp_rank == topology.pp_rank]
        size, path = NUM_SLOTS * self.slot_bytes, folder / ("slots" if to == "driver" else f"slots{topology.pp_rank}")
        if topology.is_driver:  # torch would make it too, with a byte that it writes late
            folder.mkdir()
            for name in ("slots", *(f"slots{stage}" for stage in range(topology.pp))):
                with (folder / name).open("wb") as file:
                    file.truncate(size)
        dist.barrier()
        self.memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)

    def buffer_of(self, bucket: Bucket) -> Tensor:
        (self.folder / f"{bucket.index}.{self.topology.rank}").touch()
        start = self.received.index(bucket.index) % NUM_SLOTS * self.slot_bytes
        return self.memory[start : start + bucket.num_bytes]

    def have_asked(self, index: int) -> set[int]:
        """Ranks that have begun to write a bucket."""
        return {int(path.suffix[1:]) for path in self.folder.glob(f"{index}.*")}


class Enough(Exception):
    """What a caller fails with."""


class Case:
    """One gathering, which may be broken off."""

    def __init__(self, gather: Gather, topology: Topology, expected: dict[str, Tensor], folder: Path):
        self.gather, self.topology, self.expected, self.folder = gather, topology, expected, folder
        self.num_cases = 0

    def run(self, to: str, *, fault: str | None = None, ahead: bool = False) -> dict:
        self.num_cases += 1
        buffer_of: Callable[[Bucket], Tensor] | None = None
        slots = None
        to, _, shared = to.partition(" ")
        if shared:
            slots = Slots(self.folder / f"case{self.num_cases}", self.topology, self.gather.plan, to)
            buffer_of = slots.buffer_of
        faulty = {"no memory": 0, "last has none": self.topology.world_size - 1}.get(fault or "")
        if faulty == self.topology.rank:
            buffer_of = self.without_memory(buffer_of)
        has_room = (lambda bucket: True) if ahead else None
        found: dict = {"buckets": [], "wrong": [], "error": None}
        kept = []  # callers keep views of what is not theirs alone to write: each bucket has memory of its own
        try:
            with closing(self.gather.buckets(to, buffer_of, has_room, shared=bool(shared))) as buckets:
                for bucket, buffer in buckets:
                    found["buckets"].append(bucket.index)
                    if slots is None:
                        kept.append((bucket, buffer))
                    else:
                        found["wrong"] += self.wrong(bucket, buffer)
                        if fault is None:
                            self.see_who_writes(slots, bucket, ahead)
                    if fault in ("ends", "raises") and self.topology.is_driver and len(found["buckets"]) == 2:
                        if fault == "raises":
                            raise Enough("enough")
                        break
        except (RuntimeError, Enough) as error:
            found["error"] = f"{type(error).__name__}: {error}"
        for bucket, buffer in kept:
            found["wrong"] += self.wrong(bucket, buffer)
        return found

    def without_memory(self, buffer_of: Callable[[Bucket], Tensor] | None) -> Callable[[Bucket], Tensor]:
        asked = []

        def fail(bucket: Bucket) -> Tensor:
            asked.append(bucket)
            if len(asked) == 2:
                raise RuntimeError("no memory")
            return buffer_of(bucket) if buffer_of else torch.empty(bucket.num_bytes, dtype=torch.uint8)

        return fail

    def wrong(self, bucket: Bucket, buffer: Tensor) -> list[str]:
        """Tensors that are not the checkpoint's."""
        return [
            meta.name
            for meta, tensor in zip(bucket.tensors, bucket.views(buffer), strict=True)
            if not torch.equal(tensor, self.expected[meta.name])
        ]

    def see_who_writes(self, slots: Slots, present: Bucket, ahead: bool) -> None:
        """While the caller works on a bucket, the next is written by all who have a part of it, or by none."""
        index = next((index for index in slots.received if index > present.index), None)
        if index is None:
            return
        expected = {part.rank for part in self.gather._parts_of(self.gather.plan.buckets[index])} if ahead else set()
        own = {self.topology.rank}
        end = time.monotonic() + (LIMIT_S if ahead else 0.02)
        while slots.have_asked(index) - own != expected - own and time.monotonic() < end:
            time.sleep(0.001)
        asked = slots.have_asked(index) - own
        assert asked == expected - own, f"bucket {index} is written by {asked}, not by {expected}"


def load_diverged(chunks, spec, topology, reader: HFReader) -> str:
    """What a rank says of weights of which the first stage's last tensor rank alone holds one that is NaN."""

    class Diverged:
        def __contains__(self, name: str) -> bool:
            return name in reader

        def get(self, name: str) -> Tensor:
            tensor = reader.get(name).clone()
            if name == "model.layers.0.self_attn.o_proj.weight":
                tensor[0, -1] = torch.nan
            return tensor

    try:
        load_weights(chunks, spec, topology, Diverged())
    except ModelConfigError as error:
        return str(error)
    return "loaded"


def main(work: str, layout: str, variant: str) -> None:
    folder, parallel = Path(work), parallel_of(layout)
    path = folder / "models" / variant
    spec, reader = read_hf_config(path), HFReader(path)
    expected = {name: reader.get(name) for name in reader.names()}
    with distributed(parallel) as topology:
        chunks = build_model(spec, parallel, topology)
        refused = load_diverged(chunks, spec, topology, reader)
        load_weights(chunks, spec, topology, reader)
        gather = Watched(chunks, spec, topology, bucket_bytes=BUCKET_BYTES)
        case = Case(gather, topology, expected, folder)
        found = {}
        for to in DESTINATIONS:
            found[to] = case.run(to)
            for fault in FAULTS:
                found[f"{to}, {fault}"] = case.run(to, fault=fault)
                found[f"{to}, after {fault}"] = case.run(to)
        for to in SHARED:
            found[f"{to}, ahead"] = case.run(to, ahead=True)
            for fault in FAULTS:
                found[f"{to}, ahead, {fault}"] = case.run(to, fault=fault, ahead=True)
                found[f"{to}, after ahead, {fault}"] = case.run(to, ahead=True)
        for tensor in (parameter for chunk in chunks for parameter in chunk.parameters()):
            tensor.data.add_(1)  # and what is gathered is what the weights are now
        found["moved"] = case.run("driver")
        ranks = [topology.owner_ranks(bucket.pp_rank)[0] for bucket in gather.plan.buckets]
        found["plan"] = {
            "owners": ranks,
            "names": [meta.name for meta in gather.plan.tensors],
            "refused": refused,
            "writes": sum(gather._own_part(bucket) is not None for bucket in gather.plan.buckets),
            "most": gather.most_bytes / gather.plan.largest_bucket_bytes,
        }
        (folder / f"{layout}.{topology.rank}.json").write_text(json.dumps(found))
