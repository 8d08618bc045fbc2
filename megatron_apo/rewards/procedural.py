"""Tasks that are made by a program and graded by it: those of reasoning-gym (github.com/open-thought/reasoning-gym).

    task = Task("chain_sum", {"max_terms": 3})
    entry = task.entry(17)                    # {"question", "answer", "metadata"}, always the same one
    task.score("24", entry)                   # 0 to 1, by the task's own verifier

A task never ends: entry n follows from the options, their seed and n. Needs the package reasoning-gym, of which
`ProceduralReward.version` has the version: another one may make other entries.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import lru_cache
from importlib import metadata
from types import ModuleType
from typing import Any

from megatron_apo.config import TASK
from megatron_apo.rewards import Explanation, GradeRequest, describe
from megatron_apo.rewards.text import answer_part, boxed_answer

_ENTRIES = 1000  # of one generator; some prepare all of theirs, or refuse to have more
_FORMS = ("tag", "box", "text")
ASKS = {  # what asks for an answer in such a form
    "tag": "{prompt}\nGive your final answer between <answer> and </answer>.",
    "box": "{prompt}\nPut your final answer within \\boxed{}.",
    "text": "{prompt}",
}


class Task:
    """A task by its name and options, as reasoning-gym has them; an option `seed` (0) tells series of entries apart.

    Raises `ValueError` naming `key` for a task or options that reasoning-gym does not take.
    """

    def __init__(self, name: str, options: Mapping[str, Any], key: str = "data.options"):
        self.name, self._options, self._key = name, dict(options), key
        seed = self._options.pop("seed", 0)
        if "size" in self._options:
            raise ValueError(f"{key}: size is none of {name}'s; leave it out, max_prompts says how many there are")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"{key}: seed {seed!r} is not allowed; use a whole number from 0")
        # Entry n of a generator of seed s is drawn with seed s + n: seeds far apart, so that no two series meet.
        self._first_seed = int.from_bytes(hashlib.sha256(f"{name}/{seed}".encode()).digest()[:4], "big") >> 2
        self._generator = lru_cache(maxsize=64)(self._make)
        self.entry = lru_cache(maxsize=4096)(self._entry)

    def score(self, answer: str, entry: dict[str, Any]) -> float:
        """What the task's verifier gives for an answer, 0 to 1."""
        with redirect_stdout(io.StringIO()):
            return float(self._generator(0).score_answer(answer, entry))

    def _entry(self, index: int) -> dict[str, Any]:
        """Entry `index`, from 0."""
        block, within = divmod(index, _ENTRIES)
        generator = self._generator(block)
        try:
            with redirect_stdout(io.StringIO()):
                return generator[within]
        except Exception as error:
            raise self._unfit(error) from None

    def _make(self, block: int) -> Any:
        gym, seed = _gym(f"{self._key}: {TASK}{self.name}"), self._first_seed + block * _ENTRIES
        if self.name not in gym.factory.DATASETS:
            known = ", ".join(sorted(gym.factory.DATASETS))
            raise ValueError(f"{self._key}: {TASK}{self.name} is no task of reasoning-gym; use one of {known}")
        try:
            with redirect_stdout(io.StringIO()):
                return gym.create_dataset(self.name, seed=seed, size=_ENTRIES, **self._options)
        except Exception as error:  # of the package, which checks with assert and more
            raise self._unfit(error) from None

    def _unfit(self, error: Exception) -> ValueError:
        """Of whatever the task's code raises."""
        return ValueError(
            f"{self._key}: {self._options!r} do not fit {TASK}{self.name} ({describe(error)}); see its config in "
            "reasoning-gym"
        )


class ProceduralReward:
    """What a task's own verifier gives, 0 to 1: some give a part of 1 for an answer with something right in it.

    answer: where the answer is. tag: the last <answer>...</answer> of the response, else nothing; box: its last
    \\boxed{}; text: the whole response. What is thought before a closing think tag is left out. exact: 1 for a whole 1,
    else 0. thinking: a response without that tag has no answer. The reference is what a source reasoning-gym:TASK says
    of an entry.
    """

    name = "reasoning-gym"

    def __init__(self, answer: str = "tag", exact: bool = False, thinking: bool = False):
        if answer not in _FORMS:
            raise ValueError(f"reward.options.answer: {answer!r} is not allowed; use {', '.join(_FORMS)}")
        _gym("reward.name: reasoning-gym")  # takes seconds, which are no sample's
        self._form, self._exact, self._thinking = answer, exact, thinking
        self.version = f"1 with reasoning-gym {metadata.version('reasoning-gym')}"

    def __call__(self, request: GradeRequest) -> float:
        return self.explain(request).reward

    def explain(self, request: GradeRequest) -> Explanation:
        task, entry = referenced(request.answer)
        reference = str(entry["answer"])
        text = answer_part(request.response, self._thinking)
        if text is None:
            return Explanation(0.0, reference, "", "thinking was not closed")
        answer = self._answer_in(text)
        if answer is None:
            return Explanation(0.0, reference, "", {"tag": "no <answer>", "box": "no \\boxed{}"}[self._form])
        score = task.score(answer, entry)
        return Explanation(float(score >= 1) if self._exact else score, reference, answer, f"{task.name}'s verifier")

    def _answer_in(self, text: str) -> str | None:
        if self._form == "box":
            return boxed_answer(text)
        if self._form == "tag":
            before, end, _ = text.rpartition("</answer>")
            _, start, answer = before.rpartition("<answer>")
            return answer.strip() if end and start else None
        return text.strip()


def reference_to(task: str, options: Mapping[str, Any], index: int) -> str:
    """An entry, as the reference answer that `ProceduralReward` grades against."""
    return json.dumps({"task": task, "options": dict(options), "entry": index}, sort_keys=True)


def referenced(reference: str) -> tuple[Task, dict[str, Any]]:
    """Task and entry of a reference. Raises `ValueError` for any other text."""
    try:
        tree = json.loads(reference)
        name, options, index = tree["task"], tree["options"], tree["entry"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"the reference answer {reference[:60]!r} is no entry of a task; reward reasoning-gym is for sources "
            f"{TASK}TASK"
        ) from None
    task = _task(name, json.dumps(options))
    return task, task.entry(index)


@lru_cache(maxsize=64)
def _task(name: str, options: str) -> Task:
    return Task(name, json.loads(options))


def _gym(what: str) -> ModuleType:
    """The package. Raises `ValueError` saying what needs it."""
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of a package it uses, wherever that is compiled anew
            import reasoning_gym
    except ImportError as error:
        raise ValueError(
            f"{what} needs the package reasoning-gym, which cannot be imported ({describe(error)}); install it: "
            "pip install reasoning-gym==0.1.25"
        ) from None
    return reasoning_gym
