"""`megatron-apo grade` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_apo.config import Recipe, RewardConfig, build_recipe
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
    num = SAMPLES * write_right_answers(recipe, tmp_path / "kept")
    for reward in (["--reward", "arithmetic"], []):
        found = grade(*reward, "--store", tmp_path / "kept", "-r", tmp_path / "recipe.yaml")
        assert found.returncode == 0, found.stderr
        assert found.stdout.splitlines() == [f"reward arithmetic: {num} right of {num}"]


def write_right_answers(recipe: Recipe, folder: Path) -> int:
    """A store of the recipe's in which all responses are right; how many prompts it has."""
    inputs = load_inputs(recipe)
    prompts = inputs.training.prompts
    answers = [inputs.tokenizer.encode(f"</think>{prompt.answer}", add_special_tokens=False) for prompt in prompts]
    kept = [
        StoreRow(p.prompt_id, p.text_hash, [1.0] * SAMPLES, [9] * SAMPLES, ["stop"] * SAMPLES, [answer] * SAMPLES)
        for p, answer in zip(prompts, answers, strict=True)
    ]
    writer = StoreWriter(folder, store_fingerprint(recipe, inputs), 1)
    writer.write_shard(0, kept)
    writer.finish()
    return len(kept)


LENIENT = """
class Lenient:
    name, version = "lenient", "1"
    def __init__(self, gives=0.25):
        self.gives = gives
    def __call__(self, request):
        return self.gives
"""


def test_a_store_of_two_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with a reward of its own; the first has 64 prompts, the second 6."""
    (tmp_path / "lenient.py").write_text(LENIENT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.syspath_prepend(str(tmp_path))
    tree = write_run(tmp_path).model_dump(mode="json")
    sums = tree["data"]["train"]
    (tmp_path / "others.jsonl").write_text("".join(f"{line}\n" for line in Path(sums).read_text().splitlines()[:6]))
    lenient = {"name": "lenient:Lenient", "options": {"gives": 0.75}}
    tree["data"] |= {"train": None, "eval": None}
    tree["data"]["train_sources"] = [
        {"name": "others", "path": str(tmp_path / "others.jsonl"), "reward": lenient},
        {"name": "sums", "path": sums},
    ]
    recipe = build_recipe(tree)
    recipe.save(tmp_path / "recipe.yaml")
    write_right_answers(recipe, tmp_path / "kept")
    of_store = ["--store", tmp_path / "kept", "-r", tmp_path / "recipe.yaml", "--show", "0"]
    num_sums, num_others = 64 * SAMPLES, 6 * SAMPLES
    num_all = num_sums + num_others

    def told(*arguments: object) -> list[str]:
        found = grade(*of_store, *arguments)
        assert found.returncode == 0, found.stderr
        return [line for line in found.stdout.splitlines() if line.startswith(("reward", "left out"))]

    assert told() == [f"reward lenient:Lenient, arithmetic: {num_others} 0.75, {num_sums} right of {num_all}"]
    left_out = "left out: {} samples of sources with other rewards; without --reward each has its own"
    assert told("--reward", "arithmetic") == [
        left_out.format(num_others),
        f"reward arithmetic: {num_sums} right of {num_sums}",
    ]
    assert told("--reward", "lenient:Lenient") == [
        left_out.format(num_sums),
        f"reward lenient:Lenient: {num_others} 0.75 of {num_others}",
    ]
    assert told("--reward", "lenient:Lenient", "--options", '{"gives": 0.5}')[1:] == [
        f"reward lenient:Lenient: {num_others} 0.5 of {num_others}"
    ]
    assert told("--reward", "math") == [f"reward math: {num_all} wrong of {num_all}"]
    as_json = grade(*of_store, "--reward", "arithmetic", "--json")
    assert len([json.loads(line) for line in as_json.stdout.splitlines()]) == num_sums
    assert as_json.stderr.strip() == left_out.format(num_others)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--reward", "math"], 2, "give one of them"),
        (["--file", "ROWS"], 2, "a file's rows have none of their own; give one"),
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
    assert (odd.word, odd.answer, odd.why) == ("0.25", None, "explain: RuntimeError: no idea")
    assert cross_table([failed, odd], [Verdict(1.0), Verdict(0.0)]) == {("failed", "right"): 1, ("0.25", "wrong"): 1}
