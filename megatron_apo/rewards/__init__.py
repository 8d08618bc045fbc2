"""Rewards: what a grader sees, what it is, and how it is found by name.

A reward is one object for both stages; its name, version and options are part of the V* store's fingerprint. Give
`reward.name` a registered name, or `my_module:MyReward` for a class (called with `reward.options`) of your own:

    class MyReward:
        name, version = "my_reward", "1"
        def __call__(self, request: GradeRequest) -> float: ...
        def explain(self, request: GradeRequest) -> Explanation: ...   # if it can: what it compared, for people

Importing this package is light. A reward is imported where it grades, in processes of its own (`pool.py`), and once in
each command that has to know its version.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class GradeRequest:
    """One sample. Only `response` is judged: the prompt may hold worked answers of its own."""

    prompt: str
    response: str
    answer: str  # the dataset's answer column
    finish_reason: str  # "stop" | "length"
    asks_to_think: bool = False  # data.thinking: the answer follows a closing think tag
    grader: int = 0  # which of the pool's, where sources have graders of their own
    is_explained: bool = False  # what was compared is to be told in place of a grade, if the reward can


@dataclass(frozen=True)
class Explanation:
    """reference, answer: what was compared, of the reference and of the response; empty where nothing was found there.
    why: how they were compared, or why not."""

    reward: float
    reference: str
    answer: str
    why: str


@runtime_checkable
class Reward(Protocol):
    """A grader. A change of what it returns needs a new `version`."""

    name: str
    version: str

    def __call__(self, request: GradeRequest) -> float: ...


@runtime_checkable
class Explains(Protocol):
    """A reward that can say what it compared."""

    def explain(self, request: GradeRequest) -> Explanation: ...


_TARGETS = {
    "arithmetic": "megatron_apo.rewards.arithmetic:ArithmeticReward",
    "gsm8k": "megatron_apo.rewards.gsm8k:Gsm8kReward",
    "math": "megatron_apo.rewards.math_answers:MathReward",
    "reasoning-gym": "megatron_apo.rewards.procedural:ProceduralReward",
}


def register_reward(name: str, target: str) -> None:
    """Let `name` stand for `target`, a `module:attribute`. Raises `ValueError` if the name is taken."""
    if _TARGETS.setdefault(name, target) != target:
        raise ValueError(f"reward.name: {name!r} is already {_TARGETS[name]}; choose another name")


def reward_target(name: str) -> str:
    """The `module:attribute` that `name` stands for. Raises `ValueError` listing the names."""
    target = _TARGETS.get(name, name)
    module, colon, attribute = target.partition(":")
    if not (module and colon and attribute):
        known = ", ".join(sorted(_TARGETS))
        raise ValueError(f"reward.name: {name!r} is not a reward; use {known}, or my_module:MyReward")
    return target


def get_reward(name: str, options: Mapping[str, Any]) -> Reward:
    """Build a reward. Raises `ValueError` naming the key for an unknown name, bad options, or code that fails."""
    target = reward_target(name)
    module, _, attribute = target.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a user's module may raise anything
        raise ValueError(
            f"reward.name: cannot load {target} ({describe(error)}); is it importable from here?"
        ) from error
    try:
        signature = inspect.signature(factory)
        signature.bind(**options)
    except TypeError as error:
        raise ValueError(f"reward.options: {dict(options)!r} do not fit {target} ({error})") from error
    for option, value in options.items():
        known = signature.parameters.get(option)
        if known and known.annotation in (bool, "bool") and not isinstance(value, bool):
            raise ValueError(f"reward.options.{option}: {value!r} is not allowed; use true or false")
    try:
        reward = factory(**options)
    except Exception as error:
        raise ValueError(f"reward.name: {target} cannot be made ({describe(error)}); mend it") from error
    if not isinstance(reward, Reward):
        raise ValueError(f"reward.name: {target} does not make a reward; it must be callable and have name and version")
    return reward


def describe(error: BaseException) -> str:
    """What a user's code raised, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
