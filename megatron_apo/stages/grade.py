"""What rewards make of responses that are there already: rows of a file, or a V* store that kept its responses.

    reward math: 61 right, 38 wrong, 1 failed of 100
    row 17: wrong: 502 against 2500 (value)

With two rewards, how often they agree, and the rows where they do not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq

from megatron_apo.config import Recipe, RewardConfig
from megatron_apo.data.rows import read_rows, row_text
from megatron_apo.rewards import GradeRequest
from megatron_apo.rewards.explain import Row, Verdict, cross_table, verdicts
from megatron_apo.values.shards import shard_name
from megatron_apo.values.store import VStarStore

RESPONSE, ANSWER = ("response", "completion", "output"), ("answer", "reference", "solution", "target")
_SHOWN = 120  # characters of an answer


def rows_of_file(source: str) -> Iterator[Row]:
    """Rows with a response and a reference answer. Raises `ValueError`, which names --file."""
    for index, row in enumerate(read_rows(source, "--file")):
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


def run(configs: Sequence[RewardConfig], rows: Iterable[Row], show: int, shows_all: bool, as_json: bool) -> None:
    """configs: of one reward or two. show: rows to print at most: those that are not right, or in which two disagree;
    shows_all: any. Raises `ValueError` where there are none."""
    listed = list(rows)
    if not listed:
        raise ValueError("--file, --store: no rows; give some")
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        names = [f"{config.name} {json.dumps(config.options)}" for config in configs]
    found = [verdicts(config, listed) for config in configs]
    if as_json:
        for place, row in enumerate(listed):
            told = {name: asdict(verdict[place]) for name, verdict in zip(names, found, strict=True)}
            print(json.dumps({"where": row.where, **told}))
        return
    for name, verdict in zip(names, found, strict=True):
        counts = Counter(one.word for one in verdict)
        print(f"reward {name}: {', '.join(f'{counts[word]} {word}' for word in counts)} of {len(listed)}")
    if len(configs) == 2:
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
