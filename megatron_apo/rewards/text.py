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


_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BETWEEN = re.compile(r"\$|\\[()\[\]]|\\(?:quad|qquad|,|;| )|\\(?:text|mbox|mathrm)(?=\{)|[{}\s]")
_JOINED = re.compile(r"(,|;|,?(?:and|or))(?:[A-Za-z](?:_\w+)?=)?[-\u2212]?")
_MOST_BOXES, _NEAR = 64, 40  # characters before a box in which its name is
_NAMED = re.compile(r"(?:^|[\s$(,])([A-Za-z](?:_\{?\w+\}?)?)\s*=\s*\$?\s*$")


def boxed_answer(solution: str, together: bool = False) -> str | None:
    """What the last \\boxed{...} or \\fbox{...} of a solution holds, also the 5 of `\\boxed 5$`.

    together: with those before it that only a comma, `and` or `or` parts from it, as a list: `\\boxed{2}` and
    `\\boxed{3}` are 2, 3, and `a=\\boxed{2}, b=\\boxed{3}` are a=2, b=3.
    """
    openings = list(_BOX.finditer(solution))[-_MOST_BOXES:]
    if not openings:
        return None
    content, _ = _box(solution, openings[-1].end())
    if content is None:
        return None
    found, start = [_signed(content, solution, openings[-1].start())], openings[-1].start()
    if not together:
        return found[0]
    names, are_alternatives = [_NAMED.search(_before(solution, start))], False
    for opening in reversed(openings[:-1]):
        content, end = _box(solution, opening.end())
        joint = _JOINED.fullmatch(_BETWEEN.sub("", solution[end:start])) if end <= start else None
        if content is None or joint is None:
            break
        are_alternatives = are_alternatives or "or" in joint[1]
        start = opening.start()
        found.append(_signed(content, solution, start))
        names.append(_NAMED.search(_before(solution, start)))
    if len(set(found)) == 1:
        return found[0]
    are_named = all(names) and len({name[1] for name in names if name}) == len(names)
    parts = [f"{name[1]}={part}" if are_named and name else part for name, part in zip(names, found, strict=True)]
    return (r" \text{ or } " if are_alternatives else ", ").join(reversed(parts))


def _before(solution: str, start: int) -> str:
    return solution[max(0, start - _NEAR) : start]


def _signed(content: str, solution: str, start: int) -> str:
    """With a minus that belongs to the box: behind =, $ or (, and not a dash or a bullet."""
    is_minus = re.search(r"[=$(]\s*[-\u2212]\s*$|(?:^|\s)[-\u2212]\$?$", _before(solution, start))
    return f"-{content}" if is_minus else content


def _box(solution: str, start: int) -> tuple[str | None, int]:
    """What the box whose brace is at `start` holds, and where it ends."""
    rest = solution[start:]
    if not rest.startswith("{"):
        bare = re.split(r"[\s$]", rest, maxsplit=1)[0]
        return bare or None, start + len(bare)
    end = closing_brace(rest)
    if end >= 0:
        return rest[1:end].strip() or None, start + end + 1
    return None, len(solution)


def closing_brace(text: str) -> int:
    """Where the brace is closed that `text` begins with; -1 if it is not. An escaped brace neither opens nor closes."""
    depth = 0
    for token in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.start()
    return -1
