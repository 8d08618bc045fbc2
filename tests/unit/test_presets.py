"""Presets: rows shaped like those of the public datasets, as prompts and answers that the preset's reward can grade.

The columns and types are those that the datasets' cards and files name; the rows are made up.
"""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_apo.config import DataConfig, RecipeError, build_recipe
from megatron_apo.data.presets import PRESETS, boxed_answer, row_format
from megatron_apo.rewards import GradeRequest, get_reward
from tests.chat import TEMPLATE as CHAT_TEMPLATE
from tests.chat import build_chat_tokenizer
from tests.prompts import load_data

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GSM8K = {"question": "How many are 9 x 2?", "answer": "9 x 2 = <<9*2=18>>18 in all.\n#### 18"}
MATH = {
    "problem": "What is half of one?",
    "level": "Level 1",
    "type": "Algebra",
    "solution": "It is not $\\boxed{2}$. Halved, $1$ is $\\boxed{\\frac{1}{2}}$.",
}
MATH_500 = {
    "problem": "Give $(3, \\pi/2)$.",
    "solution": "It is $\\boxed{1}$.",
    "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
    "subject": "Precalculus",
    "level": 2,
    "unique_id": "test/precalculus/807.json",
}
OPENR1 = {
    "problem": "What is $2^3$?",
    "solution": "Eight.",
    "answer": "8",
    "problem_type": "Algebra",
    "question_type": "math-word-problem",
    "messages": [{"content": "What is $2^3$?", "role": "user"}, {"content": "<think></think>8", "role": "assistant"}],
    "generations": ["<think></think>8", "<think></think>9"],
    "correctness_math_verify": [True, False],
}
AIME_QUESTION = "Find the number of minutes."
# (preset, a row, its prompt, its answer)
SCHEMAS = {
    "gsm8k": ("gsm8k", GSM8K, "How many are 9 x 2?", "18"),
    "gsm8k, thousands": ("gsm8k", GSM8K | {"answer": "$900 x 2\n#### 1,800\n"}, "How many are 9 x 2?", "1,800"),
    "hendrycks_math": ("math", MATH, "What is half of one?", "\\frac{1}{2}"),
    "MATH-500": ("math", MATH_500, "Give $(3, \\pi/2)$.", "\\left( 3, \\frac{\\pi}{2} \\right)"),
    "Maxwell-Jia/AIME_2024": (
        "aime",
        {"ID": "2024-I-1", "Problem": AIME_QUESTION, "Solution": "$\\boxed{1}$", "Answer": 204},
        AIME_QUESTION,
        "204",
    ),
    "HuggingFaceH4/aime_2024": (
        "aime",
        {"id": 60, "problem": AIME_QUESTION, "solution": "$\\boxed{1}$", "answer": "204", "year": "2024"},
        AIME_QUESTION,
        "204",
    ),
    "math-ai/aime24": ("aime", {"id": 60, "problem": AIME_QUESTION, "solution": "\\boxed{204}"}, AIME_QUESTION, "204"),
    "opencompass/AIME2025": ("aime", {"question": AIME_QUESTION, "answer": "070"}, AIME_QUESTION, "070"),
    "aime-1983-2024": (
        "aime",
        {"ID": "1983-1", "Year": 1983, "Problem Number": 1, "Question": AIME_QUESTION, "Answer": "60", "Part": None},
        AIME_QUESTION,
        "60",
    ),
    "MathArena/aime_2025": (
        "aime",
        {"problem_idx": 1, "answer": 70, "problem": AIME_QUESTION, "problem_type": ["Number Theory"]},
        AIME_QUESTION,
        "70",
    ),
    "MathArena/hmmt_feb_2025": (
        "aime",
        {"problem_idx": 1, "answer": "\\frac{1}{576}", "problem": "Compute.", "problem_type": ["Algebra"]},
        "Compute.",
        "\\frac{1}{576}",
    ),
    "openr1": ("openr1", OPENR1, "What is $2^3$?", "8"),
    "deepscaler": (
        "deepscaler",
        {"problem": "Halve one.", "answer": "\\frac{1}{2}", "solution": ""},
        "Halve one.",
        "\\frac{1}{2}",
    ),
}


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
CHAT_TEXT = "<system>Be brief.\n<user>1+1?\n<assistant>"
# As other trainers write them: (preset, a row, its prompt in TEMPLATE, its answer)
LAYOUTS = {
    "verl": (
        "verl",
        {
            "data_source": "openai/gsm8k",
            "prompt": CHAT,
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "2"},
            "extra_info": {"split": "train", "index": 0, "answer": "1+1=2 #### 2", "question": "1+1?"},
        },
        CHAT_TEXT,
        "2",
    ),
    "verl, no model": ("verl", {"prompt": CHAT, "extra_info": {"answer": 2}}, CHAT_TEXT, "2"),
    "trl": ("trl", {"prompt": CHAT, "solution": "It is $\\boxed{2}$."}, CHAT_TEXT, "2"),
    "trl, text": ("trl", {"prompt": "1+1?", "ground_truth": 2}, "<user>1+1?\n<assistant>", "2"),
    "openrlhf": ("openrlhf", {"input": "1+1?", "label": "2"}, "<user>1+1?\n<assistant>", "2"),
    "openrlhf, messages": ("openrlhf", {"context_messages": CHAT, "answer": "2"}, CHAT_TEXT, "2"),
}


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE)


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(source, tokenizer, **changes):
    preset = changes.get("preset")
    reward = {"name": "gsm8k" if preset == "gsm8k" else "math"}
    return load_data(tokenizer, {"train": source, "template": "raw"} | changes, **reward)


def refusal(source, tokenizer, **changes):
    with pytest.raises(ValueError) as caught:
        load(source, tokenizer, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("preset", "reward", "fitting"),
    [("gsm8k", "math", "gsm8k"), ("math", "gsm8k", "math"), ("openr1", "gsm8k", "math"), ("aime", "gsm8k", "math")],
)
def test_a_reward_that_looks_for_what_the_preset_does_not_ask_for(preset, reward, fitting):
    paths = ["model.path=m", "data.train=t", "vstar.dir=v"]
    given = [*paths, f"data.preset={preset}", f"reward.name={reward}"]
    with pytest.raises(RecipeError) as caught:
        build_recipe({}, given)
    (problem,) = caught.value.problems
    assert problem.startswith(f"reward.name: {reward} looks for ") and f"use reward.name={fitting}, or a" in problem
    for fit in ([f"reward.name={fitting}"], ["data.prompt_format='{prompt} Say it.'"], ["reward.name=my:Own"]):
        build_recipe({}, [*given, *fit])
    build_recipe({}, [*paths, "data.preset=verl", f"reward.name={reward}"])


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("preset", "row", "shown", "answer"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_other_trainers(preset, row, shown, answer, suffix, tokenizer, tmp_path):
    source = write(tmp_path / f"rows{suffix}", [row, row])
    loaded = load(source, tokenizer, preset=preset, template="chat")
    assert [(prompt.text, prompt.answer) for prompt in loaded.prompts] == [(shown, answer)] * 2


def test_the_first_column_of_a_layout_counts(tokenizer, tmp_path):
    row = {"prompt": "P", "input": "I", "solution": "0", "ground_truth": "1", "answer": "2", "label": "3"}
    for preset, columns in (("trl", ["answer", "ground_truth", "solution"]), ("openrlhf", ["label", "answer"])):
        for index, column in enumerate(columns):
            rows = [{name: value for name, value in row.items() if name not in columns[:index]}]
            (prompt,) = load(write(tmp_path / "rows.jsonl", rows), tokenizer, preset=preset).prompts
            assert (prompt.text, prompt.answer) == ("P" if preset == "trl" else "I", row[column])


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_an_answer_within_null_is_null(suffix, tokenizer, tmp_path):
    """It is not looked for elsewhere, where verl has a whole solution."""
    row = {"prompt": "1+1?", "reward_model": {"ground_truth": "2"}, "extra_info": {"answer": "1+1 is #### 2"}}
    source = write(tmp_path / f"rows{suffix}", [row, row | {"reward_model": None}])
    loaded = load(source, tokenizer, preset="verl")
    assert [prompt.answer for prompt in loaded.prompts] == ["2"]
    assert list(loaded.left_out["unanswered"].values()) == [1]
    assert refusal(source, tokenizer, answer_column="reward_model.ground_truth").startswith(
        f"data.answer_column: row 1 of {source} has None in 'reward_model.ground_truth', not text"
    )


def test_another_column_of_a_preset_has_its_answers_as_they_are_meant(tokenizer, tmp_path):
    """Without white space around, and none where there is no text."""
    rows = [OPENR1 | {"end": " 7\n"}, OPENR1 | {"end": " "}]
    loaded = load(write(tmp_path / "rows.jsonl", rows), tokenizer, preset="openr1", answer_column="end")
    assert [prompt.answer for prompt in loaded.prompts] == ["7"] and len(loaded.left_out["unanswered"]) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("preset", "row", "question", "answer"), SCHEMAS.values(), ids=SCHEMAS)
def test_schemas(preset, row, question, answer, suffix, tokenizer, tmp_path):
    source = write(tmp_path / f"rows{suffix}", [row, row])
    loaded = load(source, tokenizer, preset=preset)
    assert [(p.answer, p.row) for p in loaded.prompts] == [(answer, 0), (answer, 1)]
    assert loaded.left_out == {"too_long": {}, "unanswered": {}}
    asked = "after #### on the last line." if preset == "gsm8k" else "within \\boxed{}."
    for prompt in loaded.prompts:
        assert prompt.text.startswith(f"{question}\n") and prompt.text.endswith(asked)
        assert tokenizer.decode(prompt.token_ids) == prompt.text


@pytest.mark.parametrize(("preset", "row", "question", "answer"), SCHEMAS.values(), ids=SCHEMAS)
def test_answers_suit_the_reward(preset, row, question, answer, tokenizer, tmp_path):
    (prompt,) = load(write(tmp_path / "rows.jsonl", [row]), tokenizer, preset=preset).prompts
    reward = get_reward("gsm8k" if preset == "gsm8k" else "math", {})
    form = "So it is\n#### {}" if preset == "gsm8k" else "So it is $\\boxed{{{}}}$."
    for response, grade in ((form.format(answer), 1.0), (form.format("31"), 0.0)):
        assert reward(GradeRequest(prompt.text, response, prompt.answer, "stop")) == grade


def test_the_recipe_offers_the_presets_there_are():
    literal, _ = get_args(DataConfig.model_fields["preset"].annotation)
    assert get_args(literal) == tuple(PRESETS)


def test_what_the_recipe_sets_beats_the_preset(tokenizer, tmp_path):
    rows = [MATH_500 | {"asked": "Why?", "checked": "$7$"}]
    source = write(tmp_path / "rows.jsonl", rows)

    def prompt(**changes):
        (prompt,) = load(source, tokenizer, preset="math", **changes).prompts
        return prompt.text, prompt.answer

    text, answer = prompt()
    assert prompt(prompt_column="asked") == (text.replace(MATH_500["problem"], "Why?"), answer)
    assert prompt(answer_column="solution") == (text, "1")  # read as the preset reads a solution
    assert prompt(answer_column="checked") == (text, "$7$")
    assert prompt(prompt_format="{prompt}") == (MATH_500["problem"], answer)
    assert prompt(prompt_format="Q: {prompt} \\boxed{}")[0] == f"Q: {MATH_500['problem']} \\boxed{{}}"


def test_no_preset_is_prompt_and_answer_as_they_are(tokenizer, tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"prompt": " 1 ", "answer": " #### 2 "}])
    (prompt,) = load(source, tokenizer).prompts
    assert (prompt.text, prompt.answer) == (" 1 ", " #### 2 ")
    plain = row_format(DataConfig(train=source))
    assert (plain.prompts, tuple(plain.answers), plain.prompt_format) == (("prompt",), ("answer",), "{prompt}")


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("no box", None),
        ("$\\boxed{}$", None),
        ("$\\boxed{ }$", None),
        ("$\\boxed{1$", None),
        ("\\boxedin{1}", None),
        ("\\boxed", None),
        ("$\\boxed{1}$, then $\\boxed{ 2 }$", "2"),
        ("$\\boxed {3}$", "3"),
        ("$\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"),
        ("$\\boxed{\\{1, 2\\}}$", "\\{1, 2\\}"),
        ("$\\boxed{\\left\\{ x \\right.}$ and {more}", "\\left\\{ x \\right."),
        ("$\\boxed{1\\\\2}$", "1\\\\2"),
        ("$\\boxed{\n4\n}$", "4"),
        ("$\\fbox{5}$", "5"),
        ("$\\boxed 6$.", "6"),
        ("$\\boxed7$.", "7"),
    ],
)
def test_boxed_answer(solution, answer):
    assert boxed_answer(solution) == answer


# --- rows without an answer

UNANSWERED = {
    "gsm8k": (GSM8K, [{"answer": "no mark 18"}, {"answer": "18\n#### "}, {"answer": None}]),
    "math": (MATH, [{"solution": "no box"}, {"solution": ""}, {"solution": None}]),
    "aime": ({"problem": "A", "answer": 204}, [{"answer": None}]),
    "openr1": (
        OPENR1,
        [{"answer": ""}, {"answer": None}, {"answer": " "}, {"answer": "Proof"}, {"answer": "notfound"}],
    ),
    "deepscaler": ({"problem": "A", "answer": "1"}, [{"answer": ""}, {"answer": None}]),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("preset", UNANSWERED)
def test_rows_without_an_answer_are_left_out_and_listed(preset, suffix, tokenizer, tmp_path):
    good, bad = UNANSWERED[preset]
    rows = [good, *(good | change for change in bad), good]
    loaded = load(write(tmp_path / f"rows{suffix}", rows), tokenizer, preset=preset)
    assert [p.row for p in loaded.prompts] == [0, len(rows) - 1]
    unanswered = loaded.left_out["unanswered"]
    assert list(unanswered.values()) == list(range(1, len(rows) - 1))
    assert all(len(bytes.fromhex(i)) == 16 for i in unanswered)
    assert not {p.prompt_id for p in loaded.prompts} & set(unanswered)
    every = load(write(tmp_path / f"rows{suffix}", [good] * len(rows)), tokenizer, preset=preset)
    assert every.prompts[-1] == loaded.prompts[-1]
    assert every.dataset_hash != loaded.dataset_hash


def test_an_empty_cell_of_a_column_of_numbers(tokenizer, tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"problem": ["A", "B"], "answer": [204.0, float("nan")]}), path)
    loaded = load(str(path), tokenizer, preset="aime")
    assert [p.answer for p in loaded.prompts] == ["204.0"] and list(loaded.left_out["unanswered"].values()) == [1]
    assert refusal(str(path), tokenizer, prompt_column="problem") == (
        f"data.answer_column: row 1 of {path} has nan in 'answer', not text; name a column of text"
    )


def test_a_row_counts_once(tokenizer, tmp_path):
    rows = [{"problem": "A" * length, "answer": answer} for length, answer in ((2, "1"), (2, ""), (9, "1"), (9, ""))]
    source = write(tmp_path / "rows.jsonl", rows)
    loaded = load(source, tokenizer, preset="deepscaler", prompt_format="{prompt}", max_prompt_tokens=5)
    assert [p.row for p in loaded.prompts] == [0]
    assert {why: list(rows.values()) for why, rows in loaded.left_out.items()} == {
        "too_long": [2],
        "unanswered": [1, 3],
    }


def test_no_answer_at_all(tokenizer, tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"problem": "A", "solution": "1"}] * 2)
    assert refusal(source, tokenizer, preset="math") == (
        f"data.preset: math, but none of the 2 rows of {source} has an answer in 'answer' or 'solution'; "
        "use another preset, or name the column in data.answer_column"
    )


# --- rows of another shape


def test_columns_that_are_not_there(tokenizer, tmp_path):
    source = write(tmp_path / "rows.jsonl", [GSM8K])
    assert refusal(source, tokenizer, preset="math") == (
        f"data.prompt_column (data.preset: math): 'problem' is not a column of {source}; use one of question, answer"
    )
    source = write(tmp_path / "math.jsonl", [{"problem": "A", "final": "1"}])
    assert refusal(source, tokenizer, preset="math").startswith(
        "data.answer_column (data.preset: math): 'answer' or 'solution' is not a column of "
    )
    assert refusal(source, tokenizer, preset="math", answer_column="end").startswith("data.answer_column: 'end' is not")


@pytest.mark.parametrize(
    ("value", "shown"), [([["1"]], "[['1']]"), ({"value": 1}, "{'value': 1}"), (True, "True")], ids=str
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_values_that_are_not_text(value, shown, suffix, tokenizer, tmp_path):
    source = write(tmp_path / f"rows{suffix}", [OPENR1 | {"answer": value}])
    assert refusal(source, tokenizer, preset="openr1") == (
        f"data.answer_column (data.preset: openr1): row 0 of {source} has {shown} in 'answer', not text; "
        "name a column of text"
    )
    source = write(tmp_path / f"others{suffix}", [OPENR1 | {"problem": value}])
    assert refusal(source, tokenizer, preset="openr1").startswith("data.prompt_column (data.preset: openr1): row 0 of ")


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (["1", "2"], "1, 2"),
        ([7], "7"),
        (7, "7"),
        (datetime.date(2024, 5, 1), "2024-05-01"),
        (datetime.datetime(2024, 5, 1), "2024-05-01"),
        (datetime.datetime(2024, 5, 1, 17, 30), "2024-05-01 17:30:00"),
        (Decimal("1.10"), "1.10"),
    ],
    ids=str,
)
def test_answers_of_other_types_are_read_as_text(value, answer, tokenizer, tmp_path):
    source = write(tmp_path / "rows.parquet", [{"prompt": "A", "deep": {"answer": value}}])
    assert load(source, tokenizer, answer_column="deep.answer").prompts[0].answer == answer


def test_a_long_value_is_shown_in_part(tokenizer, tmp_path):
    source = write(tmp_path / "rows.jsonl", [OPENR1 | {"answer": {"value": "9" * 5000}}])
    assert len(refusal(source, tokenizer, preset="openr1")) < 500


# --- the warm start


def test_warm_start_pairs_are_shown_in_the_same_way(tokenizer, tmp_path):
    from megatron_apo.preflight import warmup_examples

    tokenizer.save_pretrained(tmp_path / "start")
    (tmp_path / "start" / "generation_config.json").write_text('{"eos_token_id": 0}')
    pairs = write(tmp_path / "pairs.jsonl", [{"question": "2+2?", "response": "#### 4"}])
    sets = [
        "model.path=m",
        "data.train=t.jsonl",
        "vstar.dir=v",
        f"warmup.start={tmp_path}/start",
        f"warmup.data={pairs}",
        "reward.name=gsm8k",
    ]
    sets += ["data.preset=gsm8k", "data.system=Count."]
    recipe = build_recipe({}, sets)
    examples = warmup_examples(recipe)
    shown = row_format(recipe.data).show("2+2?")
    assert [tokenizer.decode(ids) for ids in examples.prompts] == [f"<system>Count.\n<user>{shown}\n<assistant>"]
    assert [tokenizer.decode(ids[:-1]) for ids in examples.responses] == ["#### 4"]


def test_a_warm_start_prompt_may_be_messages(tmp_path):
    from megatron_apo.data.rendering import PromptRenderer
    from megatron_apo.data.sft import read_examples

    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer = build_chat_tokenizer(refuses + CHAT_TEMPLATE)
    turns = [
        {"role": "user", "content": "1+"},
        {"role": "assistant", "content": "2+"},
        {"role": "user", "content": "3"},
    ]
    rows = [{"prompt": turns, "response": "6"}, {"prompt": "4", "response": "4"}]

    def read(rows):
        pairs = write(tmp_path / "pairs.jsonl", rows)
        sets = ["model.path=m", "data.train=t.jsonl", "vstar.dir=v", "warmup.start=s", f"warmup.data={pairs}"]
        recipe = build_recipe({}, [*sets, "data.prompt_format='{prompt}+0'"])
        return read_examples(recipe, PromptRenderer(tokenizer, recipe.data), [0])

    examples = read(rows)
    assert [tokenizer.decode(ids) for ids in examples.prompts] == ["1+2+3+0=", "4+0="]
    with pytest.raises(ValueError) as caught:
        read([*rows, {"prompt": [{"role": "system", "content": "1"}, *turns], "response": "6"}])
    assert str(caught.value).startswith("data.prompt_column: the chat template refuses row 2 of ")
    with pytest.raises(ValueError, match="^data.prompt_column: row 2 of .* neither text nor messages"):
        read([*rows, {"prompt": turns[:2], "response": "6"}])
