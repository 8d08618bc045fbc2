"""Tasks of reasoning-gym as data and reward: the same entries everywhere, no question in both parts, its verifiers."""

from __future__ import annotations

import hashlib
import json
import os
from importlib.util import find_spec

import pytest

from megatron_apo.config import RecipeError, build_recipe
from megatron_apo.data.procedural import part_of, rows_of_task
from megatron_apo.rewards import GradeRequest, get_reward
from megatron_apo.rewards.procedural import Task, referenced
from tests.chat import build_chat_tokenizer
from tests.prompts import load_data

pytestmark = pytest.mark.skipif(
    find_spec("reasoning_gym") is None and os.environ.get("CI") != "true",
    reason="reasoning-gym is not installed, a part of which takes a C compiler",
)

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def rows(part="train", count=20, options=SUMS, name="chain_sum"):
    return list(rows_of_task(name, options, part, count, "data.max_prompts", "data.options"))


def graded(reference, response, **options):
    return get_reward("reasoning-gym", options)(GradeRequest("", response, reference, "stop"))


def test_rows_are_the_tasks_own_and_the_same_each_time() -> None:
    found = rows()
    assert found == rows() and found[:7] == rows(count=7)
    for row in found:
        terms = row["prompt"].rpartition(":")[2].strip(" .?=")
        assert str(eval(terms)) == row["answer"]  # noqa: S307 - digits and signs, as the task writes them
    assert rows(options=SUMS | {"seed": 1}) != found


def test_no_question_is_in_both_parts_whatever_the_seeds() -> None:
    train = {row["prompt"] for seed in range(3) for row in rows(count=200, options=SUMS | {"seed": seed})}
    held_out = {row["prompt"] for seed in range(3) for row in rows("eval", 40, SUMS | {"seed": seed})}
    assert len(train) > 200 and len(held_out) > 40
    assert not train & held_out
    assert {part_of(question) for question in train} == {"train"}
    assert 0.09 < sum(part_of(str(number)) == "eval" for number in range(4000)) / 4000 < 0.16


def test_series_of_entries_go_on_beyond_one_generator() -> None:
    task = Task("chain_sum", {"max_digits": 4})
    questions = [task.entry(index)["question"] for index in range(990, 1010)]
    assert len(set(questions)) == 20
    assert Task("chain_sum", {"max_digits": 4}).entry(1005)["question"] == questions[15]


@pytest.mark.parametrize(
    ("options", "response", "reward"),
    [
        ({}, "It is <answer>{right}</answer>.", 1.0),
        ({}, "<answer>{wrong}</answer> no, <answer> {right} </answer>", 1.0),
        ({}, "<answer>{right}</answer> no, <answer>{wrong}</answer>", 0.0),
        ({}, "{right}", 0.0),
        ({}, "</answer>{right}<answer>", 0.0),
        ({}, "<think><answer>{right}</answer></think>", 0.0),
        ({"thinking": True}, "<answer>{right}</answer>", 0.0),
        ({"thinking": True}, "hm</think><answer>{right}</answer>", 1.0),
        ({"answer": "box"}, "So \\boxed{{{right}}}.", 1.0),
        ({"answer": "box"}, "{right}", 0.0),
        ({"answer": "text"}, "hm</think> {right}\n", 1.0),
        ({"answer": "text"}, "{wrong}", 0.0),
        ({"answer": "text"}, "", 0.0),
        ({"answer": "text"}, "{right}{right}", 0.5),
        ({"answer": "text", "exact": True}, "{right}{right}", 0.0),
        ({"answer": "text", "exact": True}, "{right}", 1.0),
    ],
)
def test_where_an_answer_is(options, response, reward) -> None:
    row = rows(count=1)[0]
    text = response.format(right=row["answer"], wrong="7 7")
    assert graded(row["entry"], text, **options) == reward


def test_the_tasks_own_verifier_judges() -> None:
    """Of countdown any way to the target is right, and of graph_color there is no reference answer at all."""
    row = rows("train", 1, {}, "countdown")[0]
    numbers = referenced(row["entry"])[1]["metadata"]["numbers"]
    assert graded(row["entry"], f"<answer>{row['answer']}</answer>") == 1.0
    assert graded(row["entry"], f"<answer>{'+'.join(map(str, numbers))}+1</answer>") < 1.0
    row = rows("train", 1, {"min_num_vertices": 4, "max_num_vertices": 4, "num_colors": 4}, "graph_color")[0]
    assert row["answer"] is None
    colours = {str(vertex): vertex % 4 + 1 for vertex in range(4)}
    assert graded(row["entry"], f"<answer>{json.dumps(colours)}</answer>") == 1.0


def test_a_recipe_names_task_and_options() -> None:
    tokenizer = build_chat_tokenizer()
    data = {"train": "reasoning-gym:chain_sum", "options": SUMS, "max_prompts": 5, "template": "raw"}
    asked = load_data(tokenizer, data, name="reasoning-gym").prompts
    plain = load_data(tokenizer, data, name="gsm8k", options={"strict": False}).prompts
    assert [prompt.text for prompt in asked] == [
        f"{prompt.text}\nGive your final answer between <answer> and </answer>." for prompt in plain
    ]
    assert [referenced(prompt.answer)[1]["answer"] for prompt in asked] == [prompt.answer for prompt in plain]
    as_text = load_data(tokenizer, data, name="reasoning-gym", options={"answer": "text"}).prompts
    assert [prompt.text for prompt in as_text] == [prompt.text for prompt in plain]


TASK = ["model.path=m", "vstar.dir=v", "data.train=reasoning-gym:chain_sum", "reward.name=reasoning-gym"]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            [*TASK, "data.max_prompts=3", "data.preset=gsm8k"],
            "data.preset: 'gsm8k' is for rows of a file, and reasoning-gym:chain_sum has columns of its own; leave",
        ),
        (
            [*TASK, "data.max_prompts=3", "data.answer_column=answer"],
            "data.answer_column: 'answer' is for rows of a file, and reasoning-gym:chain_sum has columns of its own",
        ),
        (
            [*TASK, "data.max_prompts=3", "reward.name=math"],
            "reward.name: math looks for \\boxed{}, for which reasoning-gym:chain_sum does not ask; give a data",
        ),
        ([*TASK], "data.max_prompts: missing, and reasoning-gym:chain_sum never ends; say how many prompts of it are"),
        (
            [*TASK, "data.max_prompts=3", "data.eval=reasoning-gym:chain_sum"],
            "eval.max_prompts: missing, and reasoning-gym:chain_sum never ends; say how many prompts of it are wanted",
        ),
        (
            [*TASK[:2], "data.train=t.jsonl", "reward.name=reasoning-gym"],
            "reward.name: reasoning-gym grades entries of its own tasks, and data.train is t.jsonl; use another reward",
        ),
        (
            [*TASK[:2], "data.train=t.jsonl", "data.options={seed: 1}"],
            "data.options: {'seed': 1} are for reasoning-gym",
        ),
    ],
)
def test_what_a_recipe_must_say_of_a_task(overrides, problem) -> None:
    with pytest.raises(RecipeError) as caught:
        build_recipe({}, overrides)
    assert [line for line in caught.value.problems if line.startswith(problem)] == caught.value.problems


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("chain_sun", {}, "data.options: reasoning-gym:chain_sun is no task of reasoning-gym; use one of ab, "),
        ("chain_sum", {"terms": 3}, "data.options: {'terms': 3} do not fit reasoning-gym:chain_sum (TypeError: "),
        ("chain_sum", {"min_terms": 9, "max_terms": 2}, "data.options: {'min_terms': 9, 'max_terms': 2} do not fit "),
        (
            "chain_sum",
            {"size": 3},
            "data.options: size is none of chain_sum's; leave it out, max_prompts says how many",
        ),
        (
            "chain_sum",
            {"max_digits": 9999},
            "data.options: {'max_digits': 9999} do not fit reasoning-gym:chain_sum (Val",
        ),
        ("chain_sum", {"seed": -1}, "data.options: seed -1 is not allowed; use a whole number from 0"),
        (
            "chain_sum",
            {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
            "data.max_prompts: 9999, but reasoning-gym:chain_sum with these options has ",
        ),
    ],
)
def test_mistakes(name, options, says) -> None:
    with pytest.raises(ValueError) as caught:
        rows("train", 9999 if says.startswith("data.max") else 1, options, name)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_a_questions_part_is_the_same_everywhere() -> None:
    """The first byte of its sha256 is a multiple of 8 in what is held out."""
    questions = [f"{index} + 1?" for index in range(100)]
    held_out = [one for one in questions if int(hashlib.sha256(one.encode()).hexdigest()[:2], 16) % 8 == 0]
    assert [one for one in questions if part_of(one) == "eval"] == held_out and 5 < len(held_out) < 25


def test_a_task_with_few_questions_gives_all_of_them() -> None:
    """However many are asked for, it is soon told how many there are: 9 x 9 sums and differences."""
    options, found = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}, {}
    for part in ("train", "eval"):
        with pytest.raises(ValueError, match="; ask for at most ") as caught:
            rows(part, 10**9, options)
        most = int(str(caught.value).partition("at most ")[2].partition(",")[0])
        all_of_them = rows(part, most, options)
        found[part] = {row["prompt"] for row in all_of_them}
        assert len(all_of_them) == len(found[part]) == most
        assert all(referenced(row["entry"])[1]["question"] == row["prompt"] for row in all_of_them)
    assert not found["train"] & found["eval"]
    drawn = Task("chain_sum", options)
    assert {drawn.entry(index)["question"] for index in range(9999)} == found["train"] | found["eval"]


def test_a_reference_of_another_source() -> None:
    with pytest.raises(
        ValueError, match="is no entry of a task; reward reasoning-gym is for sources reasoning-gym:TASK"
    ):
        graded("42", "<answer>42</answer>")
