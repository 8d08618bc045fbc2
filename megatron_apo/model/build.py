"""Builds the Megatron-Core model: policy or reference, this rank's pipeline stage and tensor shard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_apo.config import ParallelConfig
from megatron_apo.model.attention import SDPAttention
from megatron_apo.model.hf_config import ModelSpec, check_layout, transformer_config
from megatron_apo.model.logprobs import vocab_parallel_log_probs
from megatron_apo.parallel.topology import Topology

IGNORE = -100  # a label that asks for no log-prob, as in torch's cross-entropy


class LogProbModel(GPTModel):
    """A GPT whose last stage returns log-probs of `labels` and never holds all logits at once.

    forward(input_ids, position_ids, attention_mask, labels=...) -> fp32 [B, S] log-probs of `labels` under
    `temperature`, 0 where the label is `IGNORE`; earlier pipeline stages return hidden states as usual.
    """

    def __init__(self, *, num_vocab: int, temperature: float, chunk_tokens: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_vocab = num_vocab  # without the padding that makes the vocabulary divisible by TP
        self.temperature = temperature
        self.chunk_tokens = chunk_tokens

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Return log-probs under another temperature inside this block."""
        usual, self.temperature = self.temperature, temperature
        try:
            yield
        finally:
            self.temperature = usual

    def _postprocess(self, hidden_states: Tensor, *, labels: Tensor, **unused: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.pg_collection.tp)
        tied = self.share_embeddings_and_output_weights
        weight_VH = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        tp = self.pg_collection.tp
        first_row = tp.rank() * len(weight_VH)
        own_rows = min(max(self.num_vocab - first_row, 0), len(weight_VH))
        wanted_BS = labels != IGNORE
        log_prob = vocab_parallel_log_probs(
            hidden_states.transpose(0, 1)[wanted_BS],
            weight_VH[:own_rows],
            labels[wanted_BS],
            first_row=first_row,
            temperature=self.temperature,
            chunk_tokens=self.chunk_tokens,
            group=tp,
        )
        return hidden_states.new_zeros(labels.shape, dtype=torch.float32).masked_scatter(wanted_BS, log_prob)


def build_model(
    spec: ModelSpec,
    parallel: ParallelConfig,
    topology: Topology,
    *,
    dtype: str,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> LogProbModel:
    """This rank's part of the model, weights not yet loaded. The caller freezes or wraps it.

    Under `torch.device("meta")` its parameters take no memory. Raises `ModelConfigError` where the layout does not fit.
    """
    check_layout(spec, tp=parallel.tp, pp=parallel.pp, ep=parallel.ep)
    config = transformer_config(spec, tp=parallel.tp, pp=parallel.pp, ep=parallel.ep, dtype=dtype)
    model = LogProbModel(
        num_vocab=spec.vocab_size,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        config=config,
        transformer_layer_spec=_layer_spec(spec),
        vocab_size=padded_vocab_size(spec, parallel.tp),
        max_sequence_length=spec.max_positions,
        pre_process=topology.is_first_stage,
        post_process=topology.is_last_stage,
        share_embeddings_and_output_weights=spec.tied,
        position_embedding_type="yarn" if spec.rope.kind == "yarn" else "rope",
        rotary_base=spec.rope.theta,
        rope_scaling=spec.rope.kind == "llama3",
        rope_scaling_factor=spec.rope.factor,
    )
    _mark_tensor_parallel(model)
    return model.to(config.params_dtype)  # as Float16Module does: torch makes the norms in fp32


class _ColumnParallelWithBias(ColumnParallelLinear):
    def __init__(self, *args: Any, bias: bool, **kwargs: Any):
        super().__init__(*args, bias=True, **kwargs)


class _RowParallelWithBias(RowParallelLinear):
    def __init__(self, *args: Any, bias: bool, **kwargs: Any):
        super().__init__(*args, bias=True, **kwargs)


def _layer_spec(spec: ModelSpec) -> ModuleSpec:
    """A layer of Megatron-Core's own modules, on our attention, with each bias that the model has.

    The biases are asked for here, module by module: `TransformerConfig` has one switch for all linear layers.
    """
    layer_spec = get_gpt_layer_local_spec(
        num_experts=spec.num_experts or None, qk_layernorm=spec.qk_norm, normalization="RMSNorm"
    )
    layer = layer_spec.submodules
    attention = layer.self_attention.submodules
    attention.core_attention = SDPAttention
    if spec.output_bias:
        attention.linear_proj = _RowParallelWithBias
    if spec.mlp_bias:
        layer.mlp.submodules.linear_fc1 = _ColumnParallelWithBias
        layer.mlp.submodules.linear_fc2 = _RowParallelWithBias
    if spec.num_experts:
        # With experts, Transformer Engine's layers keep this norm apart too; checkpoints name it as it is.
        del layer.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return layer_spec


def padded_vocab_size(spec: ModelSpec, tp: int) -> int:
    """Vocabulary rows of embedding and output layer, padded so that TP divides them. The padding is never read."""
    return -(-spec.vocab_size // tp) * tp


def _mark_tensor_parallel(model: torch.nn.Module) -> None:
    """Say which weights are split over TP. Megatron-Core does so only when it draws initial weights (layers.py), and
    without the mark the gradient norm counts tensor rank 0's shard alone."""
    split_dim = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in model.modules():
        dim = next((dim for kind, dim in split_dim.items() if isinstance(module, kind)), None)
        if dim is not None and module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(module.weight, True, dim, 1)
