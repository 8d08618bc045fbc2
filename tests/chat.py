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


def build_llama_tokenizer(template: str | None = None, *, adds_bos: bool = True) -> PreTrainedTokenizerBase:
    """A Llama tokenizer of characters and special tokens; `adds_bos`: it puts <s> before every text."""
    from transformers import LlamaTokenizer

    tokens = ["<unk>", "<s>", "</s>", "▁", *"0123456789+=?"]
    tokenizer = LlamaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], add_bos_token=adds_bos)
    tokenizer.chat_template = template
    return tokenizer


def build_chatml_tokenizer(template: str) -> PreTrainedTokenizerBase:
    """A base model's tokenizer without BOS, its EOS <|endoftext|>, that has tokens for the turns of a chat."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|im"]})
    tokenizer.chat_template = template
    return tokenizer


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
