"""Builds the Megatron-Core model: policy or reference, this rank's pipeline stage and tensor shard.

`build_model` gives one that returns log-probs. `build_chunks` is that for any `TokenModel`; the critic is `value.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_apo.config import ParallelConfig, TrainConfig
from megatron_apo.data.batch import IGNORE
from megatron_apo.model.hf_config import ModelSpec, check_layout
from megatron_apo.model.layer_spec import block_spec
from megatron_apo.model.logprobs import vocab_parallel_log_probs
from megatron_apo.model.megatron_config import transformer_config
from megatron_apo.model.precision import Precision, check_precision
from megatron_apo.model.recompute import check_recompute
from megatron_apo.runtime.topology import Topology

FP32 = Precision()


class TokenModel(GPTModel):
    """A GPT whose last stage returns a number for each token that there is a label of.

    forward(input_ids, position_ids, attention_mask, labels=...) -> fp32 [B, S], or [B, S, N] of N numbers, 0 where the
    label is `IGNORE`; earlier pipeline stages return hidden states as usual. `sums` is what else the last pass says of
    those tokens, added up, without gradient.
    """

    sums: Mapping[str, Tensor] = {}


Model = TypeVar("Model", bound=TokenModel)


class LogProbModel(TokenModel):
    """Returns log-probs of `labels` under `temperature`, and never holds all logits at once. With `logits`, and with
    gradient, it returns two numbers a token: beside the log-prob its raw logit, before the temperature.

    In `sums` is the `entropy`, nats, of the distributions that those tokens were drawn from; not without gradient, nor
    where it was not asked for.
    """

    def __init__(
        self, *, num_vocab: int, temperature: float, chunk_tokens: int, entropy: bool, logits: bool, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.num_vocab = num_vocab  # without the padding that makes the vocabulary divisible by TP
        self.temperature = temperature
        self.chunk_tokens = chunk_tokens
        self.entropy = entropy
        self.logits = logits

    def _postprocess(self, hidden_states: Tensor, *, labels: Tensor, **unused: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states,
                tensor_parallel_output_grad=False,  # the log-probs add the ranks' gradients up
                group=self.pg_collection.tp,
            )
        tied = self.share_embeddings_and_output_weights
        weight_VH = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        tp = self.pg_collection.tp
        first_row = tp.rank() * len(weight_VH)
        wanted_BS = labels != IGNORE
        log_prob, entropy, logit = vocab_parallel_log_probs(
            hidden_states.transpose(0, 1)[wanted_BS],
            weight_VH,
            labels[wanted_BS],
            num_rows=min(max(self.num_vocab - first_row, 0), len(weight_VH)),
            first_row=first_row,
            temperature=self.temperature,
            chunk_tokens=self.chunk_tokens,
            group=tp,
            entropy=self.entropy and torch.is_grad_enabled(),
            logit=self.logits and torch.is_grad_enabled(),
        )
        self.sums = {} if entropy is None else {"entropy": entropy.sum()}

        def placed(value: Tensor) -> Tensor:
            return hidden_states.new_zeros(labels.shape, dtype=torch.float32).masked_scatter(wanted_BS, value)

        return placed(log_prob) if logit is None else torch.stack([placed(log_prob), placed(logit)], dim=-1)


@contextmanager
def at_temperature(chunks: Sequence[LogProbModel], temperature: float) -> Iterator[None]:
    """Within: the model whose chunks these are returns log-probs under another temperature."""
    usual = [chunk.temperature for chunk in chunks]
    for chunk in chunks:
        chunk.temperature = temperature
    try:
        yield
    finally:
        for chunk, own in zip(chunks, usual, strict=True):
            chunk.temperature = own


def build_model(
    spec: ModelSpec,
    parallel: ParallelConfig,
    topology: Topology,
    precision: Precision = FP32,
    *,
    temperature: float = 1.0,
    train: TrainConfig | None = None,
    logits: bool = False,
) -> list[LogProbModel]:
    """This rank's part of the model, weights not yet loaded: its chunks in pipeline order, one unless parallel.vpp > 1.

    temperature: of the log-probs. train: what is recomputed, and how log-probs are made; none: the defaults. logits:
    see `LogProbModel`.
    Under `torch.device("meta")` its parameters take no memory. Raises `ModelConfigError` where the layout does not fit.
    """
    train = train or TrainConfig()
    make = partial(
        LogProbModel,
        num_vocab=spec.vocab_size,
        temperature=temperature,
        chunk_tokens=train.log_prob_chunk_tokens,
        entropy=train.entropy,
        logits=logits,
    )
    return build_chunks(make, spec, parallel, topology, precision, train)


def build_chunks(
    make: Callable[..., Model],
    spec: ModelSpec,
    parallel: ParallelConfig,
    topology: Topology,
    precision: Precision,
    train: TrainConfig,
) -> list[Model]:
    """As `build_model`, of models of any kind: `make` takes the arguments of Megatron-Core's `GPTModel`."""
    check_layout(spec, parallel)
    check_precision(spec, parallel, precision.fp8)
    check_recompute(spec, parallel, train, precision.layers)
    config = transformer_config(spec, parallel, precision, train)
    chunks = []
    for chunk in range(parallel.vpp):
        model = make(
            config=config,
            transformer_layer_spec=block_spec(spec, config, precision.layers),
            vocab_size=padded_vocab_size(spec, parallel.tp),
            max_sequence_length=spec.max_positions,
            pre_process=topology.is_first_stage and chunk == 0,
            post_process=topology.is_last_stage and chunk == parallel.vpp - 1,
            share_embeddings_and_output_weights=spec.tied,
            position_embedding_type="yarn" if spec.rope.kind == "yarn" else "rope",
            rotary_base=spec.rope.theta,
            rope_scaling=spec.rope.kind == "llama3",
            rope_scaling_factor=spec.rope.factor,
            vp_stage=chunk if parallel.vpp > 1 else None,
        )
        _mark_tensor_parallel(model)
        _add_experts_in_order(model)
        if precision.layers == "local":
            model.to(config.params_dtype)  # torch makes the norms in fp32; Transformer Engine asks for the type
        if torch.get_default_device().type != "meta":
            model.to(topology.device)  # torch's norms and the router are made on the CPU (torch_norm.py, router.py)
        chunks.append(model)
    return chunks


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


def _add_experts_in_order(model: torch.nn.Module) -> None:
    """Have a token's experts added up in one order, so that policy and reference agree in every bit.

    On a GPU Megatron-Core leaves the order to chance, which tells from three experts on, unless torch is asked for
    deterministic algorithms (moe_utils.py, `unpermute`). It is asked there alone: elsewhere it would cost time, and an
    error where it has none. Here it costs a sort of the tokens by expert, and for a moment a copy of what the experts
    gave. Transformer Engine's fused sum needs neither, but local layers do not have it.
    """
    for module in model.modules():
        if isinstance(module, MoELayer):
            dispatcher = module.token_dispatcher
            dispatcher.combine_postprocess = _deterministic(dispatcher.combine_postprocess)


def _deterministic(work: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    @wraps(work)
    def ordered(tokens: Tensor) -> Tensor:
        usual = torch.get_deterministic_debug_mode()
        torch.set_deterministic_debug_mode("error")
        try:
            return work(tokens)
        finally:
            torch.set_deterministic_debug_mode(usual)

    return ordered
