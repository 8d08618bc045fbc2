"""The one table of Hugging Face <-> Megatron names. To support a family, add its rows here.

Rows are in Hugging Face order: embedding, layers, final norm, head. Loading, export, live sync and the converters all
read these rows; a parameter or HF tensor without one is an error.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_apo.model.hf_config import ModelSpec
from megatron_apo.weights.rules import QKV, Copy, GatedMLP, Rule, Vocabulary

EMBEDDING = Vocabulary("embedding.word_embeddings.weight", ("model.embed_tokens.weight",))
FINAL_NORM = Copy("decoder.final_layernorm.weight", ("model.norm.weight",), shape=("hidden",))
HEAD = Vocabulary("output_layer.weight", ("lm_head.weight",))

_MEGATRON = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."


def _layer_rows(*, qkv_bias: bool, qk_norm: bool) -> tuple[Rule, ...]:
    attention, hf_attention = _MEGATRON + "self_attention.", _HF + "self_attn."
    rows: list[Rule] = [
        Copy(
            _MEGATRON + "input_layernorm.weight",
            (_HF + "input_layernorm.weight",),
            te=attention + "linear_qkv.layer_norm_weight",
            shape=("hidden",),
        ),
        QKV(attention + "linear_qkv.weight", tuple(hf_attention + f"{part}_proj.weight" for part in "qkv")),
    ]
    if qkv_bias:
        names = tuple(hf_attention + f"{part}_proj.bias" for part in "qkv")
        rows.append(QKV(attention + "linear_qkv.bias", names, bias=True))
    if qk_norm:
        rows.append(Copy(attention + "q_layernorm.weight", (hf_attention + "q_norm.weight",), shape=("head",)))
        rows.append(Copy(attention + "k_layernorm.weight", (hf_attention + "k_norm.weight",), shape=("head",)))
    rows += [
        Copy(attention + "linear_proj.weight", (hf_attention + "o_proj.weight",), shape=("hidden", "heads"), dim=1),
        Copy(
            _MEGATRON + "pre_mlp_layernorm.weight",
            (_HF + "post_attention_layernorm.weight",),
            te=_MEGATRON + "mlp.linear_fc1.layer_norm_weight",
            shape=("hidden",),
        ),
        GatedMLP(_MEGATRON + "mlp.linear_fc1.weight", (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight")),
        Copy(_MEGATRON + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), shape=("hidden", "ffn"), dim=1),
    ]
    return tuple(rows)


LAYER_ROWS = {
    "llama": _layer_rows(qkv_bias=False, qk_norm=False),
    "qwen2": _layer_rows(qkv_bias=True, qk_norm=False),
    "qwen3": _layer_rows(qkv_bias=False, qk_norm=True),
}


@dataclass(frozen=True)
class Entry:
    """One parameter of one model: its rule, its names with the layer filled in, and its pipeline stage."""

    rule: Rule
    megatron: str  # name within its stage (layers count from 0 on each stage)
    te: str
    hf: tuple[str, ...]
    pp_rank: int
    layer: int | None  # global layer index; None: embedding, final norm, head


def model_entries(spec: ModelSpec, pp: int) -> list[Entry]:
    """Every parameter of the model in Hugging Face order, each once. Layers are split evenly over `pp` stages.

    A tied model has no head row: the last stage's copy of the embedding is `tied_head_entry`.
    """
    per_stage = spec.num_layers // pp
    entries = [_entry(EMBEDDING, pp_rank=0)]
    for layer in range(spec.num_layers):
        stage, local = divmod(layer, per_stage)
        entries += [_entry(rule, pp_rank=stage, layer=layer, local=local) for rule in LAYER_ROWS[spec.family]]
    entries.append(_entry(FINAL_NORM, pp_rank=pp - 1))
    if not spec.tied:
        entries.append(_entry(HEAD, pp_rank=pp - 1))
    return entries


def tied_head_entry(spec: ModelSpec, pp: int) -> Entry | None:
    """The last stage's copy of a tied embedding: loaded from the embedding, never exported. None if there is none."""
    if not spec.tied or pp == 1:
        return None
    return Entry(HEAD, HEAD.megatron, HEAD.megatron, EMBEDDING.hf, pp_rank=pp - 1, layer=None)


def _entry(rule: Rule, *, pp_rank: int, layer: int | None = None, local: int | None = None) -> Entry:
    return Entry(
        rule=rule,
        megatron=rule.megatron.format(layer=local),
        te=(rule.te or rule.megatron).format(layer=local),
        hf=tuple(name.format(layer=layer) for name in rule.hf),
        pp_rank=pp_rank,
        layer=layer,
    )
