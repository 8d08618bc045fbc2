"""Weights gathered to every destination are the checkpoint's, bit by bit, also right after a gathering broke off."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import pytest

from tests.dist.gather_worker import DESTINATIONS, FAULTS, SHARED
from tests.dist.ranks import parallel_of, start_ranks
from tests.models import make_model

# Between them every size, a tied head that another stage holds, groups and a vocabulary that TP does not divide.
LAYOUTS = {"tp2-pp2": "qwen2-tied-one-group", "pp2-vpp2-cp2-ep2": "qwen3_moe"}
FULL_LAYOUTS = {
    "tp1": "qwen3-tied",
    "tp2-pp2-vpp2": "llama-biases",
    "tp4": "qwen3",
    "pp2": "qwen3_moe-tied-plain",
    "cp2": "qwen3-tied",
    "tp2-cp2": "qwen3-attention-bias",
    "tp2-dp2": "qwen2",
    "dp2-ep2": "qwen3_moe-tied-plain",
    "dp4-ep2": "qwen3_moe",
    "dp4-ep4": "qwen3_moe",
}
ALL_LAYOUTS = [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.full) for layout in FULL_LAYOUTS)]
Found = list[dict[str, dict]]


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Found]:
    """What each rank of a layout received."""

    @cache
    def run(layout: str) -> Found:
        work, variant = tmp_path_factory.mktemp(layout), (LAYOUTS | FULL_LAYOUTS)[layout]
        make_model(variant, work / "models")
        start_ranks("tests.dist.gather_worker", work, layout, variant)
        world_size = parallel_of(layout).world_size
        return [json.loads((work / f"{layout}.{rank}.json").read_text()) for rank in range(world_size)]

    return run


def received_by(to: str, rank: int, owners: list[int]) -> list[int]:
    """Indices of the buckets that a rank receives. owners: of each bucket."""
    every = list(range(len(owners)))
    if to.startswith("owners"):
        return [index for index in every if owners[index] == rank]
    return every if to == "all" or rank == 0 else []


@pytest.mark.parametrize("to", DESTINATIONS)
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_every_receiver_has_the_checkpoint(layout: str, to: str, gathered: Callable[[str], Found]) -> None:
    for case in (to, f"{to}, ahead") if to in SHARED else (to,):
        for rank, found in enumerate(gathered(layout)):
            owners = found["plan"]["owners"]
            assert len(owners) > 8 and len(set(owners)) == parallel_of(layout).pp
            received = {"buckets": received_by(to, rank, owners), "wrong": [], "error": None}
            assert found[case] == received, f"{case}, rank {rank}"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("to", DESTINATIONS)
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_a_broken_off_gathering_leaves_nothing(
    layout: str, to: str, fault: str, gathered: Callable[[str], Found]
) -> None:
    """It ends early for those whom it concerns, and the next is whole on every rank."""
    for rank, found in enumerate(gathered(layout)):
        owners, last = found["plan"]["owners"], parallel_of(layout).world_size - 1
        whole = received_by(to, rank, owners)
        for broken, after in (
            (f"{to}, {fault}", f"{to}, after {fault}"),
            *([(f"{to}, ahead, {fault}", f"{to}, after ahead, {fault}")] if to in SHARED else []),
        ):
            assert found[after] == {"buckets": whole, "wrong": [], "error": None}, f"{after}, rank {rank}"
            told = found[broken]
            assert told["wrong"] == [] and told["buckets"] == whole[: len(told["buckets"])]
            outcome = (told["error"], len(told["buckets"]))
            leads_last = rank == (owners[-1] if to.startswith("owners") else 0)
            expected = outcomes(to, fault, rank, last, leads_last, found["plan"]["writes"], whole)
            assert outcome in expected, f"{broken}, rank {rank}"


def outcomes(
    to: str, fault: str, rank: int, last: int, leads_last: bool, num_written: int, whole: list[int]
) -> list[tuple[str | None, int]]:
    """(error of a rank, how many buckets it received), where which of them may depend on who was faster.

    leads_last: whether it receives what the last rank gives; num_written: buckets that this rank has a part of; whole:
    those that it receives of a whole gathering.
    """
    no_memory = "RuntimeError: no memory"
    receives, broken = len(whole) > 0, {"no memory": 0, "last has none": last}.get(fault)
    if rank == broken and receives:  # memory of what is written ahead is asked for first
        return [(no_memory, 1), *([(no_memory, 0)] if to in SHARED else [])]
    if rank == broken and to in SHARED and num_written > 1:
        return [(no_memory, 0)]
    if rank == 0 and broken is None:
        return [("Enough: enough" if fault == "raises" else None, 2)]
    if to == "all":  # what was under way is received
        return [(None, count) for count in (1, 2, 3)]
    if broken == last and to in SHARED and leads_last:  # unless the last rank has no part of any bucket
        text = f"GatherError: rank {last} could not write its part of the weights; see what it said"
        return [(text, count) for count in range(len(whole))] + [(None, len(whole))]
    return [(None, len(whole))]


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_no_rank_holds_more_than_two_buckets(layout: str, gathered: Callable[[str], Found]) -> None:
    """Beside those of its caller; more than one, since one is under way while another is put together."""
    most = [found["plan"]["most"] for found in gathered(layout)]
    assert max(most) <= 2
    assert parallel_of(layout).world_size == 1 or max(most) > 1


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_weights_that_changed_are_noticed(layout: str, gathered: Callable[[str], Found]) -> None:
    """Each tensor, by the comparison of the tests above."""
    found = gathered(layout)[0]
    assert found["moved"]["wrong"] == found["plan"]["names"]


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_every_rank_refuses_what_one_has_of_weights_that_are_not_finite(
    layout: str, gathered: Callable[[str], Found]
) -> None:
    said = "the weights: a tensor holds NaN or infinity (model.layers.0.self_attn.o_proj.weight); give a folder of "
    for found in gathered(layout):
        assert found["plan"]["refused"].startswith(said)
