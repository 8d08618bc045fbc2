"""A resumed rank reads its own share of the optimizer, and gets what Megatron-Core's own way of loading gives it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dist.ranks import parallel_of, start_ranks
from tests.dist.resume_worker import Loaded

# Beside what is counted: what torch and Megatron-Core import when they load, metadata, freed memory that is kept.
SLACK_BYTES = 12 << 20


def run(work: Path, layout: str, action: str, name: str, *arguments: str) -> None:
    start_ranks("tests.dist.resume_worker", work, layout, name, action, *arguments)


def load(work: Path, layout: str, action: str, *arguments: str) -> list[Loaded]:
    """What each rank has."""
    run(work, layout, action, *arguments)
    ranks = range(parallel_of(layout).world_size)
    return [Loaded(**json.loads((work / f"{action}-{layout}-{rank}.json").read_text())) for rank in ranks]


def test_a_rank_holds_its_share_of_the_optimizer(tmp_path):
    """Of 12 bytes a parameter the main weights, 4, are there before: in fp32 they are the model's own."""
    run(tmp_path, "tp1", "save", "large")
    found, whole = (load(tmp_path, "dp4", action, "large") for action in ("ours", "theirs"))
    for rank, (own, other) in enumerate(zip(found, whole, strict=True)):
        share, tensor = 8 * own.num_parameters // 4, 4 * own.largest
        allowed = share + tensor + SLACK_BYTES
        extra, others_extra = (loaded.peak_bytes - loaded.held_bytes for loaded in (own, other))
        print(f"rank {rank}: {extra / 1e6:.0f} MB, Megatron-Core's way {others_extra / 1e6:.0f}, {allowed / 1e6:.0f}")
        assert share < extra <= allowed
        assert others_extra > 12 * own.num_parameters + share
        assert own.state == other.state


# saved at, loaded at, what
LOADS = [
    ("tp2", "pp2-dp2", "tied bf16"),  # main weights beside the model's; in which the last stage has two buckets
    pytest.param("pp2-dp2", "tp2-dp2", "tied", marks=pytest.mark.full),
    pytest.param("tp2-dp2", "dp2-pp2-vpp2", "tied", marks=pytest.mark.full),
    pytest.param("dp2", "tp2-dp2", "tied", marks=pytest.mark.full),
    pytest.param("ep2-dp2", "ep2-dp4", "experts", marks=pytest.mark.full),
    pytest.param("ep2-dp2", "pp2-ep2-dp2", "experts bf16", marks=pytest.mark.full),
    pytest.param("tp1", "dp2", "experts", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("saved_at", "layout", "what"), LOADS)
def test_each_rank_gets_what_megatron_core_would_give_it(saved_at, layout, what, tmp_path):
    """Bit for bit: weights, main weights, moments and step."""
    run(tmp_path, saved_at, "save", *what.split())
    found, expected = (load(tmp_path, layout, action, *what.split()) for action in ("ours", "theirs"))
    for own, other in zip(found, expected, strict=True):
        assert own.state == other.state


@pytest.mark.parametrize(("saved_at", "layout"), [("tp1", "ep2-dp2"), ("ep2-dp2", "tp1")])
def test_experts_may_be_spread_over_another_number_of_ranks(saved_at, layout, tmp_path):
    """And back again, with nothing lost. Megatron-Core's way does not find what another number of optimizers saved:
    without expert ranks the experts have none of their own."""
    run(tmp_path, saved_at, "save", "experts")
    run(tmp_path, layout, "copy", "experts")
    found, expected = (
        load(tmp_path / "copy", saved_at, "ours", "experts"),
        load(tmp_path, saved_at, "theirs", "experts"),
    )
    assert [rank.state for rank in found] == [rank.state for rank in expected]
