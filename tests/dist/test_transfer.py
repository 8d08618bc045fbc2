"""Weights brought from the ranks that hold them, by the network or by memory of a device: every worker reads the
checkpoint, bit by bit; over the network each stage's owner sends its own buckets alone; a transfer that breaks off does
so for all, and a whole one follows."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import pytest

from tests.dist.ranks import parallel_of, start_ranks
from tests.dist.transfer_worker import FAULTS, TIMEOUT_S, TRANSPORTS
from tests.models import make_model

LAYOUTS = {"tp2-pp2": "qwen3-tied", "dp2-ep2": "qwen3_moe"}
FULL_LAYOUTS = {"pp2-vpp2-cp2-ep2": "qwen3_moe", "tp1": "qwen3-tied", "pp4": "qwen2-tied-one-group", "tp4": "qwen3"}
DEFAULT = [("tp2-pp2", "collective"), ("dp2-ep2", "collective"), ("tp2-pp2", "ipc")]
CASES = pytest.mark.parametrize(
    ("layout", "transport"),
    [
        pytest.param(layout, transport, marks=[] if (layout, transport) in DEFAULT else pytest.mark.full)
        for layout in LAYOUTS | FULL_LAYOUTS
        for transport in TRANSPORTS
    ],
)
Found = list[dict[str, dict]]


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Found]:
    """What became of each case, by rank."""

    @cache
    def run(layout: str, transport: str) -> Found:
        work, variant = tmp_path_factory.mktemp(layout), (LAYOUTS | FULL_LAYOUTS)[layout]
        make_model(variant, work / "models")
        start_ranks("tests.dist.transfer_worker", work, layout, variant, transport)
        world_size = parallel_of(layout).world_size
        return [json.loads((work / f"transfer.{rank}.json").read_text()) for rank in range(world_size)]

    return run


@pytest.mark.parametrize("case", ["whole", "again", *(f"after {fault}" for fault in FAULTS)])
@CASES
def test_every_worker_reads_the_checkpoint(
    layout: str, transport: str, case: str, sent: Callable[[str, str], Found]
) -> None:
    found = sent(layout, transport)
    assert found[0][case]["right"], found[0][case]
    owners = found[0]["plan"]["owners"]
    assert len(owners) > 8 and len(set(owners)) == parallel_of(layout).pp
    for rank, one in enumerate(found):
        assert one[case]["error"] is None and (one["plan"]["shares memory"] or transport == "ipc")
        everyone = transport == "ipc"
        assert one[case]["sent"] == [index for index, owner in enumerate(owners) if owner == rank or everyone]


@pytest.mark.parametrize("fault", FAULTS)
@CASES
def test_a_transfer_that_breaks_off_does_so_on_every_rank(
    layout: str, transport: str, fault: str, sent: Callable[[str, str], Found]
) -> None:
    found = sent(layout, transport)
    errors = {one[fault]["error"] for one in found}
    assert len(errors) == 1, errors
    (error,) = errors
    if fault == "gather":
        assert error.startswith("RuntimeError: rank ") and error.endswith(": no memory"), error
    else:
        assert error.startswith("TransferError: "), error
    assert not all(count == found[0]["plan"]["tensors"] for count in found[0][fault]["read"])
    if fault == "stuck" and transport == "collective" and parallel_of(layout).pp > 1:
        assert [one[fault]["silent"] for one in found] == [[1]] * len(found), error
    if fault == "absent":
        assert [one[fault]["silent"] for one in found] == [[1]] * len(found), error
        missed = {
            "collective": "worker 0 of the engine at 127.0.0.1 did not come within 4 s",
            "ipc": "has read no bucket",
        }
        assert missed[transport] in error
    assert max(one[fault]["seconds"] for one in found) < TIMEOUT_S
