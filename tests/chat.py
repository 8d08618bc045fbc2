"""Tokenizers with chat templates."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from megatron_apo.data.arithmetic import build_tokenizer

# A chat template in the task's characters: the user's turn ends with "=", a closed think block switches thinking off.
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


def build_chat_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerBase:
    """The task's tokenizer, with a chat template."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer
