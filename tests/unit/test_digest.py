"""Digests: xxHash's own values, the sum against its definition, and every flipped bit seen."""

from __future__ import annotations

import pytest
import torch

from megatron_apo.weights import digest as digest_file
from megatron_apo.weights.digest import DigestKind, digest, digest_kind

KINDS: list[DigestKind] = ["xxh3", "sum"]


def test_xxh3_is_xxhashs() -> None:
    """Of xxHash's own test vectors: no bytes; and that a tensor's bytes are what is hashed."""
    assert digest(torch.empty(0)) == "99aa06d3014798d86001c324468d497f"
    text = torch.tensor(list(b"a"), dtype=torch.uint8)
    assert digest(text) == "a96faf705af16834e6c632b61e964e1f"


def test_sum_is_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words times an odd number of their position, modulo 2^64, written with Python's integers."""

    def signed(value: int) -> int:
        return (value + 2**63) % 2**64 - 2**63

    monkeypatch.setattr(digest_file, "_SLAB", 7)
    data = torch.randint(0, 256, (93,), dtype=torch.uint8)
    padded = bytes(data.tolist()) + b"\0" * 3
    words = [int.from_bytes(padded[start : start + 4], "little", signed=True) for start in range(0, len(padded), 4)]
    expected = ""
    for multiplier in digest_file._MULTIPLIERS:
        total = 0
        for position, word in enumerate(words):
            factor = signed((2 * position + 1) * multiplier)
            total += word * (factor ^ (factor >> 29 << 1))
        expected += f"{(total + 93) % 2**64:016x}"
    assert digest(data, "sum") == expected


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_counts_and_so_does_every_place(kind: DigestKind) -> None:
    data = torch.randint(0, 256, (61,), dtype=torch.uint8)
    found = {digest(data, kind)}
    for byte in range(len(data)):
        for bit in range(8):
            other = data.clone()
            other[byte] ^= 1 << bit
            found.add(digest(other, kind))
    assert len(found) == 1 + 8 * len(data)
    assert digest(torch.tensor([1.0, 2.0]), kind) != digest(torch.tensor([2.0, 1.0]), kind)
    assert digest(torch.zeros(3), kind) != digest(torch.zeros(4), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_a_views_elements_are_those_of_its_copy(kind: DigestKind, dtype: torch.dtype) -> None:
    whole = torch.randn(9, 7).to(dtype)
    for view in (whole[1:4], whole[:, 2:5], whole.t()):
        assert digest(view, kind) == digest(view.clone(memory_format=torch.contiguous_format), kind)


def test_what_lies_on_a_gpu_is_summed_there() -> None:
    assert (digest_kind(torch.device("cpu")), digest_kind(torch.device("cuda"))) == ("xxh3", "sum")
