"""Wherever the reference and the optimizer's state wait, training is the same bit for bit, and their memory is free.

Real ranks take three steps of the loop under each placement (placement_worker.py).
"""

from __future__ import annotations

import pytest
import torch

from tests.dist.placement_worker import BROKEN, CASES, RUNS, STEPS, runs_of
from tests.dist.ranks import start_ranks
from tests.models import make_model

LAYOUTS = ["dp2", "pp2-vpp2"]
FULL_LAYOUTS = ["pp2-vpp2-others", "tp1", "tp2", "pp2", "cp2", "dp2-ep2", "pp2-dp2"]
ALL_LAYOUTS = LAYOUTS + [pytest.param(layout, marks=pytest.mark.full) for layout in FULL_LAYOUTS]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory):
    work = tmp_path_factory.mktemp("placement")
    for seed, folder in enumerate(("policy", "reference")):
        for variant in {variant for variant, *_ in CASES.values()}:
            make_model(variant, work / folder, seed=seed)
    cache: dict[str, dict] = {}

    def get(layout: str) -> dict:
        if layout not in cache:
            start_ranks("tests.dist.placement_worker", work, layout)
            cache[layout] = torch.load(work / f"{layout}.pt", weights_only=True)
        return cache[layout]

    return get


def differences(found: dict, expected: dict) -> list[str]:
    """What of a run is not bit for bit that of another."""
    different = []
    for step, (ours, theirs) in enumerate(zip(found["reference"], expected["reference"], strict=True)):
        if not all(torch.equal(ours[sequence], theirs[sequence]) for sequence in theirs):
            different.append(f"reference of step {step}")
    if found["norms"] != expected["norms"]:
        different.append("norms")
    weights = expected["weights"]
    return different + [name for name in weights if not torch.equal(found["weights"][name], weights[name])]


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_every_placement_trains_the_same(layout, measured):
    for case, runs in measured(layout).items():
        for run in runs_of(case):
            assert differences(runs[run], runs["resident"]) == [], f"{case} {run}"
        assert len(set(runs["resident"]["norms"])) == STEPS, "the steps are all alike, so they would show nothing"


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_the_reference_is_that_of_its_folder_at_every_step(layout, measured):
    for case, runs in measured(layout).items():
        for run in runs_of(case):
            for step in runs[run]["reference"]:
                assert step.keys() == runs["folder"].keys()
                assert all(torch.equal(step[sequence], runs["folder"][sequence]) for sequence in step), f"{case} {run}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_comparison_notices(layout, measured):
    """With copies that bring nothing back, every placement that uses one comes out differently."""
    runs = measured(layout)["fp32"]
    for run in BROKEN:
        assert differences(runs[f"broken {run}"], runs["resident"]) != [], run
    assert not runs["broken offloaded"]["restored"]


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_an_exception_leaves_everything_as_it_was(layout, measured):
    for case, runs in measured(layout).items():
        assert all(runs[run]["restored"] for run in runs_of(case)), case


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_memory_is_free_where_it_should_be(layout, measured):
    for case, runs in measured(layout).items():
        for run in runs_of(case):
            mode, offloaded = RUNS[run]
            for step, sizes in enumerate(runs[run]["bytes"]):
                label = f"{case} {run} step {step}"
                before, inside = sizes["before"], sizes["offloaded"]
                assert sizes["after"] == before, label
                assert inside["weights"] == before["weights"] > 0 and before["gradients"] > 0, label
                if offloaded:
                    assert inside["gradients"] == inside["state"] == 0, label
                else:
                    assert inside == before, label
                # Adam's moments are there after the first step; main weights of their own beside bf16 ones.
                assert (before["state"] > 0) == (step > 0 or CASES[case][1] == "bf16"), label
                assert sizes["active"] > 0 and (sizes["inactive"] == 0) == (mode == "offload"), label


def test_what_leaves_is_what_the_docstring_says(measured):
    """12 bytes for each parameter of the shard beside bf16 weights, 8 beside fp32 ones, give or take padding."""
    for case, each in (("fp32", 8), ("bf16", 12)):
        sizes = measured("dp2")[case]["offloaded"]["bytes"][-1]["before"]
        assert sizes["state"] == pytest.approx(each * sizes["gradients"] / 4 / 2, rel=0.05), case
