"""A streamed step has the gradient of the step that waits for all: bit for bit in the same micro-batches, and to
rounding in those that a whole batch is put into. Real ranks take both (streamed_worker.py); what the whole step
computes is held against transformers in test_learner.py and test_methods.py. Faults in the streaming must be seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from tests.dist.learner_worker import VARIANT
from tests.dist.ranks import start_ranks
from tests.dist.streamed_worker import IN_WAVES, SAME, WHOLE, faults_of, methods_of
from tests.dist.test_layouts import relative_difference
from tests.models import make_model

LAYOUTS = ["tp2-pp2", "dp2", "cp2"]
# Relative difference of a tensor's gradient in other micro-batches, in the 2-norm: rounding in fp32, of which
# test_learner.py allows as much. The second minibatch is at weights that the first one's has moved.
ROUNDING = 1e-5
KINDS = {layout: ["apo", "masked", *methods_of(layout)] for layout in LAYOUTS}
CASES = [(layout, kind) for layout in LAYOUTS for kind in KINDS[layout]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict]:
    folder = tmp_path_factory.mktemp("streamed")
    for seed, name in enumerate(("policy", "reference")):
        make_model(VARIANT, folder / name, seed=seed)

    @cache
    def get(layout: str) -> dict:
        start_ranks("tests.dist.streamed_worker", folder, layout)
        return torch.load(folder / f"{layout}.pt", weights_only=True)

    return get


def of_kind(found: dict, kind: str) -> dict[str, dict[str, Any]]:
    return found[kind] if kind in found else found["methods"][kind]


def worst_gradient(ours: dict, theirs: dict) -> float:
    """Largest relative difference of a minibatch's gradient of a tensor."""
    pairs = zip(ours["gradients"], theirs["gradients"], strict=True)
    return max(relative_difference(mine[name], other[name]) for mine, other in pairs for name in other)


@pytest.mark.parametrize(("layout", "kind"), [*CASES, *((layout, "sharded") for layout in LAYOUTS)])
def test_in_the_same_micro_batches_it_is_the_same_bits(layout: str, kind: str, measured) -> None:
    found = of_kind(measured(layout), kind)
    ours, theirs = found[IN_WAVES], found[SAME]
    for mine, other in zip([*ours["gradients"], ours["change"]], [*theirs["gradients"], theirs["change"]], strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in other)
    assert ours["norms"] == theirs["norms"] and all(change.any() for change in ours["change"].values())


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_the_gradient_is_that_of_the_step_that_waits_for_all(layout: str, kind: str, measured) -> None:
    found = of_kind(measured(layout), kind)
    worst = worst_gradient(found[IN_WAVES], found[WHOLE])
    print(f"{layout} {kind}: {worst:.1e} of {ROUNDING:g}")
    assert worst <= ROUNDING
    assert found[IN_WAVES]["norms"] == pytest.approx(found[WHOLE]["norms"], rel=ROUNDING)


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_it_tells_of_itself_what_that_one_tells(layout: str, kind: str, measured) -> None:
    ours, theirs = (of_kind(measured(layout), kind)[run]["metrics"] for run in (IN_WAVES, WHOLE))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(("layout", "fault"), [(layout, fault) for layout in LAYOUTS for fault in faults_of(layout)])
def test_a_fault_in_the_streaming_is_seen(layout: str, fault: str, measured) -> None:
    found = measured(layout)["apo"]
    assert not worst_gradient(found[fault], found[WHOLE]) <= 0.01


def test_replicas_call_unequally_often(measured) -> None:
    """Else the test of two replicas would not show that they may."""
    first, second = measured("dp2")["apo"][IN_WAVES]["calls"]
    assert first != second and len(first) == len(second) == 5
    assert [bool(number) for number in first] != [bool(number) for number in second]
