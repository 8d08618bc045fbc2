"""Which part of a response is its answer."""

from __future__ import annotations

CLOSING_TAG = "</think>"


def answer_part(response: str, thinking: bool) -> str | None:
    """The text after the last closing think tag; without one, all of it, or None if `thinking` says there must be one.

    The opening tag is not looked for: some chat templates put it at the end of the prompt.
    """
    _, tag, answer = response.rpartition(CLOSING_TAG)
    return None if thinking and not tag else answer
