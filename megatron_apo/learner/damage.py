"""Is a run's newest checkpoint whole? What is wrong with it, and how the run goes on without it. Nothing is removed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_apo.weights.files import CheckpointError, check_files, read_list

if TYPE_CHECKING:
    from megatron_apo.runtime.topology import Topology

_STEP_NAME = re.compile(r"step-(\d{6,})")
_TENSORS = ".distcp"


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be taken up: one line, with the way out."""


def saved(run_dir: Path) -> dict[int, Path]:
    """A run's complete checkpoints by step, ascending."""
    found = (run_dir / "checkpoints").glob("*")
    return dict(sorted((int(match[1]), path) for path in found if (match := _STEP_NAME.fullmatch(path.name))))


@contextmanager
def naming_way_out(folder: Path) -> Iterator[None]:
    """Within: what cannot be read of a run's checkpoint raises `DamagedCheckpoint`."""
    try:
        yield
    except (ValueError, CheckpointError) as error:
        before = [path for path in saved(folder.parents[1]).values() if path.name != folder.name]
        then = f"goes on from {before[-1].name}" if before else "begins with its first step"
        what = " ".join(str(error).split())
        raise DamagedCheckpoint(f"{what}; move {folder.name} out of {folder.parent}, then the run {then}") from error


def check_small_files(folder: Path) -> None:
    """Raise `CheckpointError` for what shows at once: names and sizes of files, and content where it is no tensors."""
    listed = read_list(folder)
    check_files(folder, listed, {name for name in listed if not name.endswith(_TENSORS)})


def check_tensors(folder: Path, topology: Topology) -> None:
    """Raise `CheckpointError` on every rank where a file with tensors is damaged. Collective: each rank reads some."""
    import torch.distributed as dist

    problem = None
    try:
        listed = {name: one for name, one in read_list(folder).items() if name.endswith(_TENSORS)}
        largest_first = sorted(listed, key=lambda name: (-listed[name][0], name))
        check_files(folder, listed, set(largest_first[topology.rank :: topology.world_size]))
    except CheckpointError as error:
        problem = str(error)
    told: list[str | None] = [None] * topology.world_size
    dist.all_gather_object(told, problem)
    if first := next(filter(None, told), None):
        raise CheckpointError(first)
