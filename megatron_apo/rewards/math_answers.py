"""Grader of mathematics: the boxed answer against the reference's (`answers/`)."""

from __future__ import annotations

from functools import cached_property, lru_cache
from importlib.metadata import version
from typing import Literal, get_args

from megatron_apo.rewards import Explanation, GradeRequest
from megatron_apo.rewards.answers.forms import Form, Items
from megatron_apo.rewards.answers.reading import read
from megatron_apo.rewards.answers.same import same
from megatron_apo.rewards.answers.values import by_math_verify, math_verify
from megatron_apo.rewards.answers.writing import tidy
from megatron_apo.rewards.text import CLOSING_TAG, answer_part, boxed_answer

MAX_CHARACTERS = 2000  # of an answer
Boxes = Literal["together", "last"]


class MathReward:
    """1 if the response's answer equals the reference mathematically, else 0.

    boxed: only what is boxed counts; else math-verify looks for any final expression. boxes: "together" takes the last
    box with those that it is listed with, "last" it alone. thinking: a response without a closing think tag is wrong.
    The reference is a LaTeX expression, or a solution with a box. Raises `ValueError` for a reference that is empty,
    since everything would then be graded wrong.
    """

    name = "math"

    def __init__(self, boxed: bool = True, thinking: bool = False, boxes: Boxes = "together"):
        if boxes not in get_args(Boxes):
            raise ValueError(f"reward.options.boxes: {boxes!r} is not known; use {' or '.join(get_args(Boxes))}")
        self.boxed, self.thinking, self.together = boxed, thinking, boxes == "together"
        # Imports sympy and builds the LaTeX parser now, where no sample's time limit runs.
        self(GradeRequest("", f"{CLOSING_TAG}\\boxed{{\\sqrt{{2}}}}", "\\frac{1}{\\sqrt{2}}", "stop"))

    @cached_property
    def version(self) -> str:
        return f"3 (math-verify {version('math-verify')})"

    def __call__(self, request: GradeRequest) -> float:
        return self.explain(request).reward

    def explain(self, request: GradeRequest) -> Explanation:
        text = answer_part(request.response, self.thinking)
        written, reference, form = _read_reference(request.answer, self.together)
        if text is None:
            return Explanation(0.0, reference, "", "thinking was not closed")
        if not self.boxed:
            return Explanation(float(_found_anywhere(reference, text)), reference, text[-200:], "math-verify")
        boxed = boxed_answer(text, self.together)
        if boxed and len(boxed) > MAX_CHARACTERS:
            return Explanation(0.0, reference, boxed[:80], "too long")
        if not boxed or not (answer := tidy(boxed)):
            return Explanation(0.0, reference, "", "nothing is boxed")
        if answer == reference:
            return Explanation(1.0, reference, answer, "written alike")
        its = read(answer)
        if isinstance(form, Items) and not isinstance(its, Items):  # 101,102,103
            its = read(answer := tidy(boxed, joins_thousands=False))
        elif isinstance(its, Items) and not isinstance(form, Items):
            form = read(tidy(written, joins_thousands=False))
        kinds = [type(one).__name__.lower() for one in (form, its)]
        return Explanation(float(same(form, its)), reference, answer, " and ".join(dict.fromkeys(kinds)))


@lru_cache(maxsize=4096)
def _read_reference(answer: str, together: bool) -> tuple[str, str, Form]:
    """As it is written, tidied, and read."""
    written = boxed_answer(answer, together) or answer
    if len(written) > MAX_CHARACTERS:
        raise ValueError(f"the reference answer has {len(written)} characters, and {MAX_CHARACTERS} are read")
    if not (text := tidy(written)):
        raise ValueError(f"no answer in the reference {answer[-60:]!r}")
    return written, text, read(text)


def _found_anywhere(reference: str, text: str) -> bool:
    module = math_verify()
    config = [module.LatexExtractionConfig(boxed_match_priority=0), module.ExprExtractionConfig()]
    found = [module.parse(one, config, parsing_timeout=None) for one in (f"\\boxed{{{reference}}}", text)]
    return by_math_verify(*found)
