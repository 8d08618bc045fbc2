"""The noise of `noisy_sampler`, for those who do not import vLLM."""

from __future__ import annotations

import zlib

import torch


def noise(seed: int, position: int, vocab_size: int, std: float) -> torch.Tensor:
    """[V] normal numbers for the logits of a response's token, by the seed of its request."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{position}".encode()))
    return std * torch.randn(vocab_size, generator=generator)
