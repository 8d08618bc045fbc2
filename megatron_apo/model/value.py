"""The critic: the policy's layers under a head that gives the value of a state.

    spec.as_critic()                            what a model's critic is: `load_weights` and `WeightStream` take it
    build_critic(spec, parallel, topology, ..)  this rank's part of it

The head is one row, V(s_t) = w . h_t with h_t behind the final norm. It starts at zero. So the first values are 0 in
every layout and no number is drawn, the first advantages are of the rewards alone, without a random head's noise, and
the layers get no gradient before the row has found a direction. It has no bias: Adam moves each weight by about the
learning rate, and all weights of the row together move a value thousands of times as far as a bias would.

Shapes: B sequences, S positions (L of them on a sequence-parallel rank), H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_apo.config import ParallelConfig, TrainConfig
from megatron_apo.data.batch import IGNORE
from megatron_apo.model.build import FP32, TokenModel, build_chunks
from megatron_apo.model.hf_config import ModelSpec
from megatron_apo.model.precision import Precision
from megatron_apo.runtime.topology import Topology


class ValueModel(TokenModel):
    """Returns the value of the state before each label's token, where a `LogProbModel` returns its log-prob."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        assert not self.share_embeddings_and_output_weights, "a critic's embedding is shared with nothing"
        if not self.post_process:
            return
        del self.output_layer  # Megatron-Core always makes one. Nothing was written to it yet, nor made for it.
        self.value_head = torch.nn.Parameter(torch.zeros(1, self.config.hidden_size, dtype=self.config.params_dtype))
        # Whether each tensor rank has the gradient of its own positions, which Megatron-Core then adds up, or all of it
        # (finalize_model_grads.py, `_allreduce_non_tensor_model_parallel_grads`).
        self.value_head.sequence_parallel = self.config.sequence_parallel

    def _postprocess(self, hidden_states: Tensor, *, labels: Tensor, **unused: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        value_LB = hidden_states.float() @ self.value_head[0].float()
        if self.config.sequence_parallel:  # values alone are gathered: a position's needs no other's hidden state
            value_LB = gather_from_sequence_parallel_region(
                value_LB,
                tensor_parallel_output_grad=False,  # each rank computes the same loss, and so has its part's gradient
                group=self.pg_collection.tp,
            )
        return value_LB.transpose(0, 1).masked_fill(labels == IGNORE, 0.0)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Every parameter as it is: `GPTModel` and `LanguageModule` would speak of the output layer."""
        return super(LanguageModule, self).sharded_state_dict(prefix, sharded_offsets, metadata)


def build_critic(
    spec: ModelSpec,
    parallel: ParallelConfig,
    topology: Topology,
    precision: Precision = FP32,
    *,
    train: TrainConfig | None = None,
) -> list[ValueModel]:
    """This rank's part of the critic that `spec` describes (`ModelSpec.as_critic`), as `build_model` gives a policy's:
    values are 0, and other weights not yet loaded."""
    assert spec.head == "value", "the spec is a policy's; take its `as_critic()`"
    return build_chunks(ValueModel, spec, parallel, topology, precision, train or TrainConfig())
