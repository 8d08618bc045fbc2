"""Which part of a response is its answer."""

from __future__ import annotations

OPENING_TAG, CLOSING_TAG = "<think>", "</think>"


def answer_part(response: str, thinking: bool) -> str | None:
    """The text after the last closing think tag; without one, all of it, or None if `thinking` says there must be one.

    The opening tag is not looked for: some chat templates put it at the end of the prompt.
    """
    _, tag, answer = response.rpartition(CLOSING_TAG)
    return None if thinking and not tag else answer


def thinking_is_unfinished(prompt: str, response: str) -> bool:
    """Thinking was opened, by the response or at the prompt's end, and not closed after that."""
    text = OPENING_TAG + response if prompt.rstrip().endswith(OPENING_TAG) else response
    return text.rfind(OPENING_TAG) > text.rfind(CLOSING_TAG)
