"""What is read back of packed layers: rows and columns that are drawn by chance, and columns in which they changed."""

from __future__ import annotations

import random
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")
from megatron_apo.rollout.transport.content import ModelContent, Region, View, _Kept  # noqa: E402

N, K = 192, 600  # of two tensors, the second one from row HALF on
HALF = 96
REGIONS = [Region(number, View(number * HALF * K, (HALF, K), (K, 1)), None, True) for number in range(2)]


@pytest.fixture
def content() -> ModelContent:
    """Of one packed layer, without a model."""
    made = ModelContent.__new__(ModelContent)
    made._kept, made._chance, made._names = defaultdict(_Kept), random.Random(0), ["first", "second"]
    return made


def stale(content: ModelContent, given: Tensor, packed: Tensor, digests: list[str]) -> set[str]:
    """Tensors of which the packed copy is found to be stale."""
    columns = content._choose("layer", given, REGIONS, digests)
    method = SimpleNamespace(apply=lambda layer, x: x @ packed.t())
    content._layers = {"layer": SimpleNamespace(quant_method=method)}
    return set(content._read_back("layer", columns))


def test_a_packed_copy_of_the_update_before_is_named_by_its_tensor(content: ModelContent) -> None:
    """In every update, whatever block is looked at; of dense updates and of one element alone."""
    weight = torch.randn(N, K)
    assert stale(content, weight, weight, ["0", "0"]) == set()
    for update in range(1, 60):
        new = weight.clone()
        new[HALF:] += 0.01
        if update % 2:
            new = weight.clone()
            new[HALF:, (update * 37) % K] += 0.01
        assert stale(content, new, weight, ["0", str(update)]) == {"second"}
        assert stale(content, new, new, ["0", str(update)]) == set()
        content._kept["layer"].digests = ["0", "old"]
        weight = new


def test_all_columns_are_read_where_the_block_shows_no_change(content: ModelContent) -> None:
    weight = torch.randn(N, K)
    content._choose("layer", weight, REGIONS, ["a", "b"])
    other = weight.clone()
    other[:HALF, 300] += 1
    assert len(content._choose("layer", other, REGIONS, ["c", "b"]).numbers) == K
    assert len(content._choose("layer", other, REGIONS, ["c", "b"]).numbers) == 2


def test_in_time_every_row_and_column_is_looked_at(content: ModelContent) -> None:
    weight, rows, columns = torch.randn(3 * N, K), set(), set()
    regions = [Region(0, View(0, (3 * N, K), (K, 1)), None, True)]
    for update in range(600):
        chosen = content._choose("layer", weight + update, regions, [str(update)])
        rows |= {int(row) for each in chosen.rows for row in each}
        columns |= set(chosen.numbers.tolist())
    assert rows == set(range(3 * N)) and len(columns) > 0.9 * K
