"""A row of a source as the model sees it: text in its format and template, and token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_apo.config import DataConfig
from megatron_apo.data.presets import row_format
from megatron_apo.telemetry.units import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]  # each {"role", "content"}


class PromptRenderer:
    """Renders a row's text and tokenizes it. Raises `ValueError` where the recipe asks for what the tokenizer has not.

    The text first takes its place in data.prompt_format, or the preset's. Then
    raw: as it is, with the special tokens the tokenizer adds by itself (a BOS, say).
    chat: as the user's message, after data.system, in the tokenizer's chat template, ready for the assistant's turn.
    A row may also have the messages themselves, for chat: the last, the user's, takes its place in the format.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig):
        self._tokenizer, self._data, self._format = tokenizer, data, row_format(data)
        self._chat_template = ""
        if data.template == "chat":
            if not tokenizer.chat_template:
                raise ValueError("data.template: chat, but the tokenizer has no chat template; use raw")
            self._chat_template = tokenizer.get_chat_template()
        if data.thinking is not None and "enable_thinking" not in self._chat_template:
            raise ValueError(
                f"data.thinking: {data.thinking}, but the template has no enable_thinking switch; use null"
            )
        if data.system is not None:
            self._check_system(data.system)

    def render(self, row: str | Messages) -> tuple[str, tuple[int, ...]]:
        """The text the model sees, and its token ids."""
        return self.render_all([row])[0]

    def render_all(self, rows: Sequence[str | Messages]) -> list[tuple[str, tuple[int, ...]]]:
        """`render` of many rows in one call of the tokenizer."""
        chat = self._data.template == "chat"
        texts = [self._in_chat(row) if chat else self._plain(row) for row in rows]
        # A chat template writes the special tokens itself.
        ids = self._tokenizer(texts, add_special_tokens=not chat)["input_ids"]
        return [(text, tuple(tokens)) for text, tokens in zip(texts, ids, strict=True)]

    @property
    def asks_to_think(self) -> bool:
        """data.thinking is on: a response without a closing think tag has not come to its answer."""
        return self._data.thinking is True

    def fingerprint(self) -> dict[str, str]:
        """What a rendered prompt depends on, by the names of the V* store's fingerprint."""
        thinking = {None: "default", True: "on", False: "off"}[self._data.thinking]
        template, added = self._chat_template, [self._data.system, self._format.prompt_format]
        if added != [None, "{prompt}"]:
            template = json.dumps([template, *added])
        return {
            "tokenizer_hash": tokenizer_hash(self._tokenizer),
            "template_hash": hashlib.sha256(template.encode()).hexdigest(),
            "template": self._data.template,
            "thinking": thinking,
        }

    def _plain(self, row: str | Messages) -> str:
        if not isinstance(row, str):
            raise ValueError("data.template: raw, but a prompt is a list of messages; use chat")
        return self._format.show(row)

    def _in_chat(self, row: str | Messages) -> str:
        switch: dict[str, Any] = {} if self._data.thinking is None else {"enable_thinking": self._data.thinking}
        *before, last = [{"role": "user", "content": row}] if isinstance(row, str) else row
        messages = [*before, last | {"content": self._format.show(last["content"])}]
        if self._data.system is not None:
            if messages[0]["role"] == "system":
                raise ValueError(
                    f"data.system: {self._data.system!r}, but a prompt has a system message of its own; use null"
                )
            messages.insert(0, {"role": "system", "content": self._data.system})
        rendered = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switch)
        assert isinstance(rendered, str)
        return rendered

    def _check_system(self, system: str) -> None:
        """Some chat templates raise an error at a system message, and some leave it out."""
        from jinja2 import TemplateError

        try:
            problem = None if system.strip() in self._in_chat("?") else "leaves it out"
        except TemplateError as error:
            problem = f"refuses it ({one_line(error)})"
        if problem:
            raise ValueError(
                f"data.system: {system!r}, but the chat template {problem}; use null and data.prompt_format"
            )


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
