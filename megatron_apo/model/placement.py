"""Where weights wait while the device's memory is needed for something else.

    place_reference(mode, policy, ...)      pi_ref; `with reference.active() as chunks:` to compute with it
    HostCopy(tensors)                       their bytes in host memory: `free()` the device's, `refill()` it

All modes compute the same numbers, bit for bit: they are the same weights in the same modules. The reference's weights
are not marked as frozen: Megatron-Core multiplies those by another routine, which rounds differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

ReferenceMode = Literal["resident", "offload", "swap"]
# A rank's model chunks in pipeline order: one, or `parallel.vpp`.
Chunks = Sequence[torch.nn.Module]

_PAGE = 4096  # bytes


class HostCopy:
    """The bytes of tensors in host memory; the tensors can give up their device's memory and get it back.

    Works on storages, so that no tensor is replaced: views (Megatron's DDP makes the weights views of one buffer) go on
    seeing the bytes, and what is shared is held once. On a GPU the host's memory is pinned and the copies are queued on
    the current stream; on a CPU, host and device are the same memory and everything else is as on a GPU.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        self._pairs = [(storage, _host_pieces(storage)) for storage in _storages(tensors).values()]
        for storage, pieces in self._pairs:
            for piece, part in _aligned(pieces, storage):
                piece.copy_(part, non_blocking=True)

    def is_of(self, tensors: Iterable[Tensor]) -> bool:
        """Whether the tensors still have the storages that this copy goes back to."""
        return _storages(tensors).keys() == {storage._cdata for storage, _ in self._pairs}

    def free(self) -> None:
        """Give up the device's memory. The tensors must not be used until `refill`."""
        for storage, _ in self._pairs:
            storage.resize_(0)

    def refill(self) -> None:
        """Make the tensors what they were when this copy was made, whether freed or written to since."""
        for storage, pieces in self._pairs:
            if storage.nbytes() == 0:
                storage.resize_(sum(map(len, pieces)))
            for piece, part in _aligned(pieces, storage):
                part.copy_(piece, non_blocking=True)


def drop_quantized(chunks: Chunks) -> None:
    """Free Transformer Engine's FP8 copies of weights, up to 2 bytes a parameter: the next batch makes them anew."""
    for module in (module for chunk in chunks for module in chunk.modules()):
        getattr(module, "_fp8_workspaces", {}).clear()


class Reference:
    """pi_ref, always on the device. Memory: its weights once more beside the policy's."""

    def __init__(self, chunks: Chunks):
        self._chunks = chunks

    @contextmanager
    def active(self) -> Iterator[Chunks]:
        """Within: the model chunks with the reference's weights, for forward passes without gradient."""
        try:
            yield self._chunks
        finally:
            drop_quantized(self._chunks)


class OffloadedReference(Reference):
    """pi_ref in host memory, on the device only while it computes.

    Memory of a rank: on the host its weights once; on the device nothing, but while active its weights beside the
    policy's. Time: the weights are copied to the device once a step.
    """

    def __init__(self, chunks: Chunks):
        super().__init__(chunks)
        self._weights = HostCopy(_parameters(chunks))
        self._weights.free()

    @contextmanager
    def active(self) -> Iterator[Chunks]:
        try:
            self._weights.refill()
            with super().active() as chunks:
                yield chunks
        finally:
            self._weights.free()  # they did not change: what the host has stays true


class SwappedReference(Reference):
    """pi_ref in the policy's own modules: while active they hold its weights, then the policy's again, bit for bit.

    Memory of a rank: nothing on the device; on the host the reference's weights, and while active the policy's. Time:
    the weights cross to the host once a step and to the device twice. While active, no one else may use the policy.
    """

    def __init__(self, policy: Chunks, load: Callable[[Chunks], None]):
        super().__init__(policy)
        with self._policy_kept():
            load(policy)
            self._weights = HostCopy(_parameters(policy))

    @contextmanager
    def active(self) -> Iterator[Chunks]:
        # Else they would go where no one reads them, and the log-ratio would be 0 for good.
        assert self._weights.is_of(_parameters(self._chunks)), "the policy's weights have moved since"
        with self._policy_kept():
            self._weights.refill()
            yield self._chunks

    @contextmanager
    def _policy_kept(self) -> Iterator[None]:
        policy = HostCopy(_parameters(self._chunks))
        try:
            yield
        finally:
            policy.refill()


def place_reference(
    mode: ReferenceMode, policy: Chunks, *, build: Callable[[], Chunks], load: Callable[[Chunks], None]
) -> Reference:
    """pi_ref as `model.reference_mode` says.

    policy: the trained chunks, after `make_trainable`, which moves their weights into its own buffers.
    build: makes a model of its own, called for all modes but swap. load: writes the reference's weights into chunks.
    """
    if mode == "swap":
        return SwappedReference(policy, load)
    with torch.no_grad():  # else Transformer Engine keeps a bf16 copy of each FP8 weight, for a master to start from
        chunks = build()
    load(chunks)
    return OffloadedReference(chunks) if mode == "offload" else Reference(chunks)


def _parameters(chunks: Chunks) -> Iterator[Tensor]:
    return (parameter for chunk in chunks for parameter in chunk.parameters())


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Each storage behind the tensors, by its identity."""
    return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}


def _host_pieces(storage: torch.UntypedStorage) -> list[Tensor]:
    """Host memory for a storage, in powers of two and a rest of less than a page.

    torch rounds pinned memory up to a power of two (CachingHostAllocatorImpl::allocate): in one piece up to half of it
    would be wasted. It keeps freed pieces for the next request, so that pinning, which is slow, happens once.
    """
    size = storage.nbytes()
    pages, rest = size // _PAGE, size % _PAGE
    sizes = [_PAGE << bit for bit in range(pages.bit_length()) if pages >> bit & 1] + [rest] * (rest > 0)
    return [torch.empty(size, dtype=torch.uint8, pin_memory=storage.device.type == "cuda") for size in sizes]


def _aligned(pieces: list[Tensor], storage: torch.UntypedStorage) -> Iterator[tuple[Tensor, Tensor]]:
    """Each piece with its part of the storage, as bytes."""
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]
    return zip(pieces, whole.split([len(piece) for piece in pieces]), strict=True)
