"""`megatron-apo grade` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_apo.config import RewardConfig
from megatron_apo.rewards import GradeRequest
from megatron_apo.rewards.explain import Row, Verdict, cross_table, verdicts
from megatron_apo.rollout.inputs import load_inputs, store_fingerprint
from megatron_apo.values.shards import StoreRow
from megatron_apo.values.store import StoreWriter
from tests.runs import SAMPLES, write_run

ROWS = [
    {"response": r"so \boxed{502}", "answer": r"2\,500"},
    {"response": r"so \boxed{2500}", "answer": r"2\,500"},
    {"response": "#### 18", "answer": "#### 18"},
]


def grade(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_apo.cli", "grade", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return path


def test_one_reward(rows: Path) -> None:
    found = grade("--reward", "math", "--file", rows)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [
        "reward math: 2 wrong, 1 right of 3",
        "row 0: wrong: 502 against 2500 (value)",
        "row 2: wrong: nothing against #### 18 (nothing is boxed)",
    ]
    shown = grade("--reward", "math", "--file", rows, "--all", "--show", "2").stdout.splitlines()
    assert shown[1:] == [
        "row 0: wrong: 502 against 2500 (value)",
        "row 1: right: 2500 against 2500 (written alike)",
        "and 1 more; --show 3 shows them",
    ]


def test_two_rewards_and_where_they_disagree(rows: Path) -> None:
    found = grade("--reward", "math", "--reward", "gsm8k", "--file", rows)
    assert found.returncode == 0, found.stderr
    assert "reward gsm8k: 2 failed, 1 right of 3" in found.stdout
    assert "row 1: math: right" in found.stdout and "row 1: gsm8k: failed: error: ValueError: no number" in found.stdout
    both = ["--reward", "gsm8k", "--reward", "gsm8k", "--options", '{"strict": true}', "--options", '{"strict": false}']
    told = json.loads(grade(*both, "--file", rows, "--json").stdout.splitlines()[0])
    assert told.keys() == {"where", 'gsm8k {"strict": true}', 'gsm8k {"strict": false}'}


def test_a_store_that_kept_its_responses(tmp_path: Path) -> None:
    recipe = write_run(tmp_path)
    without = grade("--reward", "arithmetic", "--store", recipe.vstar.dir, "-r", tmp_path / "recipe.yaml")
    assert without.returncode == 1 and "has no responses; make one with vstar.keep_responses=true" in without.stderr
    inputs = load_inputs(recipe)
    prompts = inputs.training.prompts
    answers = [inputs.tokenizer.encode(f"</think>{prompt.answer}", add_special_tokens=False) for prompt in prompts]
    kept = [
        StoreRow(p.prompt_id, p.text_hash, [1.0] * SAMPLES, [9] * SAMPLES, ["stop"] * SAMPLES, [answer] * SAMPLES)
        for p, answer in zip(prompts, answers, strict=True)
    ]
    writer = StoreWriter(tmp_path / "kept", store_fingerprint(recipe, inputs), 1)
    writer.write_shard(0, kept)
    writer.finish()
    found = grade("--reward", "arithmetic", "--store", tmp_path / "kept", "-r", tmp_path / "recipe.yaml")
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[0] == f"reward arithmetic: {len(kept) * SAMPLES} right of {len(kept) * SAMPLES}"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--reward", "math"], 2, "give one of them"),
        (["--reward", "maths", "--file", "ROWS"], 1, "error: reward.name: 'maths' is not a reward"),
        (["--reward", "math", "--file", "none.jsonl"], 1, "error: --file: none.jsonl is not a file"),
        (["--reward", "math", "--file", "EMPTY"], 1, "error: --file, --store: no rows; give some"),
        (["--reward", "math", "--file", "ROWS", "reward.workers=2"], 2, "give --recipe as well"),
        (["--reward", "math", "--file", "ROWS", "--options", "{strict"], 2, "give JSON, as"),
        (["--reward", "math", "--store", "S"], 2, "give --recipe as well"),
        (["--reward", "a", "--reward", "b", "--reward", "c", "--file", "ROWS"], 2, "3 rewards; give one, or two"),
    ],
)
def test_mistakes(arguments: list[str], code: int, says: str, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    places = {"ROWS": str(rows), "EMPTY": str(tmp_path / "empty.jsonl")}
    found = grade(*(places.get(word, word) for word in arguments))
    told = " ".join(found.stderr.replace("│", " ").split())
    assert found.returncode == code and says in told, found.stderr
    assert "Traceback" not in found.stderr


def test_a_reward_that_fails_or_cannot_explain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd.py").write_text(
        "class Odd:\n    name, version = 'odd', '1'\n    def __call__(self, request):\n"
        "        if request.response == 'x':\n            raise KeyError('x')\n        return 0.25\n"
        "    def explain(self, request):\n        raise RuntimeError('no idea')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = [Row(text, GradeRequest("", text, "7", "stop")) for text in ("x", "y")]
    failed, odd = verdicts(RewardConfig(name="odd:Odd"), asked)
    assert (failed.word, failed.reference) == ("failed", "7") and failed.why.startswith("error: KeyError")
    assert (odd.word, odd.why) == ("0.25", "explain: RuntimeError: no idea")
    assert cross_table([failed, odd], [Verdict(1.0), Verdict(0.0)]) == {("failed", "right"): 1, ("0.25", "wrong"): 1}
