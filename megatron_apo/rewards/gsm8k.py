"""Grader of GSM8K: the number after `####`."""

from __future__ import annotations

import re
from decimal import Decimal

from megatron_apo.rewards import GradeRequest
from megatron_apo.rewards.text import answer_part

_MARK = "####"
# 18, -5, $1,800, 3.50, .5 and the 18 of "18."; not the 1 of 1/2, nor a part of 1,80 or 1e9.
_NUMBER = re.compile(
    r"(?<![\w.,/])(-?)\s*\$?\s*(-?)(\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))((?:\.\d+)?)(?![\d/^]|[,.]\d|[eE][-+]?\d)"
)
_DECORATION = re.compile(r"[\s*_`~$\\({\[]*(?:boxed|text)?[\s*_`~$({\[]*")  # of markdown and LaTeX


class Gsm8kReward:
    """1 if the response's number equals the reference's, else 0.

    The reference is the number after `####` in the dataset's answer column (or a bare number). strict: the response
    must mark its number with `####` too, and the last mark counts; otherwise its last number counts. thinking: a
    response without a closing think tag is wrong. Raises `ValueError` for a reference without a number.
    """

    name = "gsm8k"
    version = "2"

    def __init__(self, strict: bool = True, thinking: bool = False):
        self.strict, self.thinking = strict, thinking

    def __call__(self, request: GradeRequest) -> float:
        reference = _first_number(request.answer.rpartition(_MARK)[2])
        if reference is None:
            raise ValueError(f"no number after #### in the reference answer {request.answer[-60:]!r}")
        text = answer_part(request.response, self.thinking)
        if text is None:
            return 0.0
        _, mark, marked = text.rpartition(_MARK)
        number = _first_number(marked) if mark else None if self.strict else _last_number(text)
        return float(number == reference)


def _first_number(text: str) -> Decimal | None:
    """The number that begins the first line of `text`, decoration (spaces, markdown, $) aside."""
    line = text.strip().partition("\n")[0]
    match = _NUMBER.match(_DECORATION.sub("", line, count=1))
    return _value(match) if match else None


def _last_number(text: str) -> Decimal | None:
    matches = list(_NUMBER.finditer(text))
    return _value(matches[-1]) if matches else None


def _value(match: re.Match[str]) -> Decimal:
    sign, inner_sign, whole, fraction = match.groups()
    return Decimal(f"{sign or inner_sign}{whole.replace(',', '')}{fraction}")
