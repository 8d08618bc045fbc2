"""Rendering: text and token ids of a row, what they depend on, and what a template or tokenizer cannot do."""

from __future__ import annotations

import hashlib
from datetime import date, datetime

import pytest

from megatron_apo.config import DataConfig
from megatron_apo.data.arithmetic import build_tokenizer
from megatron_apo.data.rendering import PromptRenderer, prompt_hash, tokenizer_hash
from tests.chat import CHATML, TEMPLATE, build_chat_tokenizer, build_chatml_tokenizer, build_llama_tokenizer


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


def test_what_a_templates_code_raises_is_its_refusal():
    from jinja2 import TemplateError

    for code, says in (("{{ 1 / 0 }}", "ZeroDivisionError: "), ("{{ messages + 1 }}", "TypeError: ")):
        renderer = PromptRenderer(build_chat_tokenizer(TEMPLATE + code), config(template="chat"))
        with pytest.raises(TemplateError, match=f"^{says}"):
            renderer.render("1")
    with pytest.raises(ValueError, match=r"^data.system: '8\+', but the chat template refuses it \(ZeroDivisionError"):
        PromptRenderer(build_chat_tokenizer(TEMPLATE + "{{ 1 / 0 }}"), config(template="chat", system="8+"))


def test_several_templates_without_a_default():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = {"rag": TEMPLATE, "tool_use": TEMPLATE}
    with pytest.raises(ValueError, match=r"^data.template: chat, but no .* is its default \(rag, tool_use are"):
        PromptRenderer(tokenizer, config(template="chat"))


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


# --- one BOS: <s> is id 1 of the Llama tokenizer, and "\u2581" before a text of its making

WITH_BOS, WITHOUT_BOS = "{{ bos_token }}" + TEMPLATE, TEMPLATE
LATE_BOS = "(" + WITH_BOS  # "(" comes before it


@pytest.mark.parametrize(
    ("adds_bos", "changes", "template", "row", "text", "num_bos"),
    [
        (True, {"template": "raw"}, None, "1+2", "1+2", 1),
        (True, {"template": "raw"}, None, "<s>1+2", "1+2", 1),
        (True, {"template": "raw"}, None, " <s><s> 1+2", " 1+2", 1),
        (True, {"template": "raw"}, None, "<s><s> <s>1+2", "1+2", 1),
        (True, {"template": "raw", "prompt_format": "3+{prompt}"}, None, "<s>1+2", "3+1+2", 1),
        (True, {"template": "raw", "prompt_format": "<s>3+{prompt}"}, None, "<s>1+2", "3+1+2", 1),
        (False, {"template": "raw"}, None, "1+2", "1+2", 0),
        (False, {"template": "raw"}, None, "<s>1+2", "<s>1+2", 1),
        (False, {"template": "raw", "prompt_format": "<s>{prompt}"}, None, "<s>1+2", "<s>1+2", 1),
        (True, {}, WITH_BOS, "1+2", "<s>1+2=", 1),
        (True, {}, WITHOUT_BOS, "1+2", "1+2=", 1),
        (True, {}, LATE_BOS, "1+2", "(<s>1+2=", 1),
        (False, {}, WITH_BOS, "1+2", "<s>1+2=", 1),
        (False, {}, WITHOUT_BOS, "1+2", "1+2=", 0),
        (True, {}, WITH_BOS, "<s>1+2", "<s>1+2=", 1),
        (True, {}, WITHOUT_BOS, "<s>1+2", "1+2=", 1),
        (False, {}, WITH_BOS, "<s>1+2", "<s>1+2=", 1),
        (True, {}, "<s>" + WITH_BOS, "1+2", "<s>1+2=", 1),
        (True, {"system": "<s>8+"}, WITH_BOS, "<s>1+2", "<s>8+1+2=", 1),
        (True, {"system": "<s>8+", "prompt_format": "<s>3+{prompt}"}, WITHOUT_BOS, "<s>1", "8+3+1=", 1),
        (True, {}, WITH_BOS, [{"role": "system", "content": "<s>8+"}, {"role": "user", "content": "1"}], "<s>8+1=", 1),
    ],
)
def test_one_bos_whoever_writes_it(adds_bos, changes, template, row, text, num_bos):
    tokenizer = build_llama_tokenizer(template, adds_bos=adds_bos)
    rendered, ids = PromptRenderer(tokenizer, config(**({"template": "chat"} | changes))).render(row)
    assert (rendered, ids.count(tokenizer.bos_token_id)) == (text, num_bos)
    assert num_bos == 0 or ids[0] == tokenizer.bos_token_id or template == LATE_BOS
    whole = tokenizer(text, add_special_tokens=adds_bos and "<s>" not in text)["input_ids"]
    assert list(ids) == whole


def test_a_bos_within_a_prompt_is_its_own():
    """It takes the place of none."""
    tokenizer = build_llama_tokenizer(WITHOUT_BOS)
    text, ids = PromptRenderer(tokenizer, config(template="chat")).render("1<s>2")
    assert text == "1<s>2=" and [i for i, one in enumerate(ids) if one == 1] == [0, 3]
    text, ids = PromptRenderer(tokenizer, config(template="chat")).render("1<s><s>2")
    assert text == "1<s><s>2=" and ids.count(1) == 3


def test_a_response_has_no_bos():
    renderer = PromptRenderer(build_llama_tokenizer(WITH_BOS), config(template="chat"))
    one, two = renderer.render_responses(["1+2", "<s>1+2"])
    assert one == two == renderer.tokenizer("1+2", add_special_tokens=False)["input_ids"]


def test_more_than_a_bos_at_the_beginning():
    """As GLM's tokenizers have it; what they put behind a text ends no prompt."""
    from tokenizers import processors

    tokenizer = build_chat_tokenizer(template=TEMPLATE)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> <unk> $A <eos>",
        special_tokens=[(str(token), tokenizer.convert_tokens_to_ids(token)) for token in ("<pad>", "<unk>", "<eos>")],
    )
    inner = tuple(tokenizer("1=", add_special_tokens=False)["input_ids"])
    assert PromptRenderer(tokenizer, config()).render("<pad><unk>1=") == ("1=", (0, 2, *inner))
    assert PromptRenderer(tokenizer, config(template="chat")).render("1") == ("1=", (0, 2, *inner))
    tokenizer.chat_template = "<pad><unk>" + TEMPLATE
    assert PromptRenderer(tokenizer, config(template="chat")).render("1") == ("<pad><unk>1=", (0, 2, *inner))


# --- templates that change by themselves

# As Llama 3.2's and 3.3's: today, unless a date comes from outside.
TODAY = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}'
    "{%- endif %}{%- endif %}{{ date_string }}|" + TEMPLATE
)


HELLO = [{"role": "user", "content": "1"}]


def test_a_template_writes_the_recipes_day_whatever_day_it_is(monkeypatch):
    from transformers.utils import chat_template_utils

    tokenizer = build_chat_tokenizer(TODAY)

    def rendered_on(day, **changes):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2026, 1, day)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        renderer = PromptRenderer(tokenizer, config(template="chat", date=date(2024, 7, 26), **changes))
        return renderer.render("1+2"), renderer.fingerprint(), tokenizer.apply_chat_template(HELLO, tokenize=False)

    (one, first, by_itself), (two, second, by_itself_later) = rendered_on(1), rendered_on(2)
    assert (by_itself, by_itself_later) == ("01 Jan 2026|1", "02 Jan 2026|1")  # the clock is seen
    assert (one, first) == (two, second) and one[0] == "26 Jul 2024|1+2="


def test_the_day_is_in_the_fingerprint():
    tokenizer = build_chat_tokenizer(TODAY)
    found = [
        PromptRenderer(tokenizer, config(template="chat", **changes)).fingerprint()["template_hash"]
        for changes in ({"date": "2024-07-26"}, {"date": "2024-07-27"}, {"date": "2024-07-26", "system": "8+"})
    ]
    assert len(set(found)) == 3


@pytest.mark.parametrize(
    ("template", "changes", "says"),
    [
        (
            TODAY,
            {},
            "data.date: missing, but the chat template of FOLDER writes the day (strftime_now); set it, e.g. to "
            "2024-07-26, for both stages",
        ),
        (
            TEMPLATE + "{# strftime_now #}strftime_now",
            {"date": "2024-07-26"},
            "data.date: 2024-07-26, but the template writes no day (strftime_now); use null",
        ),
        (
            TODAY,
            {"date": "2024-07-26", "template": "raw"},
            "data.date: 2024-07-26, but the template writes no day (strftime_now); use null",
        ),
        (
            "{{ [1, 2] | random }}" + TEMPLATE,
            {},
            "data.template: chat, but the chat template of FOLDER draws at random (|random), so that no two prompts "
            "are alike; change it, or use raw",
        ),
        (
            "{{ lipsum(1) }}" + TEMPLATE,
            {},
            "data.template: chat, but the chat template of FOLDER draws at random (lipsum), so that no two prompts "
            "are alike; change it, or use raw",
        ),
        (
            "{{ 'a",
            {},
            'data.template: chat, but the chat template cannot be read (unexpected char "\'" at 3 line 1)',
        ),
    ],
)
def test_templates_whose_prompts_would_change(template, changes, says):
    tokenizer = build_chat_tokenizer(template)
    tokenizer.name_or_path = "FOLDER"
    with pytest.raises(ValueError) as caught:
        PromptRenderer(tokenizer, config(**({"template": "chat"} | changes)))
    assert str(caught.value) == says


def test_what_only_looks_like_chance_is_none():
    template = TEMPLATE + "{# lipsum #}{{ messages[0].random }}random"
    assert PromptRenderer(build_chat_tokenizer(template), config(template="chat")).render("1")[0] == "1=random"


def test_text_and_token_ids_are_both_in_a_prompts_hash():
    assert (
        len({prompt_hash("1", (5, 6)), prompt_hash("1", (5,)), prompt_hash("2", (5, 6)), prompt_hash("1", (56,))}) == 4
    )


# --- by which token a turn ends

# As Qwen3's: the last turn of the assistant gets an empty block of thoughts.
THINKING = CHATML.replace("{{ m.content", "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content")
SEEN = (20, "<|im_end|>")


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (CHATML, SEEN),
        (CHATML.replace("m.content", "m.content | trim"), SEEN),
        (CHATML.replace("}<|im_end|>", "}\n <|im_end|>"), SEEN),
        (CHATML.replace("<|im_end|>", "<|im|>"), (21, "<|im")),
        (CHATML.replace("<|im_end|>", "{{ eos_token }}"), (18, "<|endoftext|>")),
        (THINKING, SEEN),
        (THINKING.replace("m.content", "m.content.split('</think>')[-1]"), SEEN),
        (CHATML.replace("<|im_end|>", "### End"), None),
        (CHATML.replace("<|im_end|>", ""), None),  # the end of the text
        (CHATML.replace("m.content", "m.content | upper"), None),
        (CHATML + "{% if not add_generation_prompt %}{{ raise_exception('no') }}{% endif %}", None),
        (CHATML + "{% if not add_generation_prompt %}{{ messages + 1 }}{% endif %}", None),
    ],
)
def test_the_end_of_a_turn(template, found):
    assert PromptRenderer(build_chatml_tokenizer(template), config(template="chat")).turn_end == found
    assert PromptRenderer(build_chatml_tokenizer(template), config(template="raw")).turn_end is None
