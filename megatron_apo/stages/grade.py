"""What rewards make of responses that are there already: rows of a file, or a V* store that kept its responses.

    reward math: 61 right, 38 wrong, 1 failed of 100
    row 17: wrong: 502 against 2500 (value)

With two rewards, how often they agree, and the rows where they do not.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from megatron_apo.config import GraderConfig, Recipe, RewardConfig
from megatron_apo.data.rows import read_rows, row_text
from megatron_apo.rewards import GradeRequest
from megatron_apo.rewards.explain import Row, Verdict, cross_table, verdicts
from megatron_apo.values.shards import shard_name
from megatron_apo.values.store import VStarStore

RESPONSE, ANSWER = ("response", "completion", "output"), ("answer", "reference", "solution", "target")
_SHOWN = 120  # characters of an answer


def rows_of_file(source: str) -> Iterator[Row]:
    """Rows with a response and a reference answer. Raises `ValueError`, which names --file."""
    for index, row in enumerate(read_rows(source, "--file", columns=[*RESPONSE, *ANSWER, "prompt"])):
        response = row_text(row, RESPONSE, "--file", source, index)
        answer = row_text(row, ANSWER, "--file", source, index)
        yield Row(f"row {index}", GradeRequest(str(row.get("prompt", "")), response, answer, "stop"))


def rows_of_store(folder: Path, recipe: Recipe) -> Iterator[Row]:
    """Samples of a store, whose prompts' answers are the recipe's. Raises `ValueError` for one without responses."""
    from megatron_apo.rollout.inputs import load_inputs

    store, inputs = VStarStore.open(folder), load_inputs(recipe)
    prompts = {prompt.prompt_id: prompt for prompt in inputs.training.prompts}
    for index in range(store.num_shards):
        file = pq.ParquetFile(folder / shard_name(index))
        if "responses" not in file.schema_arrow.names:
            raise ValueError(
                f"--store: {folder} has no responses; make one with vstar.keep_responses=true, or give --file"
            )
        for batch in file.iter_batches(columns=["prompt_id", "finish_reasons", "responses"]):
            for row in batch.to_pylist():
                prompt_id = row["prompt_id"].hex()
                if prompt_id not in prompts:
                    raise ValueError(f"--store: {folder} has prompt {prompt_id}, which is not in data.train")
                for sample, (tokens, reason) in enumerate(zip(row["responses"], row["finish_reasons"], strict=True)):
                    request = inputs.grade_request(prompts[prompt_id], tokens, reason)
                    yield Row(f"{prompt_id} sample {sample}", request)


@dataclass(frozen=True)
class Judge:
    """A reward, or those of a recipe's sources. graders: by `GradeRequest.grader`."""

    name: str
    graders: list[GraderConfig]

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> Judge:
        """Each source's own."""
        trained = [source.grader.name for source in recipe.sources("train")]
        return cls(", ".join(dict.fromkeys(trained)), recipe.graders)

    @classmethod
    def of(cls, name: str, options: dict[str, Any] | None, recipe: Recipe | None) -> Judge:
        """With these options; none: those that a row's source has for it, or else another source, or the recipe."""
        others = [*recipe.graders, recipe.reward] if recipe else []
        known = [one.options for one in others if one.name == name]
        default = GraderConfig(name=name, options=(known or [{}])[0] if options is None else options)
        own = recipe.graders if recipe else [default]
        return cls(name, [one if options is None and one.name == name else default for one in own])


def of_rewards(rows: Iterable[Row], names: Sequence[str], recipe: Recipe) -> tuple[list[Row], int]:
    """The rows of sources that have one of these rewards, or all rows where none has; and how many are left out."""
    listed, graders = list(rows), recipe.graders
    own = [row for row in listed if graders[row.request.grader].name in names] or listed
    return own, len(listed) - len(own)


def run(
    judges: Sequence[Judge],
    limits: RewardConfig,
    rows: Iterable[Row],
    show: int,
    shows_all: bool,
    as_json: bool,
    num_left_out: int = 0,
) -> None:
    """judges: one or two. show: rows to print at most: those that are not right, or in which two disagree; shows_all:
    any. Raises `ValueError` where there are none."""
    listed = list(rows)
    if not listed:
        raise ValueError("--file, --store: no rows; give some")
    if num_left_out:
        told = f"left out: {num_left_out} samples of sources with other rewards; without --reward each has its own"
        print(told, file=sys.stderr if as_json else sys.stdout)
    names = [judge.name for judge in judges]
    if len(set(names)) < len(names):
        names = [f"{one.name} {json.dumps(one.graders[0].options)}" for one in judges]
    found = [verdicts(limits, listed, judge.graders) for judge in judges]
    if as_json:
        for place, row in enumerate(listed):
            told = {name: asdict(verdict[place]) for name, verdict in zip(names, found, strict=True)}
            print(json.dumps({"where": row.where, **told}))
        return
    for name, verdict in zip(names, found, strict=True):
        counts = Counter(one.word for one in verdict)
        print(f"reward {name}: {', '.join(f'{counts[word]} {word}' for word in counts)} of {len(listed)}")
    if len(judges) == 2:
        _print_table(names, cross_table(*found))
    words = [[one.word for one in row] for row in zip(*found, strict=True)]
    wanted = (shows_all or (len(set(row)) > 1 if len(row) > 1 else row != ["right"]) for row in words)
    places = [place for place, is_wanted in enumerate(wanted) if is_wanted]
    for place in places[:show]:
        for name, verdict in zip(names, found, strict=True):
            print(f"{listed[place].where}:{f' {name}:' if len(names) > 1 else ''} {_line(verdict[place])}")
    if len(places) > show:
        print(f"and {len(places) - show} more; --show {len(places)} shows them")


def _line(verdict: Verdict) -> str:
    if verdict.reward is None:
        return f"failed: {verdict.why} (reference {verdict.reference[:_SHOWN]})"
    if verdict.answer is None:
        return f"{verdict.word} ({verdict.why})" if verdict.why else verdict.word
    answer, reference = (text[:_SHOWN] or "nothing" for text in (verdict.answer, verdict.reference))
    return f"{verdict.word}: {answer} against {reference} ({verdict.why})"


def _print_table(names: Sequence[str], counts: dict[tuple[str, str], int]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{names[0]} (rows) and {names[1]} (columns)", title_justify="left")
    words = sorted({word for pair in counts for word in pair})
    table.add_column("")
    for word in words:
        table.add_column(word, justify="right")
    for row in words:
        table.add_row(row, *(str(counts.get((row, column), 0)) for column in words))
    Console().print(table)
