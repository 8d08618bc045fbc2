"""What rewards make of responses, and why: one reward's verdicts, or where two of them disagree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_apo.config import GraderConfig, RewardConfig
from megatron_apo.rewards import GradeRequest
from megatron_apo.rewards.pool import Grade, RewardPool


@dataclass(frozen=True)
class Row:
    """where: the row's place in its file, or prompt and sample."""

    where: str
    request: GradeRequest


@dataclass(frozen=True)
class Verdict:
    """reward: None where there is none, as `why` says. reference, answer: what was compared; answer is None where that
    is not told."""

    reward: float | None
    reference: str = ""
    answer: str | None = None
    why: str = ""

    @property
    def word(self) -> str:
        if self.reward is None:
            return "failed"
        return {1.0: "right", 0.0: "wrong"}.get(self.reward, f"{self.reward:g}")


def verdicts(config: RewardConfig, rows: Sequence[Row], graders: Sequence[GraderConfig] | None = None) -> list[Verdict]:
    """Graded and explained in processes of their own, under the config's limits. graders: what the requests' own count;
    none: the config's reward grades all."""
    requests = [row.request if graders else replace(row.request, grader=0) for row in rows]
    with RewardPool(config, graders) as pool:
        grades = pool.explain(requests, pool.grade(requests))
    return [_verdict(row.request, grade) for row, grade in zip(rows, grades, strict=True)]


def _verdict(request: GradeRequest, grade: Grade) -> Verdict:
    if grade.failure:
        return Verdict(None, request.answer, None, grade.failure)
    if grade.explanation is None:
        return Verdict(grade.reward, why=grade.unexplained)
    return Verdict(grade.reward, grade.explanation.reference, grade.explanation.answer, grade.explanation.why)


def cross_table(one: Sequence[Verdict], other: Sequence[Verdict]) -> dict[tuple[str, str], int]:
    """How often both said what."""
    return dict(Counter((a.word, b.word) for a, b in zip(one, other, strict=True)))
