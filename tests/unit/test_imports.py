"""Importing the package, its recipe and its command line stays light."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "vllm", "transformer_engine", "megatron", "transformers", "datasets", "matplotlib", "pyarrow"}


@pytest.mark.parametrize("module", ["megatron_apo", "megatron_apo.config", "megatron_apo.cli", "megatron_apo.doctor"])
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    )
    assert "megatron_apo" in loaded
    assert loaded & HEAVY == set()


def test_a_launcher_checks_stage_2_without_megatron_core() -> None:
    """It is imported in the ranks alone, seconds for each process."""
    modules = "sys, megatron_apo.stages.start, megatron_apo.stages.curriculum"
    code = f"import {modules}; print('megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"
