"""A Megatron model's weights as Hugging Face tensors, one after the other, on global rank 0.

    WeightStream(chunks, spec, topology)            HF tensors, in HF order
    export_hf(stream, topology, ...)                the stream written as an HF folder

The tensors come in buckets (`gather.py`): while the caller consumes one, the next is already being received.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_apo.model.hf_config import ModelSpec
from megatron_apo.model.precision import plain
from megatron_apo.runtime.topology import Topology
from megatron_apo.weights.gather import Gather
from megatron_apo.weights.hf_writer import write_hf_folder
from megatron_apo.weights.plan import BUCKET_BYTES, TensorMeta


class WeightStream:
    """The model's Hugging Face tensors, one at a time.

    `metadata()` is static and the same on every rank. Iterating is collective over all ranks; global rank 0 yields
    (name, full tensor) in the order of `metadata()`, the others yield nothing. Can be iterated again. The arguments are
    those of `Gather`.
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
        self._topology = topology
        self._gather = Gather(chunks, spec, topology, dtype=dtype, bucket_bytes=bucket_bytes, tensor_of=tensor_of)

    @property
    def dtype(self) -> torch.dtype:
        return self._gather.dtype

    def metadata(self) -> list[TensorMeta]:
        return list(self._gather.plan.tensors)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        with closing(self._gather.buckets("driver")) as buckets:
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
