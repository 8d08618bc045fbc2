"""Quantities as a person reads them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """ "8.4 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def with_error(value: float, error: float | None) -> str:
    """ "0.531 +- 0.012"; the value alone where no error could be estimated."""
    return f"{value:.3f}" if error is None else f"{value:.3f} +- {error:.3f}"


def data_size(num_bytes: float) -> str:
    """ "3.2 MB", "1.20 GB" (powers of ten)."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
