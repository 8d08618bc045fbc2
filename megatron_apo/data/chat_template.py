"""What a chat template does, by its source and by what it makes of a short conversation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_apo.telemetry.units import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLY = "xyzreplyxyz"  # in no template


def names_of(source: str) -> set[str]:
    """The variables and functions that a template names, and its filters as "|name"; comments and text are no names.

    Raises `ValueError` for a template that cannot be read.
    """
    from jinja2 import Environment, TemplateSyntaxError

    try:
        tokens = [(kind, value) for _, kind, value in Environment().lex(source) if kind != "whitespace"]
    except TemplateSyntaxError as error:
        raise ValueError(f"data.template: chat, but the chat template cannot be read ({one_line(error)})") from None
    before = [("", ""), *tokens]
    return {
        "|" * (last == ("operator", "|")) + value
        for last, (kind, value) in zip(before, tokens, strict=False)
        if kind == "name"
    }


def turn_end(
    tokenizer: PreTrainedTokenizerBase, render: Callable[[list[dict[str, str]]], str]
) -> tuple[int, str] | None:
    """Id and text of the added token that a template writes after an assistant's message; white space may lie between.

    None where other text comes next, or the template refuses the conversation. render: of messages, without the
    beginning of another turn.
    """
    try:
        text = render([{"role": "user", "content": "1"}, {"role": "assistant", "content": _REPLY}])
    except Exception:  # whatever a template's code raises
        return None
    _, found, rest = text.rpartition(_REPLY)
    rest = rest.lstrip()
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    added |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    ends = [token for token in added if found and token.strip() and rest.startswith(token)]
    return (added[end], end) if (end := max(ends, key=len, default=None)) else None
