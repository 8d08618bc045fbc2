"""What rewards make of responses, and why: one reward's verdicts, or where two of them disagree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_apo.config import RewardConfig
from megatron_apo.rewards import GradeRequest
from megatron_apo.rewards.pool import Grade, RewardPool


@dataclass(frozen=True)
class Row:
    """where: the row's place in its file, or prompt and sample."""

    where: str
    request: GradeRequest


@dataclass(frozen=True)
class Verdict:
    """reward: None where there is none, as `why` says. reference, answer: what was compared, where that is told."""

    reward: float | None
    reference: str = ""
    answer: str = ""
    why: str = ""

    @property
    def word(self) -> str:
        if self.reward is None:
            return "failed"
        return {1.0: "right", 0.0: "wrong"}.get(self.reward, f"{self.reward:g}")


def verdicts(config: RewardConfig, rows: Sequence[Row]) -> list[Verdict]:
    """Graded and explained in processes of their own, under the config's limits."""
    with RewardPool(config) as pool:
        grades = pool.grade([replace(row.request, grader=0, is_explained=True) for row in rows])
    return [_verdict(row.request, grade) for row, grade in zip(rows, grades, strict=True)]


def _verdict(request: GradeRequest, grade: Grade) -> Verdict:
    if grade.failure:
        return Verdict(None, request.answer, "", grade.failure)
    if grade.explanation is None:
        return Verdict(grade.reward)
    return Verdict(grade.reward, grade.explanation.reference, grade.explanation.answer, grade.explanation.why)


def cross_table(one: Sequence[Verdict], other: Sequence[Verdict]) -> dict[tuple[str, str], int]:
    """How often both said what."""
    return dict(Counter((a.word, b.word) for a, b in zip(one, other, strict=True)))
