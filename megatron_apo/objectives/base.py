"""What a training method is to the loop. A method declares; the loop obeys and never reads its name.

Pure tensor maths: no I/O, no ranks. Shapes: B sequences (of the whole batch in `prepare`, of a micro-batch in `loss`),
R response tokens of a micro-batch, concatenated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

RatioDenominator = Literal["reference", "sampler", "old_policy", "none"]
ImportanceLevel = Literal["token", "sequence"]


@dataclass(frozen=True)
class Samples:
    """A whole rollout batch as a method sees it, in rollout order."""

    prompt_ids: Sequence[str]
    reward_B: Tensor
    num_tokens_B: Tensor  # response tokens, stop id included


@dataclass(frozen=True)
class Prepared:
    """Targets fixed before any gradient: named fp32 values per sequence, and per token where a method has them."""

    per_sequence: Mapping[str, Tensor]  # name -> [B]
    per_token: Mapping[str, Sequence[Tensor]]  # name -> B tensors, one value a response token

    def select(self, indices: Sequence[int]) -> MicroTargets:
        """The targets of a micro-batch made of these sequences."""
        rows = list(indices)
        return MicroTargets(
            per_sequence={name: values[rows] for name, values in self.per_sequence.items()},
            per_token={name: torch.cat([values[i] for i in rows]) for name, values in self.per_token.items()},
        )


@dataclass(frozen=True)
class MicroTargets:
    """`Prepared`, for one micro-batch: [B] and [R] tensors."""

    per_sequence: Mapping[str, Tensor]
    per_token: Mapping[str, Tensor]


class Objective(Protocol):
    """A training method.

    samples_per_prompt  responses drawn for each prompt of a step
    ratio_denominator   whose log-probs the policy's are held against: the frozen reference's, the sampling engine's,
                        the old policy's (at the start of the step), or none
    needs_critic        whether values of a critic come with the batch
    unit                what `count` counts: the global count divides the gradient
    importance_levels   at which its gradient may be weighted (importance.py): `sequence` where the loss is a sum of a
                        term for each sequence, `token` where a token's log-prob enters by itself; none where what it
                        learns from was not sampled
    reinforce_scale     the loss's gradient is this many times REINFORCE's
    """

    samples_per_prompt: ClassVar[int]
    ratio_denominator: ClassVar[RatioDenominator]
    needs_critic: ClassVar[bool]
    unit: ClassVar[Literal["sequence", "token"]]
    importance_levels: ClassVar[tuple[ImportanceLevel, ...]]

    @property
    def reinforce_scale(self) -> float: ...

    def prepare(self, samples: Samples, values: Mapping[str, float]) -> Prepared:
        """Targets from the whole global batch (baselines, group statistics). `values`: V* by prompt id."""

    def loss(self, log_prob_R: Tensor, denominator_R: Tensor, sequence_R: Tensor, targets: MicroTargets) -> LossTerm:
        """The micro-batch's loss, summed."""


@dataclass(frozen=True)
class Stats:
    """What a micro-batch says of itself, without gradient: scalars to add up, and scalars to take the maximum of."""

    sums: Mapping[str, Tensor]
    maxima: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LossTerm:
    """total: scalar with gradient, a sum over `count` units."""

    total: Tensor
    count: int
    stats: Stats


def sequence_sum(value_R: Tensor, sequence_R: Tensor, num_sequences: int) -> Tensor:
    """[B]: sum of `value_R` over each sequence, in fp32."""
    return value_R.new_zeros(num_sequences, dtype=torch.float32).index_add(0, sequence_R, value_R.float())


OBJECTIVES: dict[str, Callable[..., Objective]] = {}
