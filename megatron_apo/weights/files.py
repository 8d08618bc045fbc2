"""files.json: size and sha256 of every other file of a checkpoint's folder, by which damage is seen.

Torch and Megatron-Core compare no checksum when they read: what flipped bits make of a weight would be trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Mapping
from pathlib import Path

LIST = "files.json"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read."""


def write_list(folder: Path, known: Mapping[str, str]) -> None:
    """List what is in `folder`. known: the sha256 of files that need not be read again."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != LIST)
    names = {str(path.relative_to(folder)): path for path in paths}
    listed = {
        name: {"bytes": path.stat().st_size, "sha256": known.get(name) or _sha256(path)} for name, path in names.items()
    }
    (folder / LIST).write_text(json.dumps(listed, indent=1) + "\n")


def read_list(folder: Path) -> dict[str, tuple[int, str]]:
    """{name: (bytes, sha256)}; nothing where there is no list, as in folders of before. Raises `CheckpointError`."""
    path = folder / LIST
    try:
        return {name: (int(one["bytes"]), str(one["sha256"])) for name, one in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder}: {LIST} is damaged") from None


def check_files(folder: Path, listed: Mapping[str, tuple[int, str]], hashed: Container[str]) -> None:
    """Raise `CheckpointError`, in one line, for the first listed file that is missing or of another size, or of those
    `hashed` one of other content."""
    for name, (num_bytes, digest) in listed.items():
        path = folder / name
        try:
            found = path.stat().st_size
            same = found == num_bytes and (name not in hashed or _sha256(path) == digest)
        except OSError as error:
            what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            raise CheckpointError(f"{folder}: {name} {what}") from None
        if found != num_bytes:
            raise CheckpointError(f"{folder}: {name} has {found} bytes, and was written with {num_bytes}")
        if not same:
            raise CheckpointError(f"{folder}: {name} is damaged, its sha256 is not that of what was written")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
