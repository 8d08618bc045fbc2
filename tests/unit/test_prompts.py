"""Prompts: the same ids and token ids wherever a file lies, and errors that name the recipe's key."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_apo.config import RecipeError, build_recipe
from megatron_apo.data.arithmetic import build_tokenizer
from megatron_apo.data.rendering import prompt_hash
from megatron_apo.data.rows import ABSENT, read_rows
from tests.chat import TEMPLATE, build_chat_tokenizer
from tests.prompts import load_data

ROWS = [("1+2", "3"), ("10+20", "30"), ("1+2", "3"), ("100+200", "300")]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def chat_tokenizer():
    return build_chat_tokenizer()


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "train.jsonl", [{"prompt": p, "answer": a} for p, a in ROWS])


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(source, tokenizer, part="train", **changes):
    return load_data(tokenizer, {"train": source, "template": "raw"} | changes, part)


def test_rows_become_prompts(source, tokenizer):
    loaded = load(source, tokenizer)
    assert [(p.text, p.answer, p.row) for p in loaded.prompts] == [(p, a, i) for i, (p, a) in enumerate(ROWS)]
    for prompt in loaded.prompts:
        assert list(prompt.token_ids) == tokenizer(prompt.text)["input_ids"]
        assert (
            prompt.text_hash
            == hashlib.sha256(json.dumps([prompt.text, list(prompt.token_ids)]).encode()).hexdigest()[:32]
        )
    assert loaded.left_out == {"too_long": {}, "unanswered": {}}


def test_repeated_rows_have_ids_of_their_own_and_the_same_text_hash(source, tokenizer):
    prompts = load(source, tokenizer).prompts
    assert len({p.prompt_id for p in prompts}) == 4 and all(len(bytes.fromhex(p.prompt_id)) == 16 for p in prompts)
    assert prompts[0].text_hash == prompts[2].text_hash != prompts[1].text_hash


def test_ids_depend_on_row_and_content_alone(source, tokenizer, tmp_path):
    loaded = load(source, tokenizer)
    (tmp_path / "elsewhere").mkdir()
    moved = load(str(shutil.copy(source, tmp_path / "elsewhere")), tokenizer)
    renamed = load(str(shutil.copy(source, tmp_path / "other.jsonl")), tokenizer)
    assert moved == renamed == loaded
    wider = load(
        write_jsonl(tmp_path / "elsewhere" / "train.jsonl", [{"x": 1, "answer": a, "prompt": p} for p, a in ROWS]),
        tokenizer,
    )
    assert wider == loaded
    answers = load(
        write_jsonl(tmp_path / "elsewhere" / "train.jsonl", [{"prompt": p, "answer": "7"} for p, _ in ROWS]), tokenizer
    )
    assert not {p.prompt_id for p in answers.prompts} & {p.prompt_id for p in loaded.prompts}
    assert answers.dataset_hash != loaded.dataset_hash


def test_a_changed_file_is_read_again(source, tokenizer):
    before = load(source, tokenizer)
    stat = os.stat(source)
    write_jsonl(Path(source), [{"prompt": p, "answer": "9" * len(a)} for p, a in ROWS])
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert [p.answer for p in load(source, tokenizer).prompts] == ["9", "99", "9", "999"]
    assert [p.answer for p in before.prompts] == ["3", "30", "3", "300"]


def test_parquet_and_other_columns(tmp_path, tokenizer):
    path = tmp_path / "problems.parquet"
    pq.write_table(pa.table({"question": ["1+2", "3+4"], "result": [3, 7]}), path)
    loaded = load(str(path), tokenizer, prompt_column="question", answer_column="result")
    assert [(p.text, p.answer) for p in loaded.prompts] == [("1+2", "3"), ("3+4", "7")]


def test_too_long_prompts_are_left_out_and_listed(source, tokenizer, capsys):
    every = load(source, tokenizer)
    loaded = load(source, tokenizer, max_prompt_tokens=5)
    assert [p.text for p in loaded.prompts] == ["1+2", "10+20", "1+2"]
    assert loaded.left_out == {"too_long": {every.prompts[3].prompt_id: 3}, "unanswered": {}}
    assert capsys.readouterr().out == "data.train: 1 prompts too long, left out; the first is row 3\n"
    assert loaded.dataset_hash == every.dataset_hash


def test_the_first_rows(source, tokenizer):
    assert load(source, tokenizer, max_prompts=2).prompts == load(source, tokenizer).prompts[:2]


def test_many_rows_keep_their_order(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "long.jsonl", [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(3000)])
    prompts = load(source, tokenizer).prompts
    assert [(p.row, p.text, p.answer) for p in prompts] == [(i, f"{i}+1=", str(i + 1)) for i in range(3000)]


MESSAGES = [("system", "1+"), ("user", "2="), ("assistant", "3+"), ("user", "4")]


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_a_prompt_may_be_messages(chat_tokenizer, tmp_path):
    rows = [{"prompt": messages(*MESSAGES), "answer": "7"}, {"prompt": messages(("user", "5")), "answer": "5"}]
    source = write_jsonl(tmp_path / "messages.jsonl", rows)
    loaded = load(source, chat_tokenizer, template="chat", prompt_format="{prompt}+0")
    assert [prompt.text for prompt in loaded.prompts] == ["1+2=3+4+0=", "5+0="]
    assert len({prompt.prompt_id for prompt in loaded.prompts}) == 2
    named = [row | {"prompt": [one | {"name": None} for one in row["prompt"]]} for row in rows]
    assert load(write_jsonl(tmp_path / "named.jsonl", named), chat_tokenizer, template="chat").dataset_hash == (
        loaded.dataset_hash
    )
    alone = write_jsonl(tmp_path / "alone.jsonl", rows[1:])
    assert load(alone, chat_tokenizer, template="chat", system="8+").prompts[0].text == "8+5="


@pytest.mark.parametrize(
    ("prompt", "changes", "says"),
    [
        (messages(*MESSAGES), {"template": "raw"}, "data.template: raw, but a prompt is a list of messages; use chat"),
        (messages(*MESSAGES), {"system": "8+"}, "data.system: '8+', but a prompt has a system message of its own"),
        (messages(*MESSAGES[:3]), {}, "data.prompt_column: row 0 of"),  # the assistant's turn is the last
        ([], {}, "data.prompt_column: row 0 of"),
        ([{"role": "user"}], {}, "data.prompt_column: row 0 of"),
        ([{"role": "user", "content": 5}], {}, "data.prompt_column: row 0 of"),
        (["1"], {}, "data.prompt_column: row 0 of"),
        (messages(("system", "8+"), ("user", "")), {}, "data.train: row 0 of"),
    ],
)
def test_messages_that_are_no_prompt(chat_tokenizer, tmp_path, prompt, changes, says):
    source = write_jsonl(tmp_path / "messages.jsonl", [{"prompt": prompt, "answer": "7"}])
    assert refusal(source, chat_tokenizer, **({"template": "chat"} | changes)).startswith(says)


def test_a_row_that_cannot_be_rendered_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_apo.data.prompts._RENDER_ROWS", 2)
    rows = [{"prompt": "1", "answer": "7"}] * 3 + [{"prompt": messages(*MESSAGES), "answer": "7"}]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no\nsystem role') }}{% endif %}"
    assert refusal(source, build_chat_tokenizer(refuses + TEMPLATE), template="chat") == (
        f"data.prompt_column: the chat template refuses row 3 of {source} (no system role); "
        "write its messages as the template takes them, or leave the row out"
    )
    chat = build_chat_tokenizer()
    assert (
        refusal(source, chat) == f"data.template: raw, but a prompt is a list of messages; use chat (row 3 of {source})"
    )
    assert refusal(source, chat, template="chat", system="8+") == (
        f"data.system: '8+', but a prompt has a system message of its own; use null (row 3 of {source})"
    )


def test_ids_are_of_the_row_and_text_hashes_of_what_is_shown(source, tokenizer):
    plain, around = load(source, tokenizer), load(source, tokenizer, prompt_format="({prompt})")
    assert around.dataset_hash == plain.dataset_hash
    for one, other in zip(plain.prompts, around.prompts, strict=True):
        assert (other.prompt_id, other.text) == (one.prompt_id, f"({one.text})")
        assert other.text_hash == prompt_hash(other.text, other.token_ids) != one.text_hash


def test_length_counts_what_is_put_around_a_prompt(source, tokenizer):
    loaded = load(source, tokenizer, prompt_format="({prompt})", max_prompt_tokens=5)
    assert [p.text for p in loaded.prompts] == ["(1+2)", "(1+2)"] and len(loaded.left_out["too_long"]) == 2


@pytest.fixture
def hub(monkeypatch):
    """`datasets.load_dataset` of a hub that has one dataset: its calls are listed, its rows are here."""
    import datasets

    calls = []

    def load_dataset(path, name=None, *, split):
        calls.append((path, name, split))
        if name not in (None, "main", "socratic"):
            raise ValueError(f"BuilderConfig {name!r} not found. Available: ['main', 'socratic']")
        return datasets.Dataset.from_list([{"prompt": p, "answer": a} for p, a in ROWS])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_datasets(hub, tokenizer):
    whole = load("some/sums", tokenizer)
    main = load("some/sums", tokenizer, subset="main", split="test")
    assert hub == [("some/sums", None, "train"), ("some/sums", "main", "test")]
    assert [(p.text, p.answer) for p in main.prompts] == [(p.text, p.answer) for p in whole.prompts] == ROWS
    others = [load("some/sums", tokenizer, split="test"), load("some/sums", tokenizer, subset="main")]
    assert whole == main == others[0] == others[1], "the same rows, wherever they are"


def test_a_column_of_the_hub_that_is_not_used_may_hold_anything(monkeypatch, tokenizer):
    import datasets

    features = datasets.Features(
        {"prompt": datasets.Value("string"), "x": datasets.Audio(), "answer": datasets.Value("float32")}
    )
    table = pa.table([["1"], [{"bytes": b"no sound", "path": None}], [0.1]], schema=features.arrow_schema)
    rows = datasets.Dataset(table)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert [one.answer for one in load("some/sounds", tokenizer).prompts] == ["0.1"]
    (row,) = read_rows("some/sounds", "data.train", columns=["prompt"])
    assert row == {"prompt": "1", "x": {"bytes": ABSENT, "path": ABSENT}, "answer": ABSENT}
    message = refusal("some/sounds", tokenizer, prompt_column="y", answer_column="z")
    assert message.startswith("data.prompt_column: 'y' is not a column of some/sounds; use one of prompt, x.")


def test_a_subset_that_is_not_there(hub, tokenizer):
    assert refusal("some/sums", tokenizer, subset="mian") == (
        "data.train: cannot load 'some/sums' (subset 'mian', split 'train') from the hub "
        "(BuilderConfig 'mian' not found. Available: ['main', 'socratic']); "
        "use a .jsonl or .parquet file, or a hub dataset's name, data.subset and data.split"
    )


# --- errors


def refusal(source, tokenizer, **changes):
    with pytest.raises(ValueError) as caught:
        load(source, tokenizer, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file(tokenizer, tmp_path):
    absent = str(tmp_path / "absent.jsonl")
    assert refusal(absent, tokenizer).startswith(f"data.train: {absent} is not a file; give a .jsonl or .parquet file")
    assert refusal("t.jsonl", tokenizer, part="eval", eval=absent).startswith("data.eval: ")
    with pytest.raises(ValueError, match="^warmup.data: "):
        next(read_rows(absent, "warmup.data"))


@pytest.mark.parametrize("name", ["a.csv", "a.JSONL", "a.jsonl.gz", "a"])
def test_files_of_another_name(tokenizer, tmp_path, name):
    (tmp_path / name).write_text('{"prompt": "1", "answer": "1"}')
    source = str(tmp_path / name)
    says = f"data.train: {source} is a file, but not .jsonl or .parquet by its name; convert it, or rename it"
    assert refusal(source, tokenizer) == says


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("12345678901234567890123", "12345678901234567890123"),
        ("0.00001", "0.00001"),
        ("18.0", "18.0"),
        ("1.10", "1.10"),
        ("1e-7", "1e-7"),
        ('"2024-05-01"', "2024-05-01"),
        ('"007"', "007"),
        ("-3", "-3"),
        ("-0", "-0"),
        ("9" * 5000, "9" * 5000),
        ("1e999", "1e999"),
        ("[1, 2.50]", "1, 2.50"),
        ('"18"', "18"),
        ('"2\\u2009500"', "2\u2009500"),
    ],
)
def test_an_answer_is_what_is_written(tmp_path, tokenizer, answer, text):
    """Whatever the others of its column are."""
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "1", "answer": "x"}}\n\n{{"prompt": "2", "answer": {answer}}}\n')
    assert [prompt.answer for prompt in load(str(tmp_path / "a.jsonl"), tokenizer).prompts] == ["x", text]
    (tmp_path / "b.json").write_text(f'\ufeff [{{"prompt": "2",\n "answer": {answer}}}]')
    assert [prompt.answer for prompt in load(str(tmp_path / "b.json"), tokenizer).prompts] == [text]


def test_a_column_that_is_not_used_may_hold_anything(tmp_path, tokenizer):
    odd = [None] * 50 + ["text", 1, [1, "a"], {"x": {}}, [], 1.5, True, {"y": 1}]
    source = write_jsonl(tmp_path / "odd.jsonl", [{"prompt": "1", "answer": "1", "extra": one} for one in odd])
    assert len(load(source, tokenizer).prompts) == len(odd)
    (tmp_path / "long.jsonl").write_text('{"prompt": "1", "answer": "1", "extra": ' + "9" * 5000 + "}")
    assert len(load(str(tmp_path / "long.jsonl"), tokenizer).prompts) == 1


def odd_parquet(path):
    """A column that no `datasets` takes, one whose days Python has not, and two within a column."""
    columns = {
        "prompt": ["1", "2"],
        "map": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())),
        "day": pa.array([2**31 - 1, 0], pa.int32()).cast(pa.date32()),
        "deep": [{"answer": "3", "other": 1}, {"answer": "4", "other": 2}],
        "ab.c": ["5", "6"],
    }
    pq.write_table(pa.table(columns), path, row_group_size=1)
    return str(path)


def test_a_column_of_parquet_that_is_not_used_may_hold_anything(tmp_path, tokenizer):
    source = odd_parquet(tmp_path / "odd.parquet")
    for column, answers in (("deep.answer", ["3", "4"]), ("ab.c", ["5", "6"])):
        assert [one.answer for one in load(source, tokenizer, answer_column=column).prompts] == answers
    for changes, key in (({}, "answer"), ({"answer_column": "deep.truth"}, "deep.truth")):
        assert refusal(source, tokenizer, **changes) == (
            f"data.answer_column: {key!r} is not a column of {source}; "
            "use one of prompt, map, day, deep.answer, deep.other, ab.c"
        )
    message = refusal(source, tokenizer, prompt_column="x", answer_column="y")
    assert message.startswith(
        f"data.prompt_column: 'x' is not a column of {source}; use one of prompt, map, day, deep."
    )
    message = refusal(source, tokenizer, answer_column="day")
    assert message.startswith(f"data.train: {source} is not a readable parquet file (")


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0.00001, pa.float64(), "0.00001"),
        (1e22, pa.float64(), "10000000000000000000000"),
        (18.0, pa.float64(), "18.0"),
        (0.1, pa.float32(), "0.1"),
        (0.00001, pa.float32(), "0.00001"),
        (0.1, pa.float16(), "0.1"),
        ([0.1, 2], pa.list_(pa.float32()), "0.1, 2.0"),
        ([0.1, 2], pa.list_view(pa.float32()), "0.1, 2.0"),
        (Decimal("1e-7"), pa.decimal128(9, 7), "0.0000001"),
        (2**63, pa.uint64(), "9223372036854775808"),
    ],
    ids=str,
)
def test_numbers_of_parquet_are_the_shortest_without_an_exponent(tmp_path, tokenizer, value, kind, text):
    value = np.float16(value) if kind == pa.float16() else value
    deep = pa.array([{"answer": value}], pa.struct([("answer", kind)]))
    pq.write_table(pa.table({"prompt": ["1"], "answer": pa.array([value], kind), "deep": deep}), tmp_path / "a.parquet")
    for column in ("answer", "deep.answer"):
        loaded = load(str(tmp_path / "a.parquet"), tokenizer, answer_column=column)
        assert [prompt.answer for prompt in loaded.prompts] == [text]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_numbers_that_are_not_finite_are_no_answers(tmp_path, tokenizer, value):
    files = [write_jsonl(tmp_path / "a.jsonl", [{"prompt": "1", "answer": value}])]
    for kind in (pa.float32(), pa.float64()):
        files.append(str(tmp_path / f"{kind}.parquet"))
        pq.write_table(pa.table({"prompt": ["1"], "answer": pa.array([value], kind)}), files[-1])
    for file in files:
        message = f"data.answer_column: row 0 of {file} has {value} in 'answer', not text; name a column of text"
        assert refusal(file, tokenizer) == message


def test_json_within_parquet(tmp_path, tokenizer):
    """As `datasets` writes a column whose rows differ in type."""
    import datasets

    rows = datasets.Dataset.from_dict(
        {"prompt": ["1", "2"], "answer": [0.10, "x"], "deep": [{"a": [7]}, {"a": 8}]}, on_mixed_types="use_json"
    )
    rows.to_parquet(tmp_path / "mixed.parquet")
    source = str(tmp_path / "mixed.parquet")
    assert [one.answer for one in load(source, tokenizer).prompts] == ["0.1", "x"]
    assert [one.answer for one in load(source, tokenizer, answer_column="deep.a").prompts] == ["7", "8"]


def test_a_column_within_a_column(tmp_path, tokenizer):
    """As verl writes them."""
    row = {"prompt": "1", "reward_model": {"style": "rule", "ground_truth": 7}, "extra_info": {"a": {"answer": "8"}}}
    source = write_jsonl(tmp_path / "verl.jsonl", [row])
    for column, answer in (("reward_model.ground_truth", "7"), ("extra_info.a.answer", "8")):
        assert load(source, tokenizer, answer_column=column).prompts[0].answer == answer
    assert refusal(source, tokenizer, answer_column="reward_model.truth") == (
        f"data.answer_column: 'reward_model.truth' is not a column of {source}; use one of prompt, reward_model.style, "
        "reward_model.ground_truth, extra_info.a"
    )
    dotted = write_jsonl(tmp_path / "dotted.jsonl", [{"prompt": "1", "a.b": "9", "a": {"b": "10"}}])
    assert load(dotted, tokenizer, answer_column="a.b").prompts[0].answer == "9"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"prompt": "1", "answer": "1"}\n{"prompt": ', "row 1: "),
        ('{"prompt": "1", "answer": "1"}\n[1, 2]\n', "row 1 is a list, not an object"),
        ("[1, 2]", "row 0 is a number, not an object"),
        ("[", "Expecting value"),
        ('[{"prompt": "1", "answer": "1"},\n {"x": ' + "[" * 2000 + "]" * 2000 + "}]", "row 1: it is nested too deep"),
        ("\x00", "row 0: "),
        ('{"prompt": "1", "answer": ' + "[" * 100000, "row 0: it is nested too deep"),
    ],
)
def test_json_that_is_none(tmp_path, tokenizer, text, says):
    (tmp_path / "a.json").write_text(text)
    message = refusal(str(tmp_path / "a.json"), tokenizer)
    assert message.startswith(f"data.train: {tmp_path / 'a.json'} is not a readable json file ({says}")


def test_a_missing_column(source, tokenizer, tmp_path):
    message = refusal(source, tokenizer, prompt_column="question")
    assert message == f"data.prompt_column: 'question' is not a column of {source}; use one of prompt, answer"
    assert refusal(source, tokenizer, answer_column="label").startswith("data.answer_column: 'label' is not a column")
    later = write_jsonl(tmp_path / "later.jsonl", [{"prompt": "1", "answer": "1"}, {"prompt": "2", "x": "2"}])
    assert refusal(later, tokenizer) == (
        f"data.answer_column: 'answer' is not a column of row 1 of {later}; use one of prompt, x"
    )


def test_values_that_are_not_text(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "1", "answer": "1"}, {"prompt": "2", "answer": None}])
    assert (
        refusal(source, tokenizer)
        == f"data.answer_column: row 1 of {source} has None in 'answer', not text; name a column of text"
    )
    source = write_jsonl(tmp_path / "b.jsonl", [{"prompt": ["1"], "answer": "1"}])
    assert refusal(source, tokenizer).startswith("data.prompt_column: row 0")


def test_files_that_hold_nothing(tmp_path, tokenizer, source):
    empty = tmp_path / "empty.jsonl"
    for nothing in ("", "\n"):
        empty.write_text(nothing)
        assert refusal(str(empty), tokenizer) == f"data.train: {empty} has no rows; give another source"
    blank = write_jsonl(tmp_path / "blank.jsonl", [{"prompt": "", "answer": "1"}])
    for prompt_format in ("{prompt}", "{prompt}="):
        message = refusal(blank, tokenizer, prompt_format=prompt_format)
        assert message.startswith(f"data.train: row 0 of {blank} is an empty prompt")
    assert refusal(source, tokenizer, max_prompt_tokens=2).startswith("data.max_prompt_tokens: 2 is less than")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "1", "ans')
    assert refusal(str(tmp_path / "broken.jsonl"), tokenizer).startswith("data.train: ")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    assert refusal(str(tmp_path / "broken.parquet"), tokenizer).startswith("data.train: ")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (
            "data.prompt_format=Think.",
            "data.prompt_format: 'Think.' is not allowed; use text that has {prompt} in it once, in quotes",
        ),
        (
            "data.prompt_format='{prompt} {prompt}'",
            "data.prompt_format: '{prompt} {prompt}' is not allowed; use text that has {prompt} in it once, in quotes",
        ),
        (
            "data.prompt_format={prompt}",  # a mapping in YAML
            "data.prompt_format: {'prompt': None} is not allowed; use text that has {prompt} in it once, in quotes",
        ),
        (
            "data.system=Think.",
            "data.system: 'Think.' is not allowed; use null with data.template: raw, which has no system message, "
            "or data.template: chat",
        ),
        (
            "data.preset=gsm",
            "data.preset: 'gsm' is not allowed; use 'gsm8k', 'math', 'aime', 'openr1', 'deepscaler', 'verl', 'trl' or "
            "'openrlhf'",
        ),
    ],
)
def test_recipes_that_cannot_be_meant(override, problem):
    paths = ["model.path=m", "data.train=t.jsonl", "vstar.dir=v", "data.template=raw"]
    with pytest.raises(RecipeError) as caught:
        build_recipe({}, [*paths, override])
    assert caught.value.problems == [problem]
    build_recipe({}, [*paths, "data.prompt_format='{prompt} \\boxed{}'", "data.template=chat", "data.system=Think."])


def test_reading_a_file_is_quiet_and_leaves_nothing_behind(source, tmp_path):
    """In a process of its own: the cache folder is fixed when `datasets` is imported."""
    home = tmp_path / "home"
    home.mkdir()
    code = f"from megatron_apo.data.rows import read_rows; assert len(list(read_rows({source!r}, 'data.train'))) == 4"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    env |= {"HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not [path for path in home.rglob("*") if path.is_file()]
