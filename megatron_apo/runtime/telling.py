"""What a command says once, whichever of its processes come to it. Standard library only."""

from __future__ import annotations

import hashlib
import os

_TOLD = "MEGATRON_APO_TOLD"  # hashes of lines, which processes that are started inherit


def tell_once(line: str | None) -> None:
    """Print a line, if there is one, unless this process or one that it descends from has."""
    if line is None:
        return
    told, mark = os.environ.get(_TOLD, "").split(), hashlib.sha256(line.encode()).hexdigest()[:16]
    if mark not in told:
        os.environ[_TOLD] = " ".join([*told, mark])
        print(line, flush=True)
