"""Rows of nobody's making: files end in prompts or in one line that names the recipe's key, never in a traceback."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.chat import build_chat_tokenizer
from tests.prompts import load_data

WORDS = [
    "",
    " ",
    "7",
    "1+2",
    "#### 7",
    "\\boxed{7}",
    "</think>",
    "\x00",
    "\ud800",
    "é" * 3,
    "a" * 5000,
    "{prompt}",
    "NaN",
]
NUMBERS = [0, -1, 10**30, 0.1, 1e-300, float("nan"), float("inf"), True, False, None]
COLUMNS = ["prompt", "answer", "question", "problem", "solution", "reward_model", "ground_truth", "extra_info", "label"]


def value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(5 if depth < 3 else 3)
    if kind < 2:
        return draw.choice(WORDS)
    if kind == 2:
        return draw.choice(NUMBERS)
    if kind == 3:
        return [value(draw, depth + 1) for _ in range(draw.randrange(3))]
    names = [*COLUMNS, "role", "content", "index"]
    found = {draw.choice(names): value(draw, depth + 1) for _ in range(draw.randrange(4))}
    return found | {"role": draw.choice(["user", "system", "x"]), "content": draw.choice(WORDS)} if depth else found


def settings(draw: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {"template": draw.choice(["raw", "chat"])}
    if draw.random() < 0.5:
        found["preset"] = draw.choice(["gsm8k", "math", "aime", "openr1", "verl", "trl", "openrlhf"])
    if draw.random() < 0.3:
        found["answer_column"] = draw.choice([*COLUMNS, "reward_model.ground_truth", "a.b.c", "", "."])
    if draw.random() < 0.3:
        found["prompt_column"] = draw.choice([*COLUMNS, "extra_info.prompt"])
    return found


def ends_well(path: Path, tokenizer: Any, draw: random.Random) -> bool:
    """Whether there were prompts; what is refused is one line that names a key."""
    data = settings(draw)
    reward = "gsm8k" if data.get("preset") == "gsm8k" else "math"
    try:
        return bool(load_data(tokenizer, data | {"train": str(path)}, name=reward).prompts)
    except ValueError as error:
        text = str(error)
        assert text.startswith("data.") and "\n" not in text and len(text) < 1000, text
        text.encode()  # as a terminal takes it
        return False


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_chat_tokenizer()


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_json(seed: int, tokenizer: Any, tmp_path: Path) -> None:
    draw, path, good = random.Random(seed), tmp_path / "rows.jsonl", 0
    for _ in range(120):
        rows = [json.dumps(value(draw)) for _ in range(draw.choice([0, 0, 2]))]
        for _ in range(2):
            fine = dict.fromkeys(COLUMNS, "7") | {"solution": "\\boxed{7}"}
            for name in draw.sample(COLUMNS, draw.randrange(4)):
                fine[name] = value(draw) if draw.random() < 0.3 else draw.choice(WORDS)
            rows.append(json.dumps(fine))
        text = "\n".join(rows) if draw.random() < 0.8 else f"[{','.join(rows)}]"
        data = bytearray(text.encode())
        if draw.random() < 0.3:
            data[draw.randrange(len(data))] = draw.randrange(256)
        if draw.random() < 0.1:
            data = data[: draw.randrange(len(data))]
        path.write_bytes(data)
        good += ends_well(path, tokenizer, draw)
    assert good > 10


def test_rows_of_parquet(tokenizer: Any, tmp_path: Path) -> None:
    draw, path, good = random.Random(1), tmp_path / "rows.parquet", 0
    for _ in range(30):
        column = [draw.choice(WORDS[:8]) for _ in range(3)]
        table = pa.table(
            {"prompt": column, "answer": [draw.choice([1, 2, None]) for _ in range(3)], "question": column}
        )
        pq.write_table(table, path)
        data = bytearray(path.read_bytes())
        if draw.random() < 0.6:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        if draw.random() < 0.1:
            data = data[: draw.randrange(len(data))]
        path.write_bytes(data)
        good += ends_well(path, tokenizer, draw)
    assert good > 1


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"prompt": ' * 5_000, '{"prompt": "1", "answer": ' + "9" * 6_000 + "}"]
)
def test_rows_that_nest_or_count_too_far(text: str, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    ends_well(tmp_path / "rows.jsonl", tokenizer, random.Random(0))
