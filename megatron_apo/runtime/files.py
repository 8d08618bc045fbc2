"""Files that are there whole or not at all. Standard library only."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file; whoever reads it meanwhile, or after a kill, finds what was there before. Several may write it at
    once: it is one of theirs."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    partial.write_text(text)
    os.replace(partial, path)
