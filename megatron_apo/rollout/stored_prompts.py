"""Whether the samples of a store are of the prompts that a run shows its model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatron_apo.data.prompts import Prompt
from megatron_apo.values.fingerprint import Fingerprint, StoreError
from megatron_apo.values.shards import read_text_hashes
from megatron_apo.values.store import VStarStore


def check_prompts(store: VStarStore, prompts: Sequence[Prompt]) -> None:
    """Raise `StoreError` unless the store has these prompts as they are rendered, each and no others."""
    check_rendered(store, prompts)
    if len(store) != len(prompts):
        key = "data.train" if store.fingerprint.purpose == "vstar" else "data.eval"
        raise StoreError(
            f"{store.folder}: has {len(store)} prompts where {key} has {len(prompts)}; delete it and sample it again"
        )


def check_rendered(store: VStarStore, prompts: Sequence[Prompt]) -> None:
    """Raise `StoreError` unless the store has these prompts as they are rendered."""
    others = store.other_texts([prompt.prompt_id for prompt in prompts], [prompt.text_hash for prompt in prompts])
    _raise_for([prompts[index] for index in others], len(prompts), store.folder, store.fingerprint)


def check_shard(path: Path, fingerprint: Fingerprint, prompts: Sequence[Prompt]) -> None:
    """Raise `StoreError` for a prompt of these that an unfinished store's shard has otherwise. A shard that cannot be
    read is told of where it is read whole."""
    found: dict[str, str] = {}
    with suppress(StoreError, FileNotFoundError):
        found = read_text_hashes(path)
    others = [prompt for prompt in prompts if found.get(prompt.prompt_id, prompt.text_hash) != prompt.text_hash]
    _raise_for(others, len(prompts), path, fingerprint)


def _raise_for(others: Sequence[Prompt], num_prompts: int, path: Path, fingerprint: Fingerprint) -> None:
    if others:
        raise StoreError(
            f"{path}: {len(others)} of {num_prompts} prompts were other text or token ids when they were sampled, the "
            f"first is row {others[0].row}, {others[0].prompt_id}; use the versions of transformers, tokenizers and "
            f"this program that it was sampled with, or {fingerprint.words.elsewhere}"
        )
