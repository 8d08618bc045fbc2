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
VALUE_HEAD = Copy("value_head", ("score.weight",), shape=("value", "hidden"))  # as transformers' classifiers have it

_MEGATRON = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."


def layer_rows(spec: ModelSpec) -> list[Rule]:
    """Rows of one layer, but for its experts."""
    return _attention_rows(spec) + (_ROUTER_ROWS if spec.num_experts else _mlp_rows(spec))


def _attention_rows(spec: ModelSpec) -> list[Rule]:
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
    if spec.qkv_bias:
        names = tuple(hf_attention + f"{part}_proj.bias" for part in "qkv")
        rows.append(QKV(attention + "linear_qkv.bias", names, bias=True))
    if spec.qk_norm:
        rows.append(Copy(attention + "q_layernorm.weight", (hf_attention + "q_norm.weight",), shape=("head",)))
        rows.append(Copy(attention + "k_layernorm.weight", (hf_attention + "k_norm.weight",), shape=("head",)))
    rows.append(
        Copy(attention + "linear_proj.weight", (hf_attention + "o_proj.weight",), shape=("hidden", "heads"), dim=1)
    )
    if spec.output_bias:
        rows.append(Copy(attention + "linear_proj.bias", (hf_attention + "o_proj.bias",), shape=("hidden",)))
    return rows


def _mlp_rows(spec: ModelSpec) -> list[Rule]:
    mlp, hf_mlp = _MEGATRON + "mlp.", _HF + "mlp."
    rows: list[Rule] = [
        Copy(
            _MEGATRON + "pre_mlp_layernorm.weight",
            (_HF + "post_attention_layernorm.weight",),
            te=mlp + "linear_fc1.layer_norm_weight",
            shape=("hidden",),
        ),
        GatedMLP(mlp + "linear_fc1.weight", (hf_mlp + "gate_proj.weight", hf_mlp + "up_proj.weight")),
        Copy(mlp + "linear_fc2.weight", (hf_mlp + "down_proj.weight",), shape=("hidden", "ffn"), dim=1),
    ]
    if spec.mlp_bias:
        names = (hf_mlp + "gate_proj.bias", hf_mlp + "up_proj.bias")
        rows.append(GatedMLP(mlp + "linear_fc1.bias", names, shape=("ffn",)))
        rows.append(Copy(mlp + "linear_fc2.bias", (hf_mlp + "down_proj.bias",), shape=("hidden",)))
    return rows


_ROUTER_ROWS: list[Rule] = [
    Copy(
        _MEGATRON + "pre_mlp_layernorm.weight",
        (_HF + "post_attention_layernorm.weight",),
        shape=("hidden",),
    ),
    Copy(_MEGATRON + "mlp.router.weight", (_HF + "mlp.gate.weight",), shape=("experts", "hidden")),
]
_EXPERT, _HF_EXPERT = _MEGATRON + "mlp.experts.local_experts.{expert}.", _HF + "mlp.experts.{expert}."
EXPERT_ROWS: tuple[Rule, ...] = (
    GatedMLP(
        _EXPERT + "linear_fc1.weight",
        (_HF_EXPERT + "gate_proj.weight", _HF_EXPERT + "up_proj.weight"),
        te=_MEGATRON + "mlp.experts.linear_fc1.weight{expert}",
        shape=("expert_ffn", "hidden"),
    ),
    Copy(
        _EXPERT + "linear_fc2.weight",
        (_HF_EXPERT + "down_proj.weight",),
        te=_MEGATRON + "mlp.experts.linear_fc2.weight{expert}",
        shape=("hidden", "expert_ffn"),
        dim=1,
    ),
)


@dataclass(frozen=True)
class Entry:
    """One parameter of one model: its rule, its names with layer and expert filled in, and where it is held."""

    rule: Rule
    megatron: str  # name on the ranks that hold it (layers count from 0 in each chunk, experts on each expert rank)
    te: str
    hf: tuple[str, ...]
    pp_rank: int
    chunk: int  # which of the pipeline rank's model chunks holds it
    layer: int | None  # global layer index; None: embedding, final norm, head
    ep_rank: int | None = None  # expert-parallel rank of an expert; None: held by all of them


def model_entries(spec: ModelSpec, pp: int, ep: int = 1, vpp: int = 1) -> list[Entry]:
    """Every parameter of the model in Hugging Face order, each once.

    Layers are split evenly over `pp` stages (in `vpp` rounds, a chunk of each stage after the other), the experts of a
    layer over `ep` ranks of its stage. A tied model has no head row: the last stage's copy of the embedding is
    `tied_head_entry`. A critic's is that of its values.
    """
    per_chunk = spec.num_layers // (pp * vpp)
    per_rank = spec.num_experts // ep
    rows = layer_rows(spec)  # the same objects for every layer
    entries = [_entry(EMBEDDING, pp_rank=0)]
    for layer in range(spec.num_layers):
        nth, local = divmod(layer, per_chunk)
        chunk, stage = divmod(nth, pp)
        entries += [_entry(rule, pp_rank=stage, chunk=chunk, layer=layer, local=local) for rule in rows]
        for expert in range(spec.num_experts):
            ep_rank, local_expert = divmod(expert, per_rank)
            entries += [
                _entry(
                    rule,
                    pp_rank=stage,
                    chunk=chunk,
                    layer=layer,
                    local=local,
                    ep_rank=ep_rank,
                    expert=expert,
                    local_expert=local_expert,
                )
                for rule in EXPERT_ROWS
            ]
    entries.append(_entry(FINAL_NORM, pp_rank=pp - 1, chunk=vpp - 1))
    if not spec.tied:
        entries.append(_entry(VALUE_HEAD if spec.head == "value" else HEAD, pp_rank=pp - 1, chunk=vpp - 1))
    return entries


def hf_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Full shape of each Hugging Face tensor of the model by name, in order."""
    return {
        name: shape
        for entry in model_entries(spec, pp=1)
        for name, shape in zip(entry.hf, entry.rule.hf_shapes(spec), strict=True)
    }


def tied_head_entry(spec: ModelSpec, pp: int, vpp: int = 1) -> Entry | None:
    """The last stage's copy of a tied embedding: loaded from the embedding, never exported. None if there is none."""
    if not spec.tied or pp == 1:
        return None
    return Entry(HEAD, HEAD.megatron, HEAD.megatron, EMBEDDING.hf, pp_rank=pp - 1, chunk=vpp - 1, layer=None)


def _entry(
    rule: Rule,
    *,
    pp_rank: int,
    chunk: int = 0,
    layer: int | None = None,
    local: int | None = None,
    ep_rank: int | None = None,
    expert: int | None = None,
    local_expert: int | None = None,
) -> Entry:
    return Entry(
        rule=rule,
        megatron=rule.megatron.format(layer=local, expert=local_expert),
        te=(rule.te or rule.megatron).format(layer=local, expert=local_expert),
        hf=tuple(name.format(layer=layer, expert=expert) for name in rule.hf),
        pp_rank=pp_rank,
        chunk=chunk,
        layer=layer,
        ep_rank=ep_rank,
    )
