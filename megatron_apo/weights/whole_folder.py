"""Output folders that appear whole, on disk, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_apo.runtime.collective import on_driver
from megatron_apo.runtime.topology import Topology


def check_empty(out: Path, key: str = "output folder") -> None:
    """Raise a ValueError if `out`, a folder to be written, is there and not empty, or is a file. `key` names it."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{key}: {out} is not empty; give a new folder")


def leftover(out: Path) -> Path:
    """Where `out` grows, and what a killed job leaves of it."""
    return out.resolve().with_name(f".{out.resolve().name}.partial")


@contextmanager
def whole_folder(out: Path, topology: Topology | None = None) -> Iterator[Path]:
    """Yields an empty folder to fill, by every rank. At the end of the block it becomes `out`, forced to disk; after an
    error it is removed. Collective over `topology`; None: this process alone. What a killed job has left of it is
    removed by the next that writes `out`."""
    out = out.resolve()
    partial = leftover(out)
    made = [folder for folder in out.parents if not folder.exists()]
    once = (lambda work: on_driver(topology, work)) if topology else (lambda work: work())

    def begin() -> None:
        check_empty(out)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if out.exists():
            out.rmdir()  # which a mount point refuses: before any work

    def publish() -> None:
        for path in [*partial.rglob("*"), partial]:
            _to_disk(path)
        os.rename(partial, out)
        _to_disk(out.parent)

    try:
        once(begin)
        yield partial
        once(publish)
    except BaseException:
        if topology is None or topology.is_driver:
            shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):
                for folder in made:
                    folder.rmdir()
        raise


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
