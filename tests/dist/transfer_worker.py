"""One rank that sends weights by a transport; the readers of two engines, three workers, are threads of rank 0.

    main(WORK, LAYOUT, VARIANT, TRANSPORT)

WORK/models has the model. Rank R writes WORK/transfer.R.json: {case: {"error": what `send` raised, or null, "sent":
indices of the buckets that this rank put together, "seconds": ...}}; rank 0 also {"right": whether every reader read
every tensor of the checkpoint, bit by bit, and the digests are those, "read": number of tensors that each reader read}.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_apo.model.build import build_model
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.parallel.groups import distributed
from megatron_apo.rollout.transport.base import Ranks, TransferError, heard, told
from megatron_apo.rollout.transport.collective import CollectiveReader, CollectiveSender
from megatron_apo.rollout.transport.ipc import IpcReader, IpcSender
from megatron_apo.runtime.topology import Topology
from megatron_apo.telemetry.timers import Stopwatch
from megatron_apo.weights.digest import digest
from megatron_apo.weights.gather import Gather
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.parameters import load_weights
from megatron_apo.weights.plan import Bucket
from tests.dist.ranks import parallel_of
from tests.weights import Receiver

TRANSPORTS = {
    "collective": (CollectiveSender, CollectiveReader, "_free_slot"),
    "ipc": (IpcSender, IpcReader, "_slot"),
}
BUCKET_BYTES = 12_000  # of a layer several
TIMEOUT_S = 6.0
# What breaks a transfer off, at the second bucket of whom it concerns.
FAULTS = {
    "reader": "a worker fails",
    "silent": "a worker reads no more",
    "sender": "the owner of the last stage fails",
    "stuck": "a worker reads no more before the next stage's first bucket",
    "absent": "an engine that was started anew does not come",
    "gather": "a rank of the last stage has no memory to put a bucket together",
}


class Transfer:
    def __init__(self, gather: Gather, topology: Topology, expected: dict[str, Tensor], transport: str):
        self.gather, self.topology = gather, topology
        self.expected = {name: digest(value) for name, value in expected.items()}
        sender, reader, _ = TRANSPORTS[transport]
        self.sender = sender(gather.plan, Ranks.of(topology), TIMEOUT_S)
        self.engines = [Receiver(num_workers=2), Receiver()]
        buckets = heard(told(gather.plan))
        later = [bucket.index for bucket in buckets if bucket.pp_rank != buckets[0].pp_rank]
        self.stuck_at = later[0] - 2 if later else 1  # one bucket ahead, a worker says that it has come to the stage
        self.readers = [reader(buckets, rank, torch.device("cpu")) for rank in (0, 1, 0)]
        self.sent: list[int] = []
        self.fault: str | None = None

    @property
    def breaks(self) -> bool:
        """Whether this rank is the one whose part fails, if it is a rank's."""
        owner = self.topology.owner_ranks(self.topology.pp - 1)[0]
        return self.fault in ("sender", "gather") and self.topology.rank == owner

    def run(self, fault: str | None = None) -> dict[str, Any]:
        self.fault, self.sent = fault, []
        found: dict[str, Any] = {"error": None}
        with ThreadPoolExecutor(3) as threads:
            if fault == "absent":
                self.engines[1].num_starts += 1
            if self.topology.is_driver:
                self.sender.open(self.engines)
            self.sender.meet()
            if self.topology.is_driver:
                infos = [self.sender.update_info(engine) for engine in self.engines]
                told_of = [infos[0], infos[0], infos[1]]
                reading = [threads.submit(self.read, number, info) for number, info in enumerate(told_of)]
            start = time.monotonic()
            try:
                update: Any = SimpleNamespace(watch=Stopwatch()) if self.topology.is_driver else None
                digests = self.sender.send(self.gather, update)
            except (TransferError, RuntimeError) as error:
                found["error"] = f"{type(error).__name__}: {error}"
                found["silent"] = list(getattr(error, "silent", ()))
            found["seconds"] = time.monotonic() - start
            if self.topology.is_driver:
                read = [future.result() for future in reading]
                found["right"] = found["error"] is None and read == [self.expected] * 3 and digests == self.expected
                found["read"] = [len(one) for one in read]
        return found | {"sent": self.sent}

    def read(self, number: int, info: dict[str, Any]) -> dict[str, str]:
        found: dict[str, str] = {}
        if number == 2 and self.fault == "absent":
            return found
        reader, fails = self.readers[number], number == 2 and self.fault in ("reader", "silent", "stuck")
        last = self.stuck_at if self.fault == "stuck" else 1
        try:
            for bucket, buffer in reader.buckets(info):
                for meta, view in zip(bucket.tensors, bucket.views(buffer), strict=True):
                    found[meta.name] = digest(view)
                if fails and bucket.index == last:
                    time.sleep(0 if self.fault == "reader" else TIMEOUT_S)
                    reader.give_up(info)
                    break
        except TransferError:
            reader.give_up(info)
        return found


def main(work: str, layout: str, variant: str, transport: str) -> None:
    folder, parallel = Path(work), parallel_of(layout)
    path = folder / "models" / variant
    spec, reader = read_hf_config(path), HFReader(path)
    with distributed(parallel) as topology:
        chunks = build_model(spec, parallel, topology)
        load_weights(chunks, spec, topology, reader)
        gather = Gather(chunks, spec, topology, bucket_bytes=BUCKET_BYTES)
        transfer = Transfer(gather, topology, {name: reader.get(name) for name in reader.names()}, transport)
        note_what_is_sent(transfer, *TRANSPORTS[transport][::2])
        found = {"whole": transfer.run(), "again": transfer.run()}
        for fault in FAULTS:
            found[fault] = transfer.run(fault)
            found[f"after {fault}"] = transfer.run()
        found["plan"] = {
            "tensors": len(gather.plan.tensors),
            "shares memory": getattr(transfer.sender, "_is_shared", None),
            "owners": [topology.owner_ranks(bucket.pp_rank)[0] for bucket in gather.plan.buckets],
        }
        (folder / f"transfer.{topology.rank}.json").write_text(json.dumps(found))


def note_what_is_sent(transfer: Transfer, sender: type, method: str) -> None:
    """And put a sender's faults in, from outside."""
    buffer_of = getattr(sender, method)

    def watched(self: Any, bucket: Bucket) -> Tensor:
        if transfer.breaks and len(transfer.sent) == 1:
            raise TransferError("the network is gone") if transfer.fault == "sender" else RuntimeError("no memory")
        buffer = buffer_of(self, bucket)
        transfer.sent.append(bucket.index)
        return buffer

    setattr(sender, method, watched)
