"""Tensors by their names: which of a checkpoint hold no weights, and many of them told in a line.

is_buffer(name)                                         an old checkpoint's, worked out anew by whoever loads it
in_lines([("model.norm.weight", "missing tensor {}")])  a line for each pattern of names
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from megatron_apo.model.json_file import cut

# Of old Llama files, by their ends: old transformers saved the first (modeling_utils.py), ColossalAI all of them.
# vLLM drops the same ones (models/utils.py, `REMOVE_UNUSED_ROTARY_EMBEDS_MAPPER`).
_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
_NUMBER = re.compile(r"[0-9]{1,9}")
_MOST_LINES, _MOST_CHARACTERS = 16, 160  # a layer's names are 12 patterns at most


def is_buffer(name: str) -> bool:
    """Whether a tensor says nothing that config.json does not."""
    return name.endswith(_BUFFERS) and (name.startswith("model.layers.") or name.startswith("model.rotary_emb."))


def in_lines(problems: Iterable[tuple[str, str]]) -> list[str]:
    """One line for all tensors of one pattern that have the same problem.

    problems: (name, what is said of it, with {} for the name). A pattern has ranges where its names have numbers.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for name, said in problems:
        found.setdefault((said, _NUMBER.sub("0", name)), []).append(name)
    lines = [said.replace("{}", pattern_of(names)) for (said, _), names in found.items()]
    rest = len(lines) - _MOST_LINES
    return lines[:_MOST_LINES] + ([f"and {rest} more patterns of tensors' names"] if rest > 0 else [])


def pattern_of(names: Sequence[str]) -> str:
    """Names that differ in numbers alone: "model.layers.[0-47].mlp.gate.weight (48 tensors, the first
    model.layers.0.mlp.gate.weight)"; one name as it is."""
    if len(names) == 1:
        return cut(names[0], _MOST_CHARACTERS)
    columns = zip(*(map(int, _NUMBER.findall(name)) for name in names), strict=True)
    ranges = [str(min(column)) if len(set(column)) == 1 else f"[{min(column)}-{max(column)}]" for column in columns]
    texts = _NUMBER.split(names[0])
    pattern = "".join(text + number for text, number in zip(texts, [*ranges, ""], strict=True))
    first = min(names, key=lambda name: [*map(int, _NUMBER.findall(name))])
    return f"{cut(pattern, _MOST_CHARACTERS)} ({len(names)} tensors, the first {cut(first, _MOST_CHARACTERS)})"
