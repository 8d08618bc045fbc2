"""SmolLM2-135M-Instruct, made once; where it cannot be downloaded, these tests are skipped, and in CI fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
MAKE = ROOT / "launch" / "smollm2.py"
MODEL = ROOT / "runs" / "models" / "SmolLM2-135M-Instruct"
UNREACHABLE = 69  # MAKE's status where the registry is not reached, or does not have it


def make(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(MAKE), *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL
    )


@pytest.fixture(scope="session")
def model() -> Path:
    """The Hugging Face folder, in fp32: where launch/smollm2.sh puts it."""
    made = make()
    if made.returncode == UNREACHABLE and os.environ.get("CI") != "true":
        pytest.skip(made.stderr.strip().splitlines()[-1])
    assert made.returncode == 0, made.stderr
    return MODEL


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> Iterator[None]:
    """Other tests leave torch one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
