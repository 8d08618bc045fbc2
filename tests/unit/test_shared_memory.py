"""Memory that is shared without a name: who is told of it has the same bytes, others do not take theirs for it, and
nothing stays."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from megatron_apo.rollout.transport.memory import accepted, offered

CHILD = """
import sys
from megatron_apo.rollout.transport.memory import Offer, accepted
memory = accepted(Offer(int(sys.argv[1]), int(sys.argv[2]), bytes.fromhex(sys.argv[3])))
memory[:3] += memory[3]
"""


def test_another_process_has_the_same_bytes() -> None:
    before = set(os.listdir("/dev/shm"))
    memory, offer = offered(5000)
    assert len(memory) == 5000 and memory.dtype == torch.uint8
    first = memory[:3].clone()
    memory[3] = 7
    told = asdict(offer) | {"token": bytes(memory[:16].tolist()).hex()}
    subprocess.run([sys.executable, "-c", CHILD, *map(str, told.values())], check=True)
    assert memory[:3].equal(first + 7)
    assert set(os.listdir("/dev/shm")) == before


@pytest.mark.parametrize("num_bytes", [0, 5, 4096])
def test_memory_of_any_size(num_bytes: int) -> None:
    memory, offer = offered(num_bytes)
    there = accepted(offer)
    assert there is not None and len(memory) == num_bytes
    memory.fill_(3)
    assert (there[:num_bytes] == 3).all()
    offer.close()
    assert accepted(offer) is None


def test_what_is_found_at_the_same_place_elsewhere_is_not_taken_for_it() -> None:
    _, offer = offered(100)
    other = replace(offer, token=bytes(16))
    assert accepted(other) is None and accepted(offer) is not None
    offer.close()
