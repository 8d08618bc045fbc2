"""How a row of a source becomes a prompt and its reference answer, for public datasets and for those of one's own.

    gsm8k       openai/gsm8k (subset main)                                                      reward gsm8k
    math        MATH (EleutherAI/hendrycks_math and its copies), HuggingFaceH4/MATH-500         reward math
    aime        AIME and HMMT: HuggingFaceH4/aime_2024, Maxwell-Jia/AIME_2024, math-ai/aime24   reward math
                and aime25, opencompass/AIME2025, MathArena/aime_2025, MathArena/hmmt_feb_2025
    openr1      open-r1/OpenR1-Math-220k                                                        reward math
    deepscaler  agentica-org/DeepScaleR-Preview-Dataset                                         reward math
    verl        verl's files: prompt as messages, reward_model.ground_truth                     any: rows ask themselves
    trl         TRL's: prompt as text or messages, answer, solution or ground_truth             any
    openrlhf    OpenRLHF's: input or context_messages, label or answer                          any

A preset of a dataset asks the model for the form of answer that its reward looks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_apo.config import Recipe, RowsConfig, Source
from megatron_apo.data.procedural import ANSWER, ENTRY, QUESTION
from megatron_apo.rewards.procedural import ASKS
from megatron_apo.rewards.text import boxed_answer

_BOXED = "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}."
_MARKED = "{prompt}\nPlease reason step by step, and put your final answer, a number, after #### on the last line."


@dataclass(frozen=True)
class RowFormat:
    """Columns that may hold prompt and answer: of each, the first that the source has.

    answers: for each column what makes an answer of its text, None where there is no answer in it.
    prompt_format: what is shown, the row's text in place of {prompt}.
    """

    prompts: tuple[str, ...]
    answers: Mapping[str, Callable[[str], str | None]]
    prompt_format: str

    def show(self, row_text: str) -> str:
        """The text of a row as the model is asked."""
        return self.prompt_format.replace("{prompt}", row_text)


def row_format(rows: RowsConfig, base: RowFormat | None = None) -> RowFormat:
    """The preset's format, or that of columns prompt and answer, with what the recipe itself sets in its place.

    A column that the recipe names is read as the preset reads a column of that name, else as it is. base: in place of
    the preset's.
    """
    base = base or (PRESETS[rows.preset] if rows.preset else PLAIN)
    answers = base.answers
    if rows.answer_column is not None:
        answers = {rows.answer_column: answers.get(rows.answer_column, _stated if rows.preset else str)}
    return RowFormat(
        base.prompts if rows.prompt_column is None else (rows.prompt_column,),
        answers,
        base.prompt_format if rows.prompt_format is None else rows.prompt_format,
    )


def source_format(source: Source) -> RowFormat:
    """Of a source's rows. Those of a task have what its own verifier compares, and ask for what it looks for."""
    if source.task is None:
        return row_format(source.rows)
    if source.grader.name != "reasoning-gym":
        return row_format(source.rows, TASK_ROWS)
    form = source.grader.options.get("answer", "tag")
    return row_format(source.rows, RowFormat((QUESTION,), {ENTRY: str}, ASKS.get(form, "{prompt}")))


def demonstration_format(recipe: Recipe) -> RowFormat:
    """Of warmup.data's prompts: as those of data.train are shown; with several sources, by `data` itself."""
    (source, *others) = recipe.sources("train")
    return row_format(recipe.data) if others or source.name else source_format(source)


def column_key(rows: RowsConfig, rows_key: str, name: str) -> str:
    """A column's key in the recipe, for messages, with the preset if that is what gives the column."""
    from_preset = rows.preset and getattr(rows, name) is None
    return f"{rows_key}.{name}" + (f" ({rows_key}.preset: {rows.preset})" if from_preset else "")


def _stated(answer: str) -> str | None:
    return answer.strip() or None


def _marked(solution: str) -> str | None:
    _, mark, answer = solution.rpartition("####")
    return answer.strip() or None if mark else None


def _not_a_proof(answer: str) -> str | None:
    """NuminaMath's answers, which OpenR1 kept: a word stands where there is none to compare with."""
    return None if answer.strip().lower() in ("proof", "notfound") else _stated(answer)


def _boxed_or_stated(solution: str) -> str | None:
    return boxed_answer(solution) or _stated(solution)


PLAIN = RowFormat(("prompt",), {"answer": str}, "{prompt}")
TASK_ROWS = RowFormat((QUESTION,), {ANSWER: _stated}, "{prompt}")
PRESETS = {
    "gsm8k": RowFormat(("question",), {"answer": _marked}, _MARKED),
    "math": RowFormat(("problem",), {"answer": _stated, "solution": boxed_answer}, _BOXED),
    "aime": RowFormat(
        ("problem", "Problem", "question", "Question"),
        {"answer": _stated, "Answer": _stated, "solution": boxed_answer},
        _BOXED,
    ),
    "openr1": RowFormat(("problem",), {"answer": _not_a_proof}, _BOXED),
    "deepscaler": RowFormat(("problem",), {"answer": _stated}, _BOXED),
    "verl": RowFormat(("prompt",), {"reward_model.ground_truth": _stated, "extra_info.answer": _stated}, "{prompt}"),
    "trl": RowFormat(
        ("prompt",), {"answer": _stated, "ground_truth": _stated, "solution": _boxed_or_stated}, "{prompt}"
    ),
    "openrlhf": RowFormat(("input", "context_messages", "prompt"), {"label": _stated, "answer": _stated}, "{prompt}"),
}
