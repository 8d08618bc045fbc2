"""What is read back of packed layers: rows and columns that are drawn by chance, and columns in which they changed; and
how it is told whether vLLM's loaders put a tensor where it belongs."""

from __future__ import annotations

import random
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding  # noqa: E402

from megatron_apo.rollout.transport.content import ModelContent, Region, View, _Kept  # noqa: E402
from megatron_apo.weights.plan import TensorMeta  # noqa: E402

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


# --- whether a tensor is where it belongs


def placed(content: ModelContent, layer: str, parameter: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """A layer of one parameter that these tensors fill, one after the other, each whole."""
    offset, regions = 0, []
    for number, shape in enumerate(shapes.values()):
        rows, columns = shape
        regions.append(Region(number, View(offset, shape, (columns, 1)), View(0, shape, (columns, 1)), True))
        offset += rows * columns
    content._tensors = [TensorMeta(name, torch.float32, shape) for name, shape in shapes.items()]
    content._names = list(shapes)
    content._layers = {layer: SimpleNamespace()}
    content._regions = {(layer, parameter): regions}
    content._tp_rank, content._tp_size = 0, 1
    content._parts_of = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def misplaced(content: ModelContent) -> list[str | None]:
    ((key, regions),) = content._regions.items()
    return [content._misplaced(key, region) for region in regions]


def test_parts_of_a_layer_are_in_its_order_and_of_its_own(content: ModelContent) -> None:
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    layer = "model.layers.0.self_attn.qkv_proj"
    placed(content, layer, "weight", dict.fromkeys(names, (4, 8)))
    assert misplaced(content) == [None] * 3
    placed(content, layer, "weight", dict.fromkeys([names[0], names[2], names[1]], (4, 8)))
    assert misplaced(content) == [
        None,
        f"vLLM put it where {names[1]} belongs",
        f"vLLM put it where {names[2]} belongs",
    ]
    placed(content, "model.layers.1.self_attn.qkv_proj", "weight", dict.fromkeys(names, (4, 8)))
    assert misplaced(content) == ["vLLM put it into model.layers.1.self_attn.qkv_proj"] * 3


def test_experts_are_in_their_order(content: ModelContent) -> None:
    names = [
        f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight" for expert in range(11) for part in ("gate", "up")
    ]
    placed(content, "model.layers.0.mlp.experts", "w13_weight", dict.fromkeys(names, (4, 8)))
    assert misplaced(content) == [None] * 22
    names[2], names[20] = names[20], names[2]  # gates of experts 1 and 10
    placed(content, "model.layers.0.mlp.experts", "w13_weight", dict.fromkeys(names, (4, 8)))
    found = misplaced(content)
    assert [bool(each) for each in found] == [index in (2, 20) for index in range(22)]


@pytest.mark.parametrize(
    ("rows", "rows_of_part", "tp_size", "right"),
    [
        (8, 2, 4, [0, 2, 4, 6]),  # as many shares as workers
        (8, 4, 4, [0, 0, 4, 4]),  # two heads, each of which two workers have
        (8, 8, 4, [0, 0, 0, 0]),  # all of it
    ],
)
def test_a_worker_has_its_own_share(
    content: ModelContent, rows: int, rows_of_part: int, tp_size: int, right: list[int]
) -> None:
    content._layers, content._tp_size = {"layer": SimpleNamespace()}, tp_size
    tensor = TensorMeta("t", torch.float32, (rows, 3))
    for content._tp_rank, expected in enumerate(right):
        for first in range(0, rows - rows_of_part + 1, rows_of_part):
            part = View(first * 3, (rows_of_part, 3), (3, 1))
            assert content._is_own_share("layer", tensor, part) is (first == expected)


def test_a_workers_columns_are_its_own(content: ModelContent) -> None:
    content._layers, content._tp_rank, content._tp_size = {"layer": SimpleNamespace()}, 1, 2
    tensor = TensorMeta("t", torch.float32, (3, 8))
    assert content._is_own_share("layer", tensor, View(4, (3, 4), (8, 1)))
    assert not content._is_own_share("layer", tensor, View(0, (3, 4), (8, 1)))


def test_a_vocabulary_is_cut_by_its_padded_length(content: ModelContent) -> None:
    embedding = VocabParallelEmbedding.__new__(VocabParallelEmbedding)
    torch.nn.Module.__init__(embedding)
    embedding.shard_indices = SimpleNamespace(org_vocab_start_index=32)
    content._layers, content._tp_rank, content._tp_size = {"layer": embedding}, 1, 2
    tensor = TensorMeta("t", torch.float32, (50, 3))
    assert content._is_own_share("layer", tensor, View(32 * 3, (18, 3), (3, 1)))
    assert not content._is_own_share("layer", tensor, View(25 * 3, (25, 3), (3, 1)))
