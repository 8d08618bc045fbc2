"""Digests of tensors' bytes, to tell whether two places hold the same weights: integrity, no cryptography.

`xxh3` (xxHash's 128 bits, 8 GB/s on one core) is of bytes in host memory. `sum` is made of a few tensor operations
where the tensor is, so that what lies on a GPU need not leave it. Trainer and workers use the same one.
"""

from __future__ import annotations

from typing import Literal

import torch
import xxhash
from torch import Tensor

DigestKind = Literal["xxh3", "sum"]

# Odd, so that multiplying by it loses nothing (the golden ratio's and two of xxHash's own, as int64).
_MULTIPLIERS = (-7046029254386353131, -4417276706812531889)
_SLAB = 1 << 22  # words of a `sum` that exist as int64 at once


def digest_kind(device: torch.device) -> DigestKind:
    """The one that costs least where tensors lie."""
    return "xxh3" if device.type == "cpu" else "sum"


def digest(tensor: Tensor, kind: DigestKind = "xxh3") -> str:
    """32 hexadecimal digits of the tensor's elements, one after the other; its shape does not count."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if kind == "xxh3":
        return xxhash.xxh3_128_hexdigest(memoryview(data.cpu().numpy()))
    return _sum(data)


def _sum(data: Tensor) -> str:
    """Sum over 32-bit words, modulo 2^64, of the word times a number that is odd and of its position; two of these.

    A word that is another changes both sums, whichever it is.
    """
    length = len(data)
    if padding := -length % 4:
        data = torch.cat([data, data.new_zeros(padding)])
    words = data.view(torch.int32) if data.storage_offset() % 4 == 0 else data.clone().view(torch.int32)
    sums = [torch.zeros((), dtype=torch.int64, device=data.device) for _ in _MULTIPLIERS]
    for start in range(0, len(words), _SLAB):
        slab = words[start : start + _SLAB].long()
        position = torch.arange(start, start + len(slab), device=data.device)
        for index, multiplier in enumerate(_MULTIPLIERS):
            factor = (position * 2 + 1) * multiplier
            factor = factor ^ ((factor >> 29) << 1)  # still odd
            sums[index] += (slab * factor).sum()
    return "".join(f"{(int(total) + length) % 2**64:016x}" for total in sums)
