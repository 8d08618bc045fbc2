"""A Megatron model's weights as Hugging Face tensors, one after the other, on global rank 0.

    WeightStream(chunks, spec, topology)            HF tensors, in HF order
    export_hf(stream, topology, ...)                the stream written as an HF folder

The tensors come in buckets (`gather.py`): while the caller consumes one, the next is already being received.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_apo.runtime.topology import Topology
from megatron_apo.weights.gather import Gather
from megatron_apo.weights.hf_writer import write_hf_folder
from megatron_apo.weights.plan import TensorMeta


class WeightStream(Gather):
    """The model's Hugging Face tensors, one at a time.

    `metadata()` is static and the same on every rank. Iterating is collective over all ranks; global rank 0 yields
    (name, full tensor) in the order of `metadata()`, the others yield nothing. Can be iterated again.
    """

    def metadata(self) -> list[TensorMeta]:
        return list(self.plan.tensors)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        with closing(self.buckets("driver")) as buckets:
            for bucket, buffer in buckets:
                yield from zip([meta.name for meta in bucket.tensors], bucket.views(buffer), strict=True)
                del buffer  # the next is put together in other memory


def export_hf(stream: WeightStream, topology: Topology, *, source: Path, out: Path) -> None:
    """Write the streamed weights as the HF folder `out`, with `source`'s configuration and tokenizer. Collective."""
    if topology.is_driver:
        write_hf_folder(stream, stream.metadata(), source, out)
    else:
        for _ in stream:
            pass
    dist.barrier(group=topology.host_group)  # the writer works on after the last tensor
