"""Grader of GSM8K: the number after `####`."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

from megatron_apo.rewards import Explanation, GradeRequest
from megatron_apo.rewards.text import answer_part

_MARK = "####"
# 18, -5, +3, $1,800, 3.50, .5, 1/2, 2 1/4 and the 18 of "18."; not a part of 1,80, 1e9, 5-6 or 2 x 3.
_SIGN, _WHOLE = r"[-+\u2212]", r"\d{1,3}(?:,\d{3})+|\d+"
_NUMBER = re.compile(
    rf"(?<![\w.,/:\u2013])(?<!\d[-\u2212])({_SIGN}?)\s*[$€£¥]?\s*({_SIGN}?)"
    rf"(?:({_WHOLE})\s+(?=\d+/))?({_WHOLE}|(?=\.\d))((?:\.\d+)?)(?:/(\d+)(?![./]\d))?"
    r"(?![\d/^:]|[,.]\d|[eE][-+]?\d|\s*[-+\u2212\u2013*×÷x·]\s*[\d$]|(?:\\[,!; ]|\{,\}|~|\s)+\d"
    r"|\s*(?:\\(?:times|cdot|div|d?frac|pi|sqrt)|[½¼¾⅓⅔π√]|[kKM]\b|(?:hundred|thousand|million|billion|trillion|dozen)s?\b)"
    r"|[^\n.]{0,40}\b(?:or|to|and|out of)\s+\$?\d)"
)
_LONGEST = 300  # characters of a number
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?![\d:])")
_PLAIN = re.compile(r"\s*(-?\d{1,300})\s*$")  # most of them
_DECORATION = re.compile(r"[\s*_`~$\\({\[]*(?:boxed|text)?[\s*_`~$({\[]*")  # of markdown and LaTeX
_Found = Decimal | Fraction | int | str


class Gsm8kReward:
    """1 if the response's number equals the reference's, else 0.

    The reference is the number after `####` in the dataset's answer column (or a bare number). strict: the response
    must mark its number with `####` too, and the last mark counts; otherwise its last number counts. Of `24 - 3 = 21`
    it is 21; `5-6`, `2 x 3` and `1e9` are no number; 5:30 is a time of day. thinking: a response without a closing
    think tag is wrong. Raises `ValueError` for a reference without a number.
    """

    name = "gsm8k"
    version = "3"

    def __init__(self, strict: bool = True, thinking: bool = False):
        self.strict, self.thinking = strict, thinking

    def __call__(self, request: GradeRequest) -> float:
        reference, found = self._compared(request)
        return float(found == reference)

    def explain(self, request: GradeRequest) -> Explanation:
        reference, found = self._compared(request)
        if answer_part(request.response, self.thinking) is None:
            why = "thinking was not closed"
        else:
            why = "numbers" if found is not None else "no number after ####" if self.strict else "no number"
        return Explanation(float(found == reference), str(reference), "" if found is None else str(found), why)

    def _compared(self, request: GradeRequest) -> tuple[_Found, _Found | None]:
        reference = _reference(request.answer)
        text = answer_part(request.response, self.thinking)
        if text is None:
            return reference, None
        _, mark, marked = text.rpartition(_MARK)
        return reference, _first_number(marked) if mark else None if self.strict else _last_number(text)


@lru_cache(maxsize=65536)
def _reference(answer: str) -> _Found:
    found = _first_number(answer.rpartition(_MARK)[2])
    if found is None:
        raise ValueError(f"no number after #### in the reference answer {answer[-60:]!r}")
    return found


def _first_number(text: str) -> _Found | None:
    """The number, or time of day, that begins the first line of `text`, decoration (spaces, markdown, $) aside; of a
    calculation its outcome."""
    if plain := _PLAIN.match(text):
        return int(plain[1])
    line = text.strip().partition("\n")[0]
    if "=" in line:
        if re.search(r",\s*\w+\s*=", line):
            return None  # of several
        line = re.split(r"=(?=[^=]*\d)", line)[-1]
    line = _DECORATION.sub("", line, count=1)
    if ":" in line and (clock := _CLOCK.match(line)):
        return f"{int(clock[1])}:{clock[2]}"
    match = _NUMBER.match(line)
    return _value(match) if match else None


def _last_number(text: str) -> _Found | None:
    matches = list(_NUMBER.finditer(" ".join(text.split())))
    return _value(matches[-1]) if matches else None


def _value(match: re.Match[str]) -> Decimal | Fraction | None:
    sign, inner_sign, whole, number, fraction, below = match.groups()
    if len(match[0]) > _LONGEST:
        return None
    value: Decimal | Fraction = Decimal(f"{number.replace(',', '')}{fraction}")
    if below is not None:
        if not int(below):
            return None
        value = Fraction(value) / int(below) + int((whole or "0").replace(",", ""))
    return value if (sign or inner_sign) in ("", "+") else -value
