"""The tokenizer of a Hugging Face folder, and the ids that end a response."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_apo.config import Recipe
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.runtime.garbage import not_collected
from megatron_apo.telemetry.units import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder; `key`: the recipe's key that names it."""
    with not_collected():
        from transformers import AutoTokenizer

    if not folder.is_dir():
        raise ValueError(f"{key}: {folder} is not a folder; give a Hugging Face model folder")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises no narrower one for a damaged file
        raise ValueError(f"{key}: no tokenizer can be read from {folder} ({one_line(error)})") from error


def stop_token_ids(recipe: Recipe, folder: Path) -> tuple[int, ...]:
    """The ids that end a response: the recipe's, else the EOS ids of the model in `folder`.

    Raises `ValueError` for an id that the model does not have.
    """
    chosen = recipe.sampling.stop_token_ids
    if chosen is None:
        return eos_token_ids(folder)
    if chosen:
        last = read_hf_config(folder).vocab_size - 1
        if min(chosen) < 0 or max(chosen) > last:
            raise ValueError(f"sampling.stop_token_ids: {chosen} does not fit {folder}, whose ids are 0 to {last}")
    return tuple(chosen)


def eos_token_ids(model: Path) -> tuple[int, ...]:
    """The ids that end a response by the HF folder's generation_config.json, else its config.json.

    Raises ValueError when neither names one, and for a file that cannot be read.
    """
    for name in ("generation_config.json", "config.json"):
        path = model / name
        if not path.is_file():
            continue
        try:
            eos = json.loads(path.read_text())["eos_token_id"]
        except KeyError:
            continue
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a configuration ({one_line(error)}); write it again") from None
        ids = eos if isinstance(eos, list) else [eos]
        if not all(isinstance(each, int) for each in ids if each is not None):
            raise ValueError(f"{path}: eos_token_id is {eos!r}, no id nor a list of ids; set sampling.stop_token_ids")
        if eos is not None:
            return tuple(ids)
    raise ValueError(f"{model}: no eos_token_id in generation_config.json or config.json; set sampling.stop_token_ids")
