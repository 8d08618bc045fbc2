"""Which part of a response is its answer."""

from __future__ import annotations

import re

from megatron_apo.rewards import GradeRequest

OPENING_TAG, CLOSING_TAG = "<think>", "</think>"


def answer_part(response: str, thinking: bool) -> str | None:
    """The text after the last closing think tag; without one, all of it, or None if `thinking` says there must be one.

    The opening tag is not looked for: some chat templates put it at the end of the prompt.
    """
    _, tag, answer = response.rpartition(CLOSING_TAG)
    return None if thinking and not tag else answer


def thinking_is_unfinished(request: GradeRequest) -> bool:
    """Thinking was opened, by the response, at the prompt's end or as asked for, and not closed after that."""
    text = request.response
    if request.asks_to_think or request.prompt.rstrip().endswith(OPENING_TAG):
        text = OPENING_TAG + text
    return text.rfind(OPENING_TAG) > text.rfind(CLOSING_TAG)


def boxed_answer(solution: str) -> str | None:
    """What the last \\boxed{...} or \\fbox{...} of a solution holds, also the 5 of `\\boxed 5$`."""
    openings = list(re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])\s*", solution))
    if not openings:
        return None
    rest = solution[openings[-1].end() :]
    if not rest.startswith("{"):
        return re.split(r"[\s$]", rest, maxsplit=1)[0] or None
    depth = 0
    for token in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # an escaped brace neither opens nor closes
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0 and token[0] == "}":
            return rest[1 : token.start()].strip() or None
    return None
