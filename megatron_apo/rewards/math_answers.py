"""Grader of mathematics: the boxed answer, compared by math-verify (https://github.com/huggingface/Math-Verify)."""

from __future__ import annotations

import logging
from functools import cached_property, lru_cache
from importlib.metadata import version
from typing import Any

from megatron_apo.rewards import GradeRequest
from megatron_apo.rewards.text import CLOSING_TAG, answer_part, boxed_answer


class MathReward:
    """1 if the response's answer equals the reference mathematically, else 0.

    boxed: only the last \\boxed{...} of the response counts, alone; else math-verify looks for any final expression.
    thinking: a response without a closing think tag is wrong. The reference is a LaTeX expression, or a solution with a
    box. Raises `ValueError` for a reference that cannot be parsed, since everything would then be graded wrong.
    """

    name = "math"

    def __init__(self, boxed: bool = True, thinking: bool = False):
        self.boxed, self.thinking = boxed, thinking
        self._parse_reference = lru_cache(maxsize=4096)(self._parse_reference)  # type: ignore[method-assign]
        # Imports sympy and builds the LaTeX parser now, where no sample's time limit runs.
        self(GradeRequest("", f"{CLOSING_TAG}\\boxed{{\\frac12}}", "0.5", "stop"))

    @cached_property
    def version(self) -> str:
        return f"2 (math-verify {version('math-verify')})"

    def __call__(self, request: GradeRequest) -> float:
        text = answer_part(request.response, self.thinking)
        if text is not None and self.boxed:
            text = _in_a_box(boxed_answer(text))
        if text is None:
            return 0.0
        reference = self._parse_reference(request.answer)
        # No time limit of its own, here and in `_parse`: it is an alarm signal, and the pool kills what takes too long.
        return float(_math_verify().verify(reference, _parse(text), timeout_seconds=None))

    def _parse_reference(self, answer: str) -> list[Any]:
        text = _in_a_box(boxed_answer(answer) or answer)
        parsed = _parse(text) if text else []
        if not parsed:
            raise ValueError(f"math-verify cannot parse the reference answer {answer[-60:]!r}")
        return parsed


def _in_a_box(expression: str | None) -> str | None:
    return f"\\boxed{{{expression}}}" if expression else None


def _parse(text: str) -> list[Any]:
    module = _math_verify()
    config = [module.LatexExtractionConfig(boxed_match_priority=0), module.ExprExtractionConfig()]
    return module.parse(text, extraction_config=config, parsing_timeout=None)


@lru_cache(maxsize=1)
def _math_verify() -> Any:
    import math_verify  # sympy: 0.3 s, for those who grade with it

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limit is off
    return math_verify
