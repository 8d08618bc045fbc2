"""What stands at the beginning of what a model sees: one BOS where its tokenizer puts one, whoever writes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Beginning:
    """token_ids: what the tokenizer by itself puts before every text, a BOS or more; none: it does not.

    text: these as text; of a tokenizer that puts none, its BOS, which a template or a row may write. "": it has none.
    """

    token_ids: tuple[int, ...]
    text: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Beginning:
        whole, bare = tokenizer("1")["input_ids"], tokenizer("1", add_special_tokens=False)["input_ids"]
        starts = range(len(whole) - len(bare) + 1)
        first = next((start for start in starts if whole[start : start + len(bare)] == bare), 0)
        token_ids = tuple(whole[:first])
        text = "".join(tokenizer.convert_ids_to_tokens(list(token_ids))) if token_ids else tokenizer.bos_token
        return cls(token_ids, str(text or ""))

    def left_off(self, text: str) -> str:
        """`text` without any at its front."""
        while self.text and (rest := text.lstrip()).startswith(self.text):
            text = rest.removeprefix(self.text)
        return text

    def once(self, text: str) -> str:
        """`text`, of any at its front the first alone."""
        before, found, after = text.partition(self.text) if self.text else (text, "", "")
        return text if before.strip() else before + found + self.left_off(after)

    def is_written(self, text: str, contents: Iterable[str]) -> bool:
        """Whether `text`, in which a template has put `contents`, has one at its front, or more than these have."""
        if not self.text:
            return False
        within = sum(content.count(self.text) for content in contents)
        return text.lstrip().startswith(self.text) or text.count(self.text) > within
