"""What each setting of a `config.json` may be. A file that is anybody's is held against it before it is read.

    wrong_types(config, SETTINGS)       a line for each setting that is something else
    wrong_types(rope, ROPE, "rope ")    the same of rope_scaling or rope_parameters

Bounds are far above any model, and low enough to count to: what is made of a setting takes no time before the weights
are held against it. A key that is absent, and a null where it means the same, is left to who reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_apo.model.json_file import shown

MAX_COUNT, MAX_SIZE = 2**12, 2**24
MAX_EXPERTS_IN_ALL = 2**16


@dataclass(frozen=True)
class Kind:
    """Values that fit, and how they are called; `null`: whether a null may stand for an absent key."""

    allowed: str
    fits: Callable[[Any], bool]
    null: bool = True

    def takes(self, value: object) -> bool:
        return self.null if value is None else self.fits(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _whole(least: int, most: int) -> Kind:
    return Kind(f"a whole number from {least} to {most}", lambda value: _is_whole(value) and least <= value <= most)


def _number(allowed: str, fits: Callable[[float], bool]) -> Kind:
    # A whole number of JSON may be too large for a float.
    return Kind(allowed, lambda value: _is_number(value) and abs(value) <= 1e30 and fits(value))


_COUNT, _SIZE, _NONE_OR_MORE = _whole(1, MAX_COUNT), _whole(1, MAX_SIZE), _whole(0, MAX_COUNT)
_LENGTH = _whole(1, 2**31)
_POSITIVE, _ABOVE_1 = _number("a number above 0", lambda x: x > 0), _number("a number above 1", lambda x: x > 1)
_AT_LEAST_0 = _number("a number, 0 or more", lambda x: x >= 0)
_SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
_TEXT = Kind("a text", lambda value: isinstance(value, str))
_OBJECT = Kind("an object of settings by name", lambda value: isinstance(value, dict))
_TEXTS = Kind("a list of texts", lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value))
_LIST = Kind("a list", lambda value: isinstance(value, list))


def _not_null(kind: Kind) -> Kind:
    """Of a setting that transformers takes as it is."""
    return replace(kind, null=False)


SETTINGS = {
    "attention_bias": _SWITCH,
    "attention_dropout": _AT_LEAST_0,
    "decoder_sparse_step": _whole(0, MAX_SIZE),
    "dtype": _TEXT,
    "head_dim": _SIZE,
    "hidden_act": _TEXT,
    "hidden_size": _SIZE,
    "initializer_range": _not_null(_AT_LEAST_0),
    "intermediate_size": _SIZE,
    "layer_types": _TEXTS,
    "max_position_embeddings": _not_null(_LENGTH),
    "mlp_bias": _SWITCH,
    "mlp_only_layers": _LIST,
    "moe_intermediate_size": _SIZE,
    "norm_topk_prob": _SWITCH,
    "num_attention_heads": _COUNT,
    "num_experts": _NONE_OR_MORE,
    "num_experts_per_tok": _COUNT,
    "num_hidden_layers": _COUNT,
    "num_key_value_heads": _COUNT,
    "num_local_experts": _NONE_OR_MORE,
    "original_max_position_embeddings": _LENGTH,
    "partial_rotary_factor": _POSITIVE,
    "pretraining_tp": _NONE_OR_MORE,
    "quantization_config": _OBJECT,
    "rms_norm_eps": _not_null(_AT_LEAST_0),
    "rope_parameters": _OBJECT,
    "rope_scaling": _OBJECT,
    "rope_theta": _ABOVE_1,
    "sliding_window": _whole(0, 2**31),
    "tie_word_embeddings": _SWITCH,
    "torch_dtype": _TEXT,
    "use_sliding_window": _SWITCH,
    "vocab_size": _SIZE,
}
ROPE = {
    "attention_factor": _POSITIVE,
    "beta_fast": _AT_LEAST_0,
    "beta_slow": _AT_LEAST_0,
    "factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "low_freq_factor": _POSITIVE,
    "mscale": _AT_LEAST_0,
    "mscale_all_dim": _AT_LEAST_0,
    "original_max_position_embeddings": _LENGTH,
    "partial_rotary_factor": _POSITIVE,
    "rope_theta": _ABOVE_1,
    "rope_type": _TEXT,
    "truncate": _SWITCH,
    "type": _TEXT,
}


def wrong_types(settings: Mapping[str, Any], kinds: Mapping[str, Kind], prefix: str = "") -> list[str]:
    """One line for each of `settings` that is not of its kind."""
    return [
        f"{prefix}{key}: {shown(settings[key])} is not {kind.allowed}; correct it"
        for key, kind in kinds.items()
        if key in settings and not kind.takes(settings[key])
    ]
