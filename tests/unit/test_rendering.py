"""Rendering: text and token ids of a row, what they depend on, and what a template or tokenizer cannot do."""

from __future__ import annotations

import hashlib

import pytest

from megatron_apo.config import DataConfig
from megatron_apo.data.arithmetic import build_tokenizer
from megatron_apo.data.rendering import PromptRenderer, tokenizer_hash
from tests.chat import TEMPLATE, build_chat_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def chat_tokenizer():
    return build_chat_tokenizer()


def config(source="x.jsonl", **changes):
    return DataConfig(**({"train": source, "template": "raw"} | changes))


@pytest.mark.parametrize(("thinking", "rendered"), [(None, "1+2="), (True, "1+2="), (False, "1+2=<think></think>")])
def test_chat_template_and_its_thinking_switch(chat_tokenizer, thinking, rendered):
    renderer = PromptRenderer(chat_tokenizer, config(template="chat", thinking=thinking))
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
    assert PromptRenderer(tokenizer, config()).render("1")[1] == (bos, *one)
    assert PromptRenderer(tokenizer, config(template="chat")).render("1")[1] == (bos, *one, *equals)


def test_fingerprint_changes_with_what_decides_token_ids(chat_tokenizer):
    def fingerprint(tokenizer=chat_tokenizer, **changes):
        return PromptRenderer(tokenizer, config(**({"template": "chat"} | changes))).fingerprint()

    base = fingerprint()
    assert set(base) == {"tokenizer_hash", "template_hash", "template", "thinking"}
    assert fingerprint(thinking=True) == base | {"thinking": "on"}
    assert fingerprint(thinking=False) == base | {"thinking": "off"}
    other = build_chat_tokenizer(TEMPLATE + " ")
    assert fingerprint(other) == base | {"template_hash": hashlib.sha256((TEMPLATE + " ").encode()).hexdigest()}
    assert fingerprint(template="raw")["template"] == "raw"


def test_fingerprint_changes_with_what_is_put_around_a_prompt(chat_tokenizer):
    def fingerprint(**changes):
        return PromptRenderer(chat_tokenizer, config(**({"template": "chat"} | changes))).fingerprint()

    base = fingerprint()
    assert base["template_hash"] == hashlib.sha256(TEMPLATE.encode()).hexdigest()
    assert fingerprint(prompt_format="{prompt}") == base
    changed = [
        fingerprint(**changes)
        for changes in (
            {"system": ""},
            {"system": "1"},
            {"system": "2"},
            {"prompt_format": "{prompt}1"},
            {"prompt_format": "1{prompt}"},
            {"system": "1", "prompt_format": "1{prompt}"},
            {"template": "raw", "prompt_format": "1{prompt}"},
            {"preset": "gsm8k"},
            {"preset": "math"},
        )
    ]
    assert len({tree["template_hash"] for tree in [base, *changed]}) == 1 + len(changed)
    assert {key for tree in changed[:-3] for key in tree if tree[key] != base[key]} == {"template_hash"}
    assert fingerprint(preset="aime") == fingerprint(preset="math")  # the same words around the prompt


@pytest.mark.parametrize(
    ("prompt_format", "shown"),
    [
        (None, "1+2"),
        ("{prompt}", "1+2"),
        ("(({prompt}))", "((1+2))"),
        ("{prompt}=\\boxed{}", "1+2=\\boxed{}"),
        ("{0}{}{{prompt}}{{}}", "{0}{}{1+2}{{}}"),
    ],
)
def test_prompt_format(chat_tokenizer, prompt_format, shown):
    def render(text="1+2", **changes):
        return PromptRenderer(chat_tokenizer, config(prompt_format=prompt_format, **changes)).render(text)

    assert render()[0] == shown
    assert list(render()[1]) == chat_tokenizer(shown)["input_ids"]
    assert render(template="chat")[0] == f"{shown}="
    assert render("{prompt}{}")[0] == shown.replace("1+2", "{prompt}{}")  # a row's braces are its own


def test_system_message(chat_tokenizer):
    renderer = PromptRenderer(chat_tokenizer, config(template="chat", system="8+", prompt_format="{prompt}+"))
    text, ids = renderer.render("1")
    assert text == "8+1+=" and chat_tokenizer.decode(ids) == text


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


def test_templates_that_are_not_there(tokenizer, chat_tokenizer):
    with pytest.raises(ValueError, match="^data.template: chat, but the tokenizer has no chat template; use raw"):
        PromptRenderer(tokenizer, config(template="chat"))
    with pytest.raises(ValueError, match="^data.thinking: True, but the template has no enable_thinking switch"):
        PromptRenderer(chat_tokenizer, config(template="raw", thinking=True))
    plain = build_tokenizer()
    plain.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="^data.thinking: False"):
        PromptRenderer(plain, config(template="chat", thinking=False))


def test_system_messages_that_would_be_lost():
    def problem(template):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = template
        with pytest.raises(ValueError) as caught:
            PromptRenderer(tokenizer, config(template="chat", system="8+\n"))
        return str(caught.value)

    fix = "; use null and data.prompt_format"
    assert problem("{{ messages[-1].content }}") == ("data.system: '8+\\n', but the chat template leaves it out" + fix)
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no\nsystem role') }}{% endif %}"
    assert problem(refuses + TEMPLATE) == (
        "data.system: '8+\\n', but the chat template refuses it (no system role)" + fix
    )
    trims = build_tokenizer()
    trims.chat_template = TEMPLATE.replace("m.content", "m.content | trim")
    renderer = PromptRenderer(trims, config(template="chat", system="8+\n"))
    assert renderer.render("1")[0] == "8+1="
