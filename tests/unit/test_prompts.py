"""Prompts: the same ids and token ids wherever a file lies, and errors that name the recipe's key."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_apo.config import DataConfig
from megatron_apo.data.arithmetic import build_tokenizer
from megatron_apo.data.prompts import PromptRenderer, load_prompts, read_rows, tokenizer_hash

# A chat template in the task's characters: the user's turn ends with "=", a closed think block switches thinking off.
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)
ROWS = [("1+2", "3"), ("10+20", "30"), ("1+2", "3"), ("100+200", "300")]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "train.jsonl", [{"prompt": p, "answer": a} for p, a in ROWS])


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(source, **changes):
    return DataConfig(**({"train": source, "template": "raw"} | changes))


def load(source, tokenizer, max_prompts=None, **changes):
    data = config(source, **changes)
    return load_prompts(source, data, PromptRenderer(tokenizer, data), max_prompts)


def test_rows_become_prompts(source, tokenizer):
    loaded = load(source, tokenizer)
    assert [(p.text, p.answer, p.row) for p in loaded.prompts] == [(p, a, i) for i, (p, a) in enumerate(ROWS)]
    for prompt in loaded.prompts:
        assert list(prompt.token_ids) == tokenizer(prompt.text)["input_ids"]
        assert prompt.text_hash == hashlib.sha256(prompt.text.encode()).hexdigest()[:32]
    assert not loaded.too_long


def test_repeated_rows_have_ids_of_their_own_and_the_same_text_hash(source, tokenizer):
    prompts = load(source, tokenizer).prompts
    assert len({p.prompt_id for p in prompts}) == 4 and all(len(bytes.fromhex(p.prompt_id)) == 16 for p in prompts)
    assert prompts[0].text_hash == prompts[2].text_hash != prompts[1].text_hash


def test_ids_depend_on_name_row_and_content_only(source, tokenizer, tmp_path):
    loaded = load(source, tokenizer)
    (tmp_path / "elsewhere").mkdir()
    moved = load(str(shutil.copy(source, tmp_path / "elsewhere")), tokenizer)
    assert moved == loaded
    renamed = load(str(shutil.copy(source, tmp_path / "other.jsonl")), tokenizer)
    wider = load(
        write_jsonl(tmp_path / "elsewhere" / "train.jsonl", [{"x": 1, "answer": a, "prompt": p} for p, a in ROWS]),
        tokenizer,
    )
    assert wider == loaded
    answers = load(
        write_jsonl(tmp_path / "elsewhere" / "train.jsonl", [{"prompt": p, "answer": "7"} for p, _ in ROWS]), tokenizer
    )
    for other in (renamed, answers):
        assert not {p.prompt_id for p in other.prompts} & {p.prompt_id for p in loaded.prompts}
        assert other.dataset_hash != loaded.dataset_hash


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


def test_too_long_prompts_are_left_out_and_listed(source, tokenizer):
    every = load(source, tokenizer)
    loaded = load(source, tokenizer, max_prompt_tokens=5)
    assert [p.text for p in loaded.prompts] == ["1+2", "10+20", "1+2"]
    assert loaded.too_long == [every.prompts[3].prompt_id]
    assert loaded.dataset_hash == every.dataset_hash


def test_the_first_rows(source, tokenizer):
    assert load(source, tokenizer, max_prompts=2).prompts == load(source, tokenizer).prompts[:2]


def test_many_rows_keep_their_order(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "long.jsonl", [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(3000)])
    prompts = load(source, tokenizer).prompts
    assert [(p.row, p.text, p.answer) for p in prompts] == [(i, f"{i}+1=", str(i + 1)) for i in range(3000)]


@pytest.mark.parametrize(("thinking", "rendered"), [(None, "1+2="), (True, "1+2="), (False, "1+2=<think></think>")])
def test_chat_template_and_its_thinking_switch(chat_tokenizer, source, thinking, rendered):
    renderer = PromptRenderer(chat_tokenizer, config(source, template="chat", thinking=thinking))
    text, ids = renderer.render("1+2")
    assert text == rendered
    assert chat_tokenizer.decode(ids) == rendered


def test_special_tokens_are_added_once():
    """raw: the tokenizer's BOS; chat: the one the template writes, and no second."""
    from tokenizers import processors

    tokenizer = build_tokenizer()
    bos = tokenizer.pad_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", bos)]
    )
    tokenizer.chat_template = "<pad>" + TEMPLATE
    one = tokenizer("1", add_special_tokens=False)["input_ids"]
    equals = tokenizer("=", add_special_tokens=False)["input_ids"]
    assert PromptRenderer(tokenizer, config("x.jsonl")).render("1")[1] == (bos, *one)
    assert PromptRenderer(tokenizer, config("x.jsonl", template="chat")).render("1")[1] == (bos, *one, *equals)


def test_fingerprint_changes_with_what_decides_token_ids(chat_tokenizer):
    def fingerprint(tokenizer=chat_tokenizer, **changes):
        return PromptRenderer(tokenizer, config("x.jsonl", **({"template": "chat"} | changes))).fingerprint()

    base = fingerprint()
    assert set(base) == {"tokenizer_hash", "template_hash", "template", "thinking"}
    assert fingerprint(thinking=True) == base | {"thinking": "on"}
    assert fingerprint(thinking=False) == base | {"thinking": "off"}
    other = build_tokenizer()
    other.chat_template = TEMPLATE + " "
    assert fingerprint(other) == base | {"template_hash": hashlib.sha256((TEMPLATE + " ").encode()).hexdigest()}
    assert fingerprint(template="raw")["template"] == "raw"


def test_tokenizer_hash(tokenizer):
    base = tokenizer_hash(tokenizer)
    used = build_tokenizer()
    used(["1", "1+2"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(used) == base
    bigger = build_tokenizer()
    bigger.add_tokens(["?"])
    special = build_tokenizer()
    special.pad_token = "<eos>"
    assert len({base, tokenizer_hash(bigger), tokenizer_hash(special)}) == 3


# --- errors


def refusal(source, tokenizer, **changes):
    with pytest.raises(ValueError) as caught:
        load(source, tokenizer, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file(tokenizer, tmp_path):
    absent = str(tmp_path / "absent.jsonl")
    assert refusal(absent, tokenizer).startswith(f"data.train: {absent} is not a file; give a .jsonl or .parquet file")
    assert refusal(absent, tokenizer, train="t.jsonl", eval=absent).startswith("data.eval: ")
    with pytest.raises(ValueError, match="^warmup.data: "):
        next(read_rows(absent, "warmup.data"))


def test_a_missing_column(source, tokenizer):
    message = refusal(source, tokenizer, prompt_column="question")
    assert message == f"data.prompt_column: 'question' is not a column of {source}; use one of prompt, answer"
    assert refusal(source, tokenizer, answer_column="label").startswith("data.answer_column: 'label' is not a column")


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
    assert refusal(blank, tokenizer).startswith(f"data.train: row 0 of {blank} is an empty prompt")
    assert refusal(source, tokenizer, max_prompt_tokens=2).startswith("data.max_prompt_tokens: 2 is less than")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "1", "ans')
    assert refusal(str(tmp_path / "broken.jsonl"), tokenizer).startswith("data.train: ")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    assert refusal(str(tmp_path / "broken.parquet"), tokenizer).startswith("data.train: ")


def test_templates_that_are_not_there(tokenizer, chat_tokenizer):
    with pytest.raises(ValueError, match="^data.template: chat, but the tokenizer has no chat template; use raw"):
        PromptRenderer(tokenizer, config("x.jsonl", template="chat"))
    with pytest.raises(ValueError, match="^data.thinking: True, but the template has no enable_thinking switch"):
        PromptRenderer(chat_tokenizer, config("x.jsonl", template="raw", thinking=True))
    plain = build_tokenizer()
    plain.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="^data.thinking: False"):
        PromptRenderer(plain, config("x.jsonl", template="chat", thinking=False))


def test_reading_a_file_is_quiet_and_leaves_nothing_behind(source, tmp_path):
    """In a process of its own: the cache folder is fixed when `datasets` is imported."""
    home = tmp_path / "home"
    home.mkdir()
    code = (
        f"from megatron_apo.data.prompts import read_rows; assert len(list(read_rows({source!r}, 'data.train'))) == 4"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    env |= {"HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not [path for path in home.rglob("*") if path.is_file()]
