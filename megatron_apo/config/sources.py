"""One source of prompts with what reads and grades it, and what of these cannot work together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_apo.config.data import TASK, RowsConfig, SourceConfig
from megatron_apo.config.reward import GraderConfig


class Source(NamedTuple):
    """Where prompts come from. key: the recipe's, of what says where; rows_key: of what says how they are read."""

    key: str
    rows_key: str
    name: str  # "" where it is the only one
    path: str
    rows: RowsConfig
    max_prompts: int | None
    weight: float | None
    grader: GraderConfig

    @property
    def task(self) -> str | None:
        """ "chain_sum" of reasoning-gym:chain_sum, None of a file or a dataset of the hub."""
        return self.path.removeprefix(TASK) if self.path.startswith(TASK) else None

    @property
    def plain_grader(self) -> GraderConfig:
        """Name and options alone, where the grader is the recipe's reward."""
        return GraderConfig(name=self.grader.name, options=self.grader.options)

    @property
    def reward_key(self) -> str:
        """The recipe's, of its grader's name."""
        has_own = isinstance(self.rows, SourceConfig) and self.rows.reward is not None
        return f"{self.rows_key}.reward.name" if has_own else "reward.name"

    @property
    def max_prompts_key(self) -> str:
        return "eval.max_prompts" if self.key == "data.eval" else f"{self.rows_key}.max_prompts"


class _LooksFor(NamedTuple):
    """The form of an answer that a reward looks for, unless its option `unless_off` is false."""

    form: str
    unless_off: str


_LOOKS_FOR = {"gsm8k": _LooksFor("a number after ####", "strict"), "math": _LooksFor("\\boxed{}", "boxed")}

# The reward that looks for the form of answer which a preset asks for. The presets' own words are in data/presets.py, a
# room above, which a recipe is checked without.
_REWARD_OF_PRESET = {"gsm8k": "gsm8k", "math": "math", "aime": "math", "openr1": "math", "deepscaler": "math"}


def source_problems(sources: Sequence[Source]) -> list[str]:
    """Combinations that cannot work, one line each, of all sources of a recipe."""
    found = []
    for source in sources:
        rows = source.rows
        found += _grader_problems(source)
        if source.task is not None:
            found += _task_problems(source)
        elif rows.options and not any(other.task is not None and other.rows is rows for other in sources):
            found.append(f"{source.rows_key}.options: {rows.options} are for reasoning-gym:TASK; leave them out")
    return list(dict.fromkeys(found))  # data.train and data.eval share settings


def _grader_problems(source: Source) -> list[str]:
    """Of a reward that looks for another form of answer than the preset asks for, or for a task where there is none."""
    rows, key, reward, own = source.rows, source.rows_key, source.grader.name, source.reward_key
    found = []
    fitting = _REWARD_OF_PRESET.get(rows.preset or "")
    if fitting and rows.prompt_format is None and reward != fitting and reward in _LOOKS_FOR:
        found.append(
            f"{own}: {reward} looks for {_LOOKS_FOR[reward].form}, and {key}.preset={rows.preset} asks for "
            f"{_LOOKS_FOR[fitting].form}; use {own}={fitting}, or a {key}.prompt_format of your own"
        )
    if reward == "reasoning-gym" and source.task is None:
        found.append(
            f"{own}: reasoning-gym grades entries of its own tasks, and {source.key} is {source.path}; use "
            "another reward, or reasoning-gym:TASK"
        )
    return found


def _task_problems(source: Source) -> list[str]:
    """Of a task, which has columns of its own, and asks for no form of answer by itself."""
    rows, key, reward = source.rows, source.rows_key, source.grader
    found = [
        f"{key}.{name}: {value!r} is for rows of a file, and {source.path} has columns of its own; leave it out"
        for name in ("preset", "prompt_column", "answer_column")
        if (value := getattr(rows, name)) is not None
    ]
    if source.max_prompts is None:
        found.append(
            f"{source.max_prompts_key}: missing, and {source.path} never ends; say how many prompts of it are wanted"
        )
    looks_for = _LOOKS_FOR.get(reward.name)
    if looks_for and reward.options.get(looks_for.unless_off, True) and rows.prompt_format is None:
        found.append(
            f"{source.reward_key}: {reward.name} looks for {looks_for.form}, for which {source.path} does not ask; "
            f"give a {key}.prompt_format that does, or use reward reasoning-gym"
        )
    return found
