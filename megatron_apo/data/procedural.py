"""Rows of a task that is made by a program (`rewards/procedural.py`): as many as are asked for, none of them twice.

Its questions are shared out by their hash: one in eight is held out, the others are for training. So whatever seeds and
numbers a recipe has, no question is in both parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from megatron_apo.config import TASK
from megatron_apo.rewards.procedural import Task, reference_to

Part = Literal["train", "eval"]
_HELD_OUT_OF = 8
# Entries in a row without a new question of the part, for each that it has and for all: were there one more, as likely
# as the others, one time in thousands it would not have come.
_MOST_IDLE: dict[Part, int] = {"train": 10, "eval": 64}
_MORE = 2048

QUESTION, ANSWER, ENTRY = "prompt", "answer", "entry"  # columns; an answer is text, or null where there are several


def rows_of_task(
    name: str, options: Mapping[str, Any], part: Part, count: int, key: str, options_key: str
) -> Iterator[dict[str, Any]]:
    """`count` rows of a part. Raises `ValueError` naming the recipe's key for a task or options that are not there, and
    for a task that has fewer questions."""
    task, questions, index, idle = Task(name, options, options_key), set[str](), 0, 0
    while len(questions) < count:
        if idle > _MOST_IDLE[part] * len(questions) + _MORE:
            raise ValueError(
                f"{key}: {count}, but {TASK}{name} with these options has {len(questions)} different questions "
                f"{'held out' if part == 'eval' else 'for training'} among {index}; ask for at most {len(questions)}, "
                "or give options with more"
            )
        entry = task.entry(index)
        question = entry["question"]
        if part_of(question) == part and question not in questions:
            questions.add(question)
            idle = 0
            yield {QUESTION: question, ANSWER: entry["answer"], ENTRY: reference_to(name, options, index)}
        index, idle = index + 1, idle + 1


def part_of(question: str) -> Part:
    """The part that a question is in."""
    return "eval" if hashlib.sha256(question.encode()).digest()[0] % _HELD_OUT_OF == 0 else "train"
