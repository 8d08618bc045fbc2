"""What rewards make of responses, and why: one reward's verdicts, or where two of them disagree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from megatron_apo.config import RewardConfig
from megatron_apo.rewards import Explanation, GradeRequest, Reward, describe, get_reward
from megatron_apo.rewards.pool import Grade, RewardPool


@runtime_checkable
class Explains(Protocol):
    """A reward that can say what it compared."""

    def explain(self, request: GradeRequest) -> Explanation: ...


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
    """Graded in processes of their own, under the config's limits; what was graded there is then explained here."""
    reward = get_reward(config.name, config.options)
    with RewardPool(config) as pool:
        grades = pool.grade([row.request for row in rows])
    return [_explained(reward, row.request, grade) for row, grade in zip(rows, grades, strict=True)]


def _explained(reward: Reward, request: GradeRequest, grade: Grade) -> Verdict:
    if grade.failure:
        return Verdict(None, request.answer, "", grade.failure)
    if not isinstance(reward, Explains):
        return Verdict(grade.reward)
    try:
        found = reward.explain(request)
    except Exception as error:  # a user's code may raise anything
        return Verdict(grade.reward, why=f"explain: {describe(error)}")
    return Verdict(grade.reward, found.reference, found.answer, found.why)


def cross_table(one: Sequence[Verdict], other: Sequence[Verdict]) -> dict[tuple[str, str], int]:
    """How often both said what."""
    return dict(Counter((a.word, b.word) for a, b in zip(one, other, strict=True)))
