"""Hugging Face configurations: read as transformers reads them, or refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    YarnRotaryEmbedding,
    _yarn_get_concentration_factor_from_config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_apo.config import ParallelConfig
from megatron_apo.model import cpu_compat
from megatron_apo.model.hf_config import (
    FAMILIES,
    ModelConfigError,
    ModelSpec,
    Rope,
    check_layout,
    check_served,
    read_hf_config,
)
from megatron_apo.model.megatron_config import transformer_config
from megatron_apo.model.precision import Precision
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


MOE = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def read(folder, **changes) -> ModelSpec:
    config = {name: value for name, value in (BASE | changes).items() if value is not ...}  # ...: key absent
    (folder / "config.json").write_text(json.dumps(config))
    return read_hf_config(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"model_type": "gpt2"},
            "model_type 'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3, qwen3_moe",
        ),
        ({"hidden_size": None, "vocab_size": ...}, "hidden_size: missing"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "qwen2", "attention_bias": True}, "attention_bias true is not supported for qwen2"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias true is not supported for mistral"),
        ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias true is not supported for qwen3"),
        ({"qkv_bias": True}, "qkv_bias true is not supported for llama"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window 4096"),
        ({"model_type": "mistral"}, "sliding_window 4096"),  # transformers' default is in effect
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types sliding_attention",
        ),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config fp8 with weight_block_size None"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 128]}},
            "[64, 128] is not supported",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config awq"),
        ({"logits_scaling": 8.0}, "logits_scaling 8.0"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier 12.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({"num_local_experts": 8}, "a mixture of experts is not supported for llama"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
        (MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        (MOE | {"num_experts_per_tok": None}, "num_experts_per_tok: missing"),
        (MOE | {"mlp_only_layers": [0]}, "mlp_only_layers [0]"),
        (MOE | {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size 64"),
        (MOE | {"n_shared_experts": 2}, "n_shared_experts 2"),
        (MOE | {"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than num_experts 8"),
        (MOE | {"num_experts_per_tok": 1, "norm_topk_prob": True}, "norm_topk_prob true with num_experts_per_tok 1"),
        ({"pretraining_tp": 2}, "pretraining_tp 2"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 1.0}}, "rope factor 1 is not supported for yarn"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope factor is missing; rope type yarn"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope parameters apart for full_attention"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": LLAMA3 | {"rope_type": "llama3", "low_freq_factor": 2.0}}, "rope low_freq_factor 2.0"),
        ({"rope_scaling": LLAMA3 | {"rope_type": "llama3", "high_freq_factor": 8.0}}, "rope high_freq_factor 8.0"),
        (
            {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "original_max_position_embeddings": 4096}},
            "rope original_max_position_embeddings 4096",
        ),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope factor is missing; rope type llama3"),
    ],
)
def test_what_the_model_would_not_honour_is_refused_by_name(tmp_path, changes, named):
    with pytest.raises(ModelConfigError) as error:
        read(tmp_path, **changes)
    assert named in str(error.value) and str(tmp_path) in str(error.value)


WHOLE = "is not a whole number from 1 to"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"rope_scaling": ["yarn", 4.0]},
            'rope_scaling: ["yarn", 4.0] is not an object of settings by name; correct it',
        ),
        ({"rope_scaling": "yarn"}, 'rope_scaling: "yarn" is not an object of settings by name; correct it'),
        ({"rope_parameters": 3}, "rope_parameters: 3 is not an object of settings by name; correct it"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, 'rope rope_type: ["yarn"] is not a text; correct it'),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, 'rope factor: "4" is not a number above 0; correct it'),
        ({"rope_scaling": {"rope_theta": {}}}, "rope rope_theta: {} is not a number above 1; correct it"),
        ({"rope_theta": 10**400}, f"rope_theta: {'1' + 79 * '0'}.. is not a number above 1; correct it"),
        ({"rope_theta": 1}, "rope_theta: 1 is not a number above 1; correct it"),
        ({"hidden_size": "48"}, f'hidden_size: "48" {WHOLE} 16777216; correct it'),
        ({"hidden_size": 48.0}, f"hidden_size: 48.0 {WHOLE} 16777216; correct it"),
        ({"vocab_size": True}, f"vocab_size: true {WHOLE} 16777216; correct it"),
        ({"vocab_size": -5}, f"vocab_size: -5 {WHOLE} 16777216; correct it"),
        ({"num_hidden_layers": 10**12}, f"num_hidden_layers: 1000000000000 {WHOLE} 4096; correct it"),
        ({"num_attention_heads": 0}, f"num_attention_heads: 0 {WHOLE} 4096; correct it"),
        ({"rms_norm_eps": None}, "rms_norm_eps: null is not a number, 0 or more; correct it"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: NaN is not a number, 0 or more; correct it"),
        ({"initializer_range": float("inf")}, "initializer_range: Infinity is not a number, 0 or more; correct it"),
        ({"max_position_embeddings": None}, f"max_position_embeddings: null {WHOLE} 2147483648; correct it"),
        ({"layer_types": [["full_attention"]]}, 'layer_types: [["full_attention"]] is not a list of texts; correct it'),
        ({"layer_types": "full_attention"}, 'layer_types: "full_attention" is not a list of texts; correct it'),
        ({"tie_word_embeddings": "false"}, 'tie_word_embeddings: "false" is not true or false; correct it'),
        ({"quantization_config": "fp8"}, 'quantization_config: "fp8" is not an object of settings by name; correct it'),
        ({"torch_dtype": ["bfloat16"]}, 'torch_dtype: ["bfloat16"] is not a text; correct it'),
        ({"hidden_act": {}}, "hidden_act: {} is not a text; correct it"),
        ({"num_key_value_heads": 5}, "num_key_value_heads: 5 does not divide num_attention_heads 12; correct it"),
        (
            {"head_dim": None, "hidden_size": 50},
            "num_attention_heads: 12 does not divide hidden_size 50; give head_dim",
        ),
        ({"head_dim": 5}, "head_dim: 5 is odd, and rotary embeddings take pairs; correct it"),
        (
            MOE | {"num_experts": 1024, "num_hidden_layers": 65},
            "num_experts: 1024 in each of 65 layers are more than the 65536 in all that are supported",
        ),
        (MOE | {"num_experts": 0}, "num_experts_per_tok 2 is more than num_experts 0"),
    ],
)
def test_settings_of_an_odd_type_are_a_line(tmp_path, changes, line):
    with pytest.raises(ModelConfigError) as error:
        read(tmp_path, **changes)
    assert str(error.value) == f"{tmp_path / 'config.json'}: {line}"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[1, 2]", "holds [1, 2], not an object; write it again"),
        (b'"x"', 'holds "x", not an object; write it again'),
        (b"null", "holds null, not an object; write it again"),
        (
            b"\xff\xfe",
            "not JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte); write it again",
        ),
        (b"[" * 10**5, "not JSON that can be read (nested too deeply); write it again"),
        (b"", "not JSON (Expecting value: line 1 column 1 (char 0)); write it again"),
    ],
)
def test_a_configuration_that_is_no_object(tmp_path, data, said):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(ModelConfigError) as error:
        read_hf_config(tmp_path)
    assert str(error.value) == f"{path}: {said}"


def test_problems_come_all_at_once(tmp_path):
    with pytest.raises(ModelConfigError) as error:
        read(tmp_path, vocab_size=..., hidden_act="gelu", qkv_bias=True, rope_scaling={"type": "linear"})
    assert len(str(error.value).splitlines()) == 4


def test_a_folder_without_configuration(tmp_path):
    with pytest.raises(ModelConfigError, match="no config.json"):
        read_hf_config(tmp_path / "absent")


def test_both_spellings_of_rope(tmp_path):
    assert read(tmp_path).rope == Rope(10000.0)
    old, new = {"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert read(tmp_path, **old) == read(tmp_path, **new)
    assert read(tmp_path, **old).rope == Rope(5e5)
    old |= {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}}
    new = {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}}
    assert read(tmp_path, **old) == read(tmp_path, **new)
    assert read(tmp_path, **new).rope == Rope(5e5, "llama3", 8.0)
    assert read(tmp_path, rope_theta=5e5, rope_scaling=None) == read(tmp_path, rope_theta=5e5)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
YARNS = [
    YARN | {"attn_factor": 0.8782488562869419},  # DeepSeek-R1-0528-Qwen3-8B; nobody reads it
    YARN | {"attention_factor": 1.3},
    YARN | {"mscale": 0.7, "mscale_all_dim": 1.2},
    YARN | {"mscale": 0.7},
    YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False},
    YARN | {"attention_factor": None, "original_max_position_embeddings": 4096},
    {"rope_type": "yarn", "factor": 4.0},
]


def megatron_yarn(folder, scaling) -> tuple[torch.Tensor, float]:
    """Frequencies [head size / 2] and attention factor of Megatron-Core, as `transformer_config` sets it up."""
    cpu_compat.install()
    changes = {"head_dim": 64, "max_position_embeddings": 131072, "rope_theta": 1e6, "rope_scaling": scaling}
    spec = read(folder, model_type="qwen3", **changes)
    config = transformer_config(spec, ParallelConfig(), Precision())
    rotary = YarnRotaryEmbedding(
        spec.head_dim,
        rotary_base=spec.rope.theta,
        use_cpu_initialization=True,
        scaling_factor=config.yarn_rotary_scaling_factor,
        original_max_position_embeddings=config.yarn_original_max_position_embeddings,
        beta_fast=config.yarn_beta_fast,
        beta_slow=config.yarn_beta_slow,
        mscale=config.yarn_mscale,
        mscale_all_dim=config.yarn_mscale_all_dim,
        correction_range_round_to_int=config.yarn_correction_range_round_to_int,
    )
    angle_1D = rotary.get_emb(2)[0][1, 0]  # of position 1: the frequencies, twice
    return angle_1D[0, :32], _yarn_get_concentration_factor_from_config(config)


@pytest.mark.parametrize("scaling", YARNS)
def test_yarn_is_transformers(tmp_path, scaling):
    frequency, factor = megatron_yarn(tmp_path, scaling)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    expected, expected_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    torch.testing.assert_close(frequency, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


@pytest.mark.full
def test_yarn_is_vllms(tmp_path):
    """In a process of its own, since importing vLLM patches transformers. vLLM reads transformers' configuration."""
    pytest.importorskip("vllm")
    code = """if True:
        import json, sys
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.model_executor.layers.rotary_embedding import get_rope
        found = []
        for index, rope in enumerate(json.load(open(sys.argv[1]))):
            with set_current_vllm_config(VllmConfig()):
                layer = get_rope(64, 131072 + index, rope_parameters=rope)
            found.append((layer._compute_inv_freq(layer.scaling_factor).tolist(), layer.mscale))
        json.dump(found, open(sys.argv[1], "w"))
    """
    ours, read_by_vllm = [], []
    for scaling in YARNS:
        ours.append(megatron_yarn(tmp_path, scaling))
        read_by_vllm.append(transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters)
    exchange = tmp_path / "exchange.json"
    exchange.write_text(json.dumps(read_by_vllm))
    subprocess.run([sys.executable, "-c", code, str(exchange)], check=True, timeout=120)
    for (frequency, factor), (expected, expected_factor) in zip(ours, json.loads(exchange.read_text()), strict=True):
        torch.testing.assert_close(frequency, torch.tensor(expected), rtol=1e-6, atol=0)
        assert factor == pytest.approx(expected_factor, rel=1e-12)


SILENT = {"head_dim": ..., "num_key_value_heads": ..., "num_attention_heads": 32, "hidden_size": 64}


@pytest.mark.parametrize(
    "changes", [SILENT, SILENT | {"num_key_value_heads": 8}, SILENT | {"head_dim": 4}, {"rope_theta": 7e4}]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_silent_configuration_means_what_it_means_to_transformers(tmp_path, family, changes):
    if family == "mistral":  # whose default is refused
        changes = changes | {"sliding_window": None}
    spec = read(tmp_path, model_type=family, **changes)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (spec.head_dim, spec.num_query_groups) == (head_dim, theirs.num_key_value_heads)
    assert (spec.norm_eps, spec.max_positions) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert spec.rope.theta == theirs.rope_parameters["rope_theta"]
    if family == "qwen3_moe":
        assert (spec.num_experts, spec.experts_per_token) == (theirs.num_experts, theirs.num_experts_per_tok)
        assert (spec.expert_ffn_size, spec.norm_topk_prob) == (theirs.moe_intermediate_size, theirs.norm_topk_prob)
    assert (spec.tied, spec.initializer_range) == (theirs.tie_word_embeddings, theirs.initializer_range)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_transformers_writes(tmp_path, variant):
    spec = read_hf_config(make_model(variant, tmp_path))
    assert (spec.num_layers, spec.hidden_size, spec.ffn_size, spec.vocab_size) == (4, 48, 96, 101)
    assert spec.family == variant.split("-")[0].replace("llama3", "llama")
    assert spec.tied == ("tied" in variant)
    assert spec.num_query_groups == {"qwen2-tied-one-group": 1, "llama-mlp-bias-yarn": 4}.get(variant, 2)
    assert spec.head_dim == {"qwen3": 20, "mistral": 16, "qwen3-yarn": 16, "llama-mlp-bias-yarn": 16}.get(variant, 12)
    assert spec.rope.kind == ("llama3" if variant == "llama3-tied" else "yarn" if "yarn" in variant else "default")
    both = variant in ("llama-biases", "qwen3-attention-bias", "qwen3_moe-tied-plain")
    assert (spec.qkv_bias, spec.output_bias) == (both or spec.family == "qwen2", both)
    assert spec.mlp_bias == (variant in ("llama-biases", "llama-mlp-bias-yarn"))
    assert spec.qk_norm == (spec.family in ("qwen3", "qwen3_moe"))
    experts = (spec.num_experts, spec.experts_per_token, spec.expert_ffn_size, spec.norm_topk_prob)
    assert experts == {"qwen3_moe": (8, 3, 40, True), "qwen3_moe-tied-plain": (8, 3, 40, False)}.get(
        variant, (0, 0, 0, False)
    )


def test_fp8_blocks_are_read(tmp_path):
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    assert read(tmp_path, quantization_config=fp8).fp8_blocks
    assert not read(tmp_path).fp8_blocks


def test_a_window_that_is_not_in_effect_is_none(tmp_path):
    for changes in ({"sliding_window": None}, {"sliding_window": 4096, "max_position_embeddings": 4096}):
        assert read(tmp_path, model_type="mistral", **changes).family == "mistral"
    read(tmp_path, model_type="qwen2", use_sliding_window=False, sliding_window=4096, layer_types=["full_attention"])


def test_layouts(tmp_path):
    spec = read(tmp_path)
    # 12 heads: 1, 2, 3, 4, 6, 12. 4 groups: a divisor or a multiple. 20 * 6 rows of query, key and value: by 12, too.
    for tp in (1, 2, 4, 12):
        check_layout(spec, ParallelConfig(tp=tp, pp=3))
    for tp in (3, 5, 6, 8, 24):
        with pytest.raises(ModelConfigError, match=rf"parallel.tp: {tp} .*12 heads in 4 .*use one of \[1, 2, 4, 12\]"):
            check_layout(spec, ParallelConfig(tp=tp, pp=1))
    with pytest.raises(ModelConfigError, match=r"use one of \[1, 2, 4\]"):  # 100 rows do not split over 12
        check_layout(replace(spec, head_dim=5), ParallelConfig(tp=12, pp=1))
    with pytest.raises(ModelConfigError, match=r"use one of \[1, 2\]"):  # the feed-forward size does not
        check_layout(replace(spec, ffn_size=98), ParallelConfig(tp=4, pp=1))
    for pp in (4, 5, 12):
        with pytest.raises(ModelConfigError, match=rf"parallel.pp: {pp} .*6 layers; use one of \[1, 2, 3, 6\]"):
            check_layout(spec, ParallelConfig(tp=1, pp=pp))


def test_layouts_of_experts(tmp_path):
    spec = read(tmp_path, **MOE)
    for ep in (1, 2, 4, 8):
        check_layout(spec, ParallelConfig(tp=1, pp=2, ep=ep))
    with pytest.raises(ModelConfigError, match=r"parallel.ep: 3 .*8 experts; use one of \[1, 2, 4, 8\]"):
        check_layout(spec, ParallelConfig(tp=1, pp=1, ep=3))
    with pytest.raises(ModelConfigError, match="parallel.tp: 2, .* set parallel.sequence_parallel to true, or use 1"):
        check_layout(spec, ParallelConfig(tp=2, pp=1))
    split = ParallelConfig(tp=2, ep=4, dp=4, sequence_parallel=True)
    check_layout(replace(spec, ffn_size=99), split)  # a dense layer's size, which experts do not have
    with pytest.raises(ModelConfigError, match=r"parallel.tp: 2 does not fit"):
        check_layout(replace(spec, expert_ffn_size=33), split)
    with pytest.raises(ModelConfigError, match="parallel.ep: 2, but llama has no experts; use 1"):
        check_layout(read(tmp_path), ParallelConfig(tp=1, pp=1, ep=2))
    with pytest.raises(ModelConfigError) as error:
        check_layout(spec, ParallelConfig(tp=2, pp=4, ep=3))
    assert len(str(error.value).splitlines()) == 3


def test_what_vllm_would_compute_otherwise_is_refused(tmp_path):
    for name in ("qwen3", "llama-biases"):
        check_served(read_hf_config(make_model(name, tmp_path)))
    with pytest.raises(ModelConfigError, match="vLLM skips qwen3's bias of the output projection"):
        check_served(read_hf_config(make_model("qwen3-attention-bias", tmp_path)))
