"""A row of a source as the model sees it: text in its format and template, and token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from copy import copy
from datetime import datetime, time
from functools import cached_property
from typing import TYPE_CHECKING, Any

from megatron_apo.config import DataConfig
from megatron_apo.data.beginning import Beginning
from megatron_apo.data.chat_template import names_of, turn_end
from megatron_apo.data.presets import RowFormat, row_format
from megatron_apo.telemetry.units import one_line, some

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]  # each {"role", "content"}


class PromptRenderer:
    """Renders a row's text and tokenizes it. Raises `ValueError` where the recipe asks for what the tokenizer has not,
    or leaves out what its chat template needs.

    The text first takes its place in data.prompt_format, or the preset's. Then
    raw: as it is.
    chat: as the user's message, after data.system, in the tokenizer's chat template, ready for the assistant's turn.
    A row may also have the messages themselves, for chat: the last, the user's, takes its place in the format.

    Where the tokenizer by itself puts a BOS before a text, the token ids begin with one, whoever writes it, and a row,
    data.prompt_format or data.system that begin with another lose it (`Beginning`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, format: RowFormat | None = None):
        """format: of the rows; none: that of data.train."""
        self.tokenizer, self._data, self._format = tokenizer, data, format or row_format(data)
        self._beginning = Beginning.of(tokenizer)
        self._chat_template = ""
        if data.template == "chat":
            if not tokenizer.chat_template:
                raise ValueError("data.template: chat, but the tokenizer has no chat template; use raw")
            several = tokenizer.chat_template
            if isinstance(several, dict) and "default" not in several:
                raise ValueError(
                    f"data.template: chat, but no chat template of the tokenizer is its default ({some(list(several))} "
                    "are there); call one default, or use raw"
                )
            self._chat_template = tokenizer.get_chat_template()
        self._variables = self._template_variables()
        if data.system is not None:
            self._check_system(data.system)

    def of_format(self, format: RowFormat) -> PromptRenderer:
        """The same for rows of another format."""
        other = copy(self)
        other._format = format
        return other

    def render(self, row: str | Messages) -> tuple[str, tuple[int, ...]]:
        """The text the model sees, without a BOS that is not of its making, and its token ids."""
        return self.render_all([row])[0]

    def render_all(self, rows: Sequence[str | Messages]) -> list[tuple[str, tuple[int, ...]]]:
        """`render` of many rows in one call of the tokenizer."""
        rendered = [self._in_chat(row) if self._data.template == "chat" else self._plain(row) for row in rows]
        ids = self.tokenizer([text for text, _ in rendered], add_special_tokens=False)["input_ids"]
        return [(text, (*before, *tokens)) for (text, before), tokens in zip(rendered, ids, strict=True)]

    def render_responses(self, responses: Sequence[str]) -> list[list[int]]:
        """Token ids of responses, which no BOS precedes."""
        texts = [self._beginning.left_off(response) for response in responses]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    @cached_property
    def turn_end(self) -> tuple[int, str] | None:
        """Id and text of the token with which the chat template ends the assistant's turns; None: no one is seen."""
        if self._data.template == "raw":
            return None
        return turn_end(self.tokenizer, lambda messages: self._apply(messages, add_generation_prompt=False))

    @property
    def asks_to_think(self) -> bool:
        """data.thinking is on: a response without a closing think tag has not come to its answer."""
        return self._data.thinking is True

    def fingerprint(self) -> dict[str, str]:
        """What a rendered prompt depends on, by the names of the V* store's fingerprint."""
        thinking = {None: "default", True: "on", False: "off"}[self._data.thinking]
        template, added = self._chat_template, [self._data.system, self._format.prompt_format]
        if self._data.date is not None:
            added.append(self._data.date.isoformat())
        if added != [None, "{prompt}"]:
            template = json.dumps([template, *added])
        return {
            "tokenizer_hash": tokenizer_hash(self.tokenizer),
            "template_hash": hashlib.sha256(template.encode()).hexdigest(),
            "template": self._data.template,
            "thinking": thinking,
        }

    def _template_variables(self) -> dict[str, Any]:
        """What the recipe gives to the chat template, which must use it."""
        data, names = self._data, names_of(self._chat_template)
        variables: dict[str, Any] = {}
        if data.thinking is not None:
            if "enable_thinking" not in names:
                raise ValueError(
                    f"data.thinking: {data.thinking}, but the template has no enable_thinking switch; use null"
                )
            variables["enable_thinking"] = data.thinking
        if data.date is not None:
            if "strftime_now" not in names:
                raise ValueError(f"data.date: {data.date}, but the template writes no day (strftime_now); use null")
            variables["strftime_now"] = datetime.combine(data.date, time()).strftime
        folder = self.tokenizer.name_or_path
        owner = f"the chat template of {folder}" if folder else "the chat template"
        if data.date is None and "strftime_now" in names:
            raise ValueError(
                f"data.date: missing, but {owner} writes the day (strftime_now); set it, e.g. to 2024-07-26, for both "
                "stages"
            )
        if chance := names & {"|random", "lipsum"}:
            raise ValueError(
                f"data.template: chat, but {owner} draws at random ({min(chance)}), so that no two prompts are alike; "
                "change it, or use raw"
            )
        return variables

    def _plain(self, row: str | Messages) -> tuple[str, tuple[int, ...]]:
        """Text and the token ids that go before its own, as of `_in_chat`."""
        if not isinstance(row, str):
            raise ValueError("data.template: raw, but a prompt is a list of messages; use chat")
        one = self._beginning
        if not one.token_ids:
            return one.once(self._format.show(row)), ()
        return one.left_off(self._format.show(one.left_off(row))), one.token_ids

    def _in_chat(self, row: str | Messages) -> tuple[str, tuple[int, ...]]:
        *before, last = [{"role": "user", "content": row}] if isinstance(row, str) else row
        left_off = self._beginning.left_off
        messages = [*before, last | {"content": self._format.show(left_off(last["content"]))}]
        if self._data.system is not None:
            if messages[0]["role"] == "system":
                raise ValueError(
                    f"data.system: {self._data.system!r}, but a prompt has a system message of its own; use null"
                )
            messages.insert(0, {"role": "system", "content": self._data.system})
        messages = [message | {"content": left_off(message["content"])} for message in messages]
        text = self._beginning.once(self._apply(messages, add_generation_prompt=True))
        is_written = self._beginning.is_written(text, (message["content"] for message in messages))
        return text, () if is_written else self._beginning.token_ids

    def _apply(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """Raises jinja2's `TemplateError` for whatever a template's code raises."""
        from jinja2 import TemplateError

        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **self._variables
            )
        except TemplateError:
            raise
        except Exception as error:
            raise TemplateError(f"{type(error).__name__}: {error}") from error
        assert isinstance(rendered, str)
        return rendered

    def _check_system(self, system: str) -> None:
        """Some chat templates raise an error at a system message, and some leave it out."""
        from jinja2 import TemplateError

        try:
            problem = None if self._beginning.left_off(system).strip() in self._in_chat("?")[0] else "leaves it out"
        except TemplateError as error:
            problem = f"refuses it ({one_line(error)})"
        if problem:
            raise ValueError(
                f"data.system: {system!r}, but the chat template {problem}; use null and data.prompt_format"
            )


def prompt_hash(text: str, token_ids: Sequence[int]) -> str:
    """32 hex digits of what a model is shown: another version of a tokenizer's library may make other ids of a text."""
    return hashlib.sha256(json.dumps([text, list(token_ids)]).encode()).hexdigest()[:32]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what decides token ids: vocabulary, merges, normalization, added and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        tree = json.loads(backend.to_str())
        del tree["truncation"], tree["padding"]  # set by the last call, not by the tokenizer
    else:
        tree = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    tree["special_tokens"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
