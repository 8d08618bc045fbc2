"""Grader of the arithmetic task: `<think>47+8=55;55+5=60</think>60`."""

from __future__ import annotations

from megatron_apo.rewards import GradeRequest
from megatron_apo.rewards.text import CLOSING_TAG


class ArithmeticReward:
    """1 if what follows the closing think tag is exactly the answer, else 0. An unfinished response is wrong."""

    name = "arithmetic"
    version = "1"

    def __call__(self, request: GradeRequest) -> float:
        if request.finish_reason == "length":
            return 0.0
        _, tag, answer = request.response.partition(CLOSING_TAG)
        return float(bool(tag) and answer == request.answer)
