"""Prompts: rows of a source, rendered once, the same way for both stages.

A prompt's id is a hash of its source's name, row and content, so it survives a move of the file and tells repeated rows
apart. Sources are read through `datasets`: a .jsonl or .parquet file (streamed, nothing cached), or a hub dataset.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from megatron_apo.config import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_RENDER_ROWS = 1024  # rows tokenized in one call


@dataclass(frozen=True)
class Prompt:
    prompt_id: str  # 32 hex digits
    text: str  # rendered: what the model sees
    text_hash: str  # 32 hex digits, of `text`
    token_ids: tuple[int, ...]
    answer: str
    row: int


@dataclass(frozen=True)
class LoadedPrompts:
    """`too_long`: ids of the prompts left out because of data.max_prompt_tokens. dataset_hash covers all rows read."""

    prompts: list[Prompt]
    too_long: list[str]
    dataset_hash: str


class PromptRenderer:
    """Renders a row's text and tokenizes it. Raises `ValueError` where the recipe asks for what the tokenizer has not.

    raw: the text as it is, with the special tokens the tokenizer adds by itself (a BOS, say).
    chat: one user message in the tokenizer's chat template, ready for the assistant's turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig):
        self._tokenizer, self._data = tokenizer, data
        self._chat_template = ""
        if data.template == "chat":
            if not tokenizer.chat_template:
                raise ValueError("data.template: chat, but the tokenizer has no chat template; use raw")
            self._chat_template = tokenizer.get_chat_template()
        if data.thinking is not None and "enable_thinking" not in self._chat_template:
            raise ValueError(
                f"data.thinking: {data.thinking}, but the template has no enable_thinking switch; use null"
            )

    def render(self, row_text: str) -> tuple[str, tuple[int, ...]]:
        """The text the model sees, and its token ids."""
        return self.render_all([row_text])[0]

    def render_all(self, row_texts: Sequence[str]) -> list[tuple[str, tuple[int, ...]]]:
        """`render` of many rows in one call of the tokenizer."""
        chat = self._data.template == "chat"
        texts = [self._in_chat(text) for text in row_texts] if chat else list(row_texts)
        # A chat template writes the special tokens itself.
        ids = self._tokenizer(texts, add_special_tokens=not chat)["input_ids"]
        return [(text, tuple(tokens)) for text, tokens in zip(texts, ids, strict=True)]

    def fingerprint(self) -> dict[str, str]:
        """What a rendered prompt depends on, by the names of the V* store's fingerprint."""
        thinking = {None: "default", True: "on", False: "off"}[self._data.thinking]
        return {
            "tokenizer_hash": tokenizer_hash(self._tokenizer),
            "template_hash": hashlib.sha256(self._chat_template.encode()).hexdigest(),
            "template": self._data.template,
            "thinking": thinking,
        }

    def _in_chat(self, text: str) -> str:
        switch: dict[str, Any] = {} if self._data.thinking is None else {"enable_thinking": self._data.thinking}
        messages = [{"role": "user", "content": text}]
        rendered = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switch)
        assert isinstance(rendered, str)
        return rendered


def load_prompts(
    source: str, data: DataConfig, renderer: PromptRenderer, max_prompts: int | None = None
) -> LoadedPrompts:
    """Read, render and tokenize `source` (data.train or data.eval), its first `max_prompts` rows if given.

    Raises `ValueError` naming the recipe's key and the fix: no such file or dataset, a column that is not there, a
    value that is not text, an empty prompt, or not one prompt short enough.
    """
    key = "data.eval" if source == data.eval and source != data.train else "data.train"
    name = Path(source).name if _file_format(source) else f"{source}:{data.split}"
    rows = enumerate(islice(read_rows(source, key, data.split), max_prompts))
    prompts: list[Prompt] = []
    too_long: list[str] = []
    dataset_hash = hashlib.sha256()
    while block := list(islice(rows, _RENDER_ROWS)):
        texts = [row_text(row, data.prompt_column, "data.prompt_column", source, index) for index, row in block]
        answers = [row_text(row, data.answer_column, "data.answer_column", source, index) for index, row in block]
        rendered = renderer.render_all(texts)
        for (index, _), text, answer, (shown, token_ids) in zip(block, texts, answers, rendered, strict=True):
            prompt_id = _hash128(json.dumps([name, index, text, answer]))
            dataset_hash.update(bytes.fromhex(prompt_id))
            if not token_ids:
                raise ValueError(f"{key}: row {index} of {source} is an empty prompt; remove it")
            if len(token_ids) > data.max_prompt_tokens:
                too_long.append(prompt_id)
            else:
                prompts.append(Prompt(prompt_id, shown, _hash128(shown), token_ids, answer, index))
    if not prompts:
        if too_long:
            raise ValueError(
                f"data.max_prompt_tokens: {data.max_prompt_tokens} is less than each of the {len(too_long)} prompts of "
                f"{source} has; raise it"
            )
        raise ValueError(f"{key}: {source} has no rows; give another source")
    return LoadedPrompts(prompts, too_long, dataset_hash.hexdigest())


def read_rows(source: str, key: str, split: str = "train") -> Iterator[dict[str, Any]]:
    """Rows of a .jsonl or .parquet file, or of a hub dataset's `split`.

    Raises `ValueError` naming `key`, the recipe's key, for a source that cannot be read.
    """
    import datasets

    file_format = _file_format(source)
    if file_format is None:
        datasets.disable_progress_bars()
        try:
            yield from datasets.load_dataset(source, split=split)
        except (OSError, ValueError) as error:  # offline, unknown name, unknown split
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{key}: cannot load {source!r} (split {split!r}) from the hub ({reason}); "
                "use a .jsonl or .parquet file, or a hub dataset's name and data.split"
            ) from error
        return
    if not Path(source).is_file():
        raise ValueError(f"{key}: {source} is not a file; give a .jsonl or .parquet file, or a hub dataset's name")
    read = datasets.IterableDataset.from_json if file_format == "json" else datasets.IterableDataset.from_parquet
    try:
        with TemporaryDirectory() as cache:  # for a lock file
            yield from read(source, cache_dir=cache)
    except StopIteration:
        return  # what `datasets` makes of an empty file
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ValueError(f"{key}: {source} is not a readable {file_format} file ({reason}); write it again") from error


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


def _file_format(source: str) -> str | None:
    """How `datasets` reads this file, or None for a hub dataset's name."""
    return _FILE_FORMATS.get(Path(source).suffix)


def row_text(row: dict[str, Any], column: str, key: str, source: str, index: int) -> str:
    """The text of one column of a row. Raises `ValueError` naming `key`, the recipe's key for the column."""
    if column not in row:
        raise ValueError(f"{key}: {column!r} is not a column of {source}; use one of {', '.join(row)}")
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{key}: row {index} of {source} has {value!r} in {column!r}, not text; name a column of text")
    return str(value)


def _hash128(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
