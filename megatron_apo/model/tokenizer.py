"""The tokenizer of a Hugging Face folder, and the ids that end a response."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_apo.config import Recipe
from megatron_apo.model.config_types import MAX_SIZE
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.model.json_file import cut, read_object, shown
from megatron_apo.runtime.garbage import not_collected
from megatron_apo.telemetry.units import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_apo.data.rendering import PromptRenderer


def load_tokenizer(folder: Path, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder; `key`: the recipe's key that names it."""
    with not_collected():
        from transformers import AutoTokenizer

    if not folder.is_dir():
        raise ValueError(f"{key}: {folder} is not a folder; give a Hugging Face model folder")
    try:
        # The folder's own code is never run; left open, transformers asks at the terminal.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises no narrower one for a damaged file
        reason = cut(one_line(error), 200)
        raise ValueError(f"{key}: no tokenizer can be read from {folder} ({reason})") from error


@dataclass(frozen=True)
class StopIds:
    """The ids that end a response. note: a line that the user should see."""

    ids: tuple[int, ...]
    note: str | None = None

    @classmethod
    def of(cls, recipe: Recipe, folder: Path, renderer: PromptRenderer) -> StopIds:
        """The recipe's, else the EOS ids of the model in `folder` and the token by which its chat template ends turns,
        which is another one where a base model is given a chat template.

        Raises `ValueError` for an id that the model does not have.
        """
        chosen, end = recipe.sampling.stop_token_ids, renderer.turn_end
        if chosen is not None:
            _check_ids(chosen, folder)
            lacks_end = bool(chosen) and end is not None and end[0] not in chosen
            return cls(tuple(chosen), _lacking(chosen, end, folder) if end and lacks_end else None)
        eos = eos_token_ids(folder)
        if end is None or end[0] in eos:
            return cls(eos)
        _check_ids([*eos, end[0]], folder)
        names = ", ".join(map(_named, zip(eos, renderer.tokenizer.convert_ids_to_tokens(list(eos)), strict=True)))
        return cls(
            (*eos, end[0]),
            f"sampling.stop_token_ids: null, so that a response ends with an EOS of {folder}, {names}, or with "
            f"{_named(end)}, by which its chat template ends turns",
        )


def _lacking(chosen: list[int], end: tuple[int, str], folder: Path) -> str:
    return (
        f"warning: sampling.stop_token_ids: {chosen} lacks {_named(end)}, by which the chat template of {folder} ends "
        "turns: responses go on behind it; add it, or use null"
    )


def _named(token: tuple[int, str]) -> str:
    return f"{token[0]} ({token[1]})"


def _check_ids(ids: list[int], folder: Path) -> None:
    if not ids:
        return
    last = read_hf_config(folder).vocab_size - 1
    if min(ids) < 0 or max(ids) > last:
        raise ValueError(f"sampling.stop_token_ids: {ids} does not fit {folder}, whose ids are 0 to {last}")


def eos_token_ids(model: Path) -> tuple[int, ...]:
    """The ids that end a response by the HF folder's generation_config.json, else its config.json.

    Raises ValueError when neither names one, and for a file that cannot be read.
    """
    for path in (model / "generation_config.json", model / "config.json"):
        eos = read_object(path).get("eos_token_id") if path.is_file() else None
        if eos is None:
            continue
        ids = eos if isinstance(eos, list) else [eos]
        if not ids or not all(type(each) is int and 0 <= each < MAX_SIZE for each in ids):
            raise ValueError(
                f"{path}: eos_token_id is {shown(eos)}, no id nor a list of ids; set sampling.stop_token_ids"
            )
        return tuple(ids)
    raise ValueError(f"{model}: no eos_token_id in generation_config.json or config.json; set sampling.stop_token_ids")
