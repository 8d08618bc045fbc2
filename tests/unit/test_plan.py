"""Buckets by what they promise: order, bounds, alignment, one stage each; and a rank's part in them."""

from __future__ import annotations

import time
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_apo.model.hf_config import ModelSpec
from megatron_apo.weights.families import hf_tensors
from megatron_apo.weights.gather import Gather
from megatron_apo.weights.plan import ALIGNMENT_BYTES, Bucket, Plan, TensorMeta
from megatron_apo.weights.safetensors_file import num_bytes
from tests.shards import QWEN3_30B_A3B, chunks_of, topologies
from tests.specs import model_spec

SIZES = dict(num_layers=4, hidden_size=8, ffn_size=16, num_heads=8, num_query_groups=2, head_dim=6, vocab_size=11)
DENSE = model_spec(**SIZES, family="qwen3", qk_norm=True, qkv_bias=True)
TIED = model_spec(**SIZES | {"tied": True, "num_query_groups": 1}, family="qwen3")
MIXTURE = model_spec(**SIZES, family="qwen3_moe", num_experts=4, experts_per_token=2, expert_ffn_size=8)


def check(plan: Plan, bucket_bytes: int) -> None:
    assert [bucket.index for bucket in plan.buckets] == list(range(len(plan.buckets)))
    assert [name for bucket in plan.buckets for name in names(bucket)] == [tensor.name for tensor in plan.tensors]
    for bucket in plan.buckets:
        assert names(bucket) and {entry.pp_rank for entry in bucket.entries} <= {bucket.pp_rank}
        end = 0
        for tensor, offset in zip(bucket.tensors, bucket.offsets, strict=True):
            assert offset % ALIGNMENT_BYTES == 0 and 0 <= offset - end < ALIGNMENT_BYTES
            end = offset + prod(tensor.shape) * tensor.dtype.itemsize
        assert 0 <= bucket.num_bytes - end < ALIGNMENT_BYTES and bucket.num_bytes % ALIGNMENT_BYTES == 0
        assert bucket.num_bytes <= bucket_bytes or max(len(bucket.entries), 1) == 1
    assert plan.largest_bucket_bytes == max((bucket.num_bytes for bucket in plan.buckets), default=0)


def names(bucket: Bucket) -> list[str]:
    return [tensor.name for tensor in bucket.tensors]


@pytest.mark.parametrize("spec", [DENSE, TIED, MIXTURE], ids=["dense", "tied", "mixture"])
@pytest.mark.parametrize(("pp", "ep", "vpp"), [(1, 1, 1), (2, 1, 1), (2, 2, 2), (4, 4, 1)])
@pytest.mark.parametrize("bucket_bytes", [1, 600, 3000, 2**30])
def test_buckets_of_a_model(spec: ModelSpec, pp: int, ep: int, vpp: int, bucket_bytes: int) -> None:
    plan = Plan.of(spec, torch.bfloat16, bucket_bytes, pp=pp, ep=ep, vpp=vpp)
    check(plan, bucket_bytes)
    assert [(tensor.name, tensor.shape) for tensor in plan.tensors] == list(hf_tensors(spec).items())
    assert plan.num_bytes == 2 * sum(map(prod, hf_tensors(spec).values()))
    for bucket in plan.buckets:  # the tensors of one parameter are not parted
        assert names(bucket) == [name for entry in bucket.entries for name in entry.hf]
    for bucket, following in zip(plan.buckets, plan.buckets[1:], strict=False):  # no bucket ends without need
        first = following.tensors[: len(following.entries[0].hf)]
        needed = sum(-(-num_bytes(tensor) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for tensor in first)
        assert bucket.pp_rank != following.pp_rank or bucket.num_bytes + needed > bucket_bytes
    if bucket_bytes == 2**30:
        assert len(plan.buckets) == pp * vpp
    if bucket_bytes == 1:
        assert all(len(bucket.entries) == 1 for bucket in plan.buckets)


def test_a_layers_experts_spread_over_several_buckets() -> None:
    plan = Plan.of(MIXTURE, torch.float32, 2000, ep=2)
    of_a_layer = [bucket for bucket in plan.buckets if any("layers.1.mlp.experts" in name for name in names(bucket))]
    assert len(of_a_layer) > 1 and {entry.ep_rank for bucket in of_a_layer for entry in bucket.entries} >= {0, 1}


DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.uint8)


@settings(deadline=None)
@given(
    shapes=st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(DTYPES)), max_size=12),
    bucket_bytes=st.integers(1, 500),
)
def test_views_are_the_tensors_in_the_buffer(shapes: list, bucket_bytes: int) -> None:
    """Of any dtypes and shapes: written one by one, no tensor touches another."""
    metas = [TensorMeta(f"t{index}", dtype, tuple(shape)) for index, (shape, dtype) in enumerate(shapes)]
    plan = Plan.of_tensors(metas, bucket_bytes)
    check(plan, bucket_bytes)
    assert plan.tensors == tuple(metas)
    for bucket in plan.buckets:
        assert (bucket.entries, bucket.pp_rank) == ((), 0)
        buffer = torch.zeros(bucket.num_bytes + 3, dtype=torch.uint8)
        views = bucket.views(buffer)
        for value, view in enumerate(views, start=1):
            view.fill_(value)
        for value, (meta, offset, view) in enumerate(zip(bucket.tensors, bucket.offsets, views, strict=True), start=1):
            assert (view.dtype, tuple(view.shape)) == (meta.dtype, meta.shape) and view.is_contiguous()
            assert bool((view == value).all()) and view.storage_offset() * meta.dtype.itemsize == offset
            assert view.untyped_storage().data_ptr() == buffer.data_ptr()
        on_meta = bucket.views(torch.empty(bucket.num_bytes, dtype=torch.uint8, device="meta"))
        assert [(view.is_meta, view.shape) for view in on_meta] == [(True, view.shape) for view in views]


def test_the_plan_of_a_large_mixture() -> None:
    """18,867 tensors: embedding, final norm, head, and in each of 48 layers 9 tensors and 3 of each of 128 experts."""
    start = time.perf_counter()
    plan = Plan.of(QWEN3_30B_A3B, torch.bfloat16, 2**28, pp=2)
    assert time.perf_counter() - start < 2
    check(plan, 2**28)
    assert len(plan.tensors) == 3 + 48 * (9 + 3 * 128) == 18_867
    assert plan.num_bytes == 2 * 30_532_122_624
    vocabulary = 151936 * 2048 * 2  # one tensor, which is more than a bucket holds
    assert plan.largest_bucket_bytes == vocabulary and len(plan.buckets[0].tensors) == 1
    assert [bucket.pp_rank for bucket in plan.buckets] == sorted(bucket.pp_rank for bucket in plan.buckets)


LAYOUTS = [
    (DENSE, dict()),
    (DENSE, dict(tp=8)),
    (TIED, dict(tp=4, pp=2)),
    (DENSE, dict(tp=2, pp=2, vpp=2, cp=2)),
    (MIXTURE, dict(tp=2, dp=2, ep=2)),
    (MIXTURE, dict(tp=4, pp=2, cp=2, dp=2, ep=4)),
    (MIXTURE, dict(pp=2, vpp=2, dp=4, ep=2)),
]


@pytest.mark.parametrize(("spec", "sizes"), LAYOUTS, ids=lambda value: str(value) if isinstance(value, dict) else "")
@pytest.mark.parametrize("bucket_bytes", [1, 1500, 2**20])
def test_the_ranks_parts_make_each_bucket(spec: ModelSpec, sizes: dict[str, int], bucket_bytes: int) -> None:
    """Experts split over tensor ranks too, which no CPU trains. A rank writes nothing that another gives."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in hf_tensors(spec).items()}
    gathers = [Gather(chunks_of(spec, t, tensors), spec, t, bucket_bytes=bucket_bytes) for t in topologies(**sizes)]
    plan = gathers[0].plan
    assert all(gather.plan == plan for gather in gathers)
    for bucket in plan.buckets:
        found = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
        times = [torch.zeros(meta.shape) for meta in bucket.tensors]
        for gather in gathers:
            buffer = torch.full((bucket.num_bytes,), 0xFF, dtype=torch.uint8)
            gather.place(bucket, buffer)
            for view, into, count in zip(bucket.views(buffer), bucket.views(found), times, strict=True):
                written = ~view.isnan()  # of 0xFF bytes alone
                into[written] = view[written]
                count += written
        assert all(bool((count == 1).all()) for count in times)
        for meta, view in zip(bucket.tensors, bucket.views(found), strict=True):
            assert torch.equal(view, tensors[meta.name]), meta.name


def test_what_is_sent_has_the_plans_dtype_and_the_values_of_now() -> None:
    (topology,) = topologies()
    tensors = {name: torch.randn(shape) for name, shape in hf_tensors(DENSE).items()}
    chunks = chunks_of(DENSE, topology, tensors)
    gather = Gather(chunks, DENSE, topology, dtype=torch.bfloat16)
    (bucket,) = gather.plan.buckets
    for factor in (1.0, 2.0):
        buffer = torch.empty(bucket.num_bytes, dtype=torch.uint8)
        gather.place(bucket, buffer)
        for meta, view in zip(bucket.tensors, bucket.views(buffer), strict=True):
            assert torch.equal(view, (factor * tensors[meta.name]).bfloat16())
        for _, parameter in chunks[0].named_parameters():
            parameter.data = 2 * parameter.data  # other memory, too
