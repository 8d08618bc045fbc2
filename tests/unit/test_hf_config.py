"""Hugging Face configurations: read as transformers reads them, or refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import transformers

from megatron_apo.model.hf_config import FAMILIES, ModelConfigError, ModelSpec, check_layout, read_hf_config
from tests.models import VARIANTS, make_model

BASE = {
    "model_type": "llama",
    "num_hidden_layers": 6,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 101,
    "head_dim": 6,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(folder, **changes) -> ModelSpec:
    config = {name: value for name, value in (BASE | changes).items() if value is not ...}  # ...: key absent
    (folder / "config.json").write_text(json.dumps(config))
    return read_hf_config(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: llama, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"pretraining_tp": 2}, "pretraining_tp 2"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope type 'dynamic'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": LLAMA3 | {"rope_type": "llama3", "low_freq_factor": 2.0}}, "rope low_freq_factor 2.0"),
        ({"rope_scaling": LLAMA3 | {"rope_type": "llama3", "high_freq_factor": 8.0}}, "rope high_freq_factor 8.0"),
        (
            {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "original_max_position_embeddings": 4096}},
            "rope original_max_position_embeddings 4096",
        ),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope factor"),
    ],
)
def test_what_the_model_would_not_honour_is_refused_by_name(tmp_path, changes, named):
    with pytest.raises(ModelConfigError) as error:
        read(tmp_path, **changes)
    assert named in str(error.value) and str(tmp_path) in str(error.value)


def test_problems_come_all_at_once(tmp_path):
    with pytest.raises(ModelConfigError) as error:
        read(tmp_path, hidden_act="gelu", mlp_bias=True, rope_scaling={"type": "linear"})
    assert len(str(error.value).splitlines()) == 3


def test_a_folder_without_configuration(tmp_path):
    with pytest.raises(ModelConfigError, match="no config.json"):
        read_hf_config(tmp_path / "absent")


def test_both_spellings_of_rope(tmp_path):
    assert read(tmp_path).rope_theta == 10000.0
    old, new = {"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert read(tmp_path, **old) == read(tmp_path, **new)
    assert read(tmp_path, **old).rope_theta == 5e5 and read(tmp_path, **old).rope_llama3_factor is None
    old |= {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}}
    new = {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}}
    assert read(tmp_path, **old) == read(tmp_path, **new)
    assert (read(tmp_path, **new).rope_theta, read(tmp_path, **new).rope_llama3_factor) == (5e5, 8.0)
    assert read(tmp_path, rope_theta=5e5, rope_scaling=None) == read(tmp_path, rope_theta=5e5)


SILENT = {"head_dim": ..., "num_key_value_heads": ..., "num_attention_heads": 32, "hidden_size": 64}


@pytest.mark.parametrize(
    "changes", [SILENT, SILENT | {"num_key_value_heads": 8}, SILENT | {"head_dim": 4}, {"rope_theta": 7e4}]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_silent_configuration_means_what_it_means_to_transformers(tmp_path, family, changes):
    spec = read(tmp_path, model_type=family, **changes)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (spec.head_dim, spec.num_query_groups) == (head_dim, theirs.num_key_value_heads)
    assert (spec.norm_eps, spec.max_positions) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert spec.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (spec.tied, spec.initializer_range) == (theirs.tie_word_embeddings, theirs.initializer_range)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_transformers_writes(tmp_path, variant):
    spec = read_hf_config(make_model(variant, tmp_path))
    assert (spec.num_layers, spec.hidden_size, spec.ffn_size, spec.vocab_size) == (4, 48, 96, 101)
    assert spec.family == variant.split("-")[0].replace("llama3", "llama")
    assert spec.tied == ("tied" in variant)
    assert spec.num_query_groups == (1 if "one-group" in variant else 2)
    assert spec.head_dim == {"qwen3": 20, "qwen3-tied": 12}.get(variant, 12)
    assert spec.rope_llama3_factor == (8.0 if variant == "llama3-tied" else None)
    assert (spec.qkv_bias, spec.qk_norm) == (spec.family == "qwen2", spec.family == "qwen3")


def test_layouts(tmp_path):
    spec = read(tmp_path)
    # 12 heads: 1, 2, 3, 4, 6, 12. 4 groups: a divisor or a multiple. 20 * 6 rows of query, key and value: by 12, too.
    for tp in (1, 2, 4, 12):
        check_layout(spec, tp=tp, pp=3)
    for tp in (3, 5, 6, 8, 24):
        with pytest.raises(ModelConfigError, match=rf"parallel.tp: {tp} .*12 heads in 4 .*use one of \[1, 2, 4, 12\]"):
            check_layout(spec, tp=tp, pp=1)
    with pytest.raises(ModelConfigError, match=r"use one of \[1, 2, 4\]"):  # 100 rows do not split over 12
        check_layout(replace(spec, head_dim=5), tp=12, pp=1)
    with pytest.raises(ModelConfigError, match=r"use one of \[1, 2\]"):  # the feed-forward size does not
        check_layout(replace(spec, ffn_size=98), tp=4, pp=1)
    for pp in (4, 5, 12):
        with pytest.raises(ModelConfigError, match=rf"parallel.pp: {pp} .*6 layers; use one of \[1, 2, 3, 6\]"):
            check_layout(spec, tp=1, pp=pp)
