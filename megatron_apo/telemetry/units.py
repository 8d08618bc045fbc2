"""Quantities and lists as a person reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NAMED = 8  # names in one error
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def duration(seconds: float) -> str:
    """ "8.4 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def one_line(error: Exception) -> str:
    """An error's text, cut to what a line holds; its type where it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def number(count: int) -> str:
    """ "12,345"."""
    return f"{count:,}"


def with_error(value: float, error: float | None) -> str:
    """ "0.531 +- 0.012"; the value alone where no error could be estimated."""
    return f"{value:.3f}" if error is None else f"{value:.3f} +- {error:.3f}"


def data_size(num_bytes: float) -> str:
    """ "3.2 MB", "1.20 GB" (powers of ten)."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def parse_size(text: str, key: str) -> int:
    """ "5GB", "500 MiB", "100000" in bytes. Raises a ValueError that names `key`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?", text.strip().upper())
    if not match or not (size := int(float(match[1]) * _UNITS[match[2]])):
        raise ValueError(f"{key}: {text!r} is not a size; write it as 5GB or 500MiB")
    return size
