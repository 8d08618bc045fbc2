"""JSON files of a Hugging Face folder, which may hold anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_apo.telemetry.units import one_line


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, in one line, for a file that holds none."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not JSON ({one_line(error)}); write it again") from None
    except RecursionError:
        raise ValueError(f"{path}: not JSON that can be read (nested too deeply); write it again") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds {shown(tree)}, not an object; write it again")
    return tree


def shown(value: object) -> str:
    """A value as JSON has it, cut to what a line holds."""
    return cut(json.dumps(value))


def cut(text: object, most: int = 80) -> str:
    """A text as one line of at most about `most` characters, which any terminal shows as they are."""
    line = " ".join(str(text).split())
    line = line if len(line) <= most else line[:most] + ".."
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)
