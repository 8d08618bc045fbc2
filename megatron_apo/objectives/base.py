"""What a training method is to the loop. A method declares; the loop obeys and never reads its name.

    prepared = objective.prepare(samples)          # before any gradient: targets of the whole batch
    term = objective.loss(micro, prepared)         # of each micro-batch, at the present weights
    term = objective.value_loss(micro, prepared)   # of each micro-batch, at the critic's, where there is one

Pure tensor maths: no I/O, and of ranks only that a replica holds the tokens of some sequences and everyone the numbers
of all (`Samples.share`). Shapes: K sequences of the whole batch that are learned from, O of them whose tokens are here;
B sequences of a micro-batch, R response tokens of these, concatenated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

LogProbs = Literal["reference", "old_policy", "sampler"]
"""Whose log-probs of the sampled tokens, without gradient: the frozen reference's; the old policy's, which is the
policy's at the weights that sampled, as the trainer computes it; the engine's that sampled."""

ImportanceLevel = Literal["token", "sequence"]
TargetsBy = Literal["sequence", "group", "batch"]


@dataclass(frozen=True)
class Samples:
    """A whole rollout batch as a method sees it, in rollout order: numbers of all K sequences, tokens of `own` alone.

    share(values_O) -> [K]: a number of each of `own`, from the replica that computes it to every one. All replicas call
    it equally often.
    """

    group_K: Tensor  # which of the step's prompts
    reward_K: Tensor
    num_tokens_K: Tensor  # response tokens, stop id included
    value_K: Tensor | None = None  # of the value source, where the method takes a baseline
    own: Sequence[int] = ()  # [O]
    log_probs: Mapping[LogProbs, Sequence[Tensor]] = field(default_factory=dict)  # of `own`, a number a token
    critic: Sequence[Tensor] = ()  # of `own`, the critic's value before each token
    share: Callable[[Tensor], Tensor] = lambda values_O: values_O

    def shared_sums(self, values: Sequence[Tensor]) -> Tensor:
        """[K] fp32 sums over each sequence's tokens, of those of `own`."""
        sums = [value.float().sum() for value in values]
        return self.share(torch.stack(sums) if sums else self.reward_K.new_zeros(0))

    def token_mean(self, values: Sequence[Tensor]) -> Tensor:
        """fp64 scalar, over all tokens of the batch, of numbers of each token of `own`."""
        return self.shared_sums(values).double().sum() / self.num_tokens_K.sum()


@dataclass(frozen=True)
class Prepared:
    """Targets fixed before any gradient, in fp32: numbers of all sequences, and of `own` numbers a token.

    metrics: what is told of them, by the names of metrics.jsonl.
    """

    per_sequence: Mapping[str, Tensor] = field(default_factory=dict)  # name -> [K]
    per_token: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)  # name -> {place among the K: values}
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Micro:
    """What is learned from of a micro-batch, at the present weights; nothing, where all of it is masked.

    value_R: the policy's log-probs, with gradient; for `value_loss` the critic's values. places: its sequences among
    the K. sequence_R: the position in `places` of each token. fixed: [R] log-probs without gradient, of those that
    `loss_log_probs` names. first_logit_B: raw logits of the first tokens, with gradient, if asked for. others_K: where
    the loss couples a group's sequences, the present log-ratio of each one that is not here but in a group of one that
    is; without gradient.
    """

    value_R: Tensor
    places: Sequence[int]
    sequence_R: Tensor
    fixed: Mapping[LogProbs, Tensor] = field(default_factory=dict)
    first_logit_B: Tensor | None = None
    others_K: Tensor | None = None

    def sums(self, value_R: Tensor) -> Tensor:
        """[B] over each sequence, in fp32."""
        return sequence_sum(value_R, self.sequence_R, len(self.places))

    def means(self, value_R: Tensor) -> Tensor:
        """[B] over each sequence's tokens, in fp32."""
        return self.sums(value_R) / self.sums(torch.ones_like(value_R))

    def of_sequences(self, values_K: Tensor) -> Tensor:
        """[B]"""
        return values_K[list(self.places)]

    def of_tokens(self, values: Mapping[int, Tensor]) -> Tensor:
        """[R]"""
        return torch.cat([self.value_R.detach()[:0], *(values[place] for place in self.places)])

    def joined(self, log_ratio_B: Tensor) -> Tensor:
        """[K] log-ratios of the sequences that are here, with gradient, and of their groups' others, without."""
        assert self.others_K is not None
        places_B = torch.tensor(self.places, dtype=torch.int64, device=log_ratio_B.device)
        return self.others_K.index_put((places_B,), log_ratio_B)


@dataclass(frozen=True)
class Stats:
    """What a micro-batch says of itself, without gradient: scalars to add up, and scalars to take the maximum of.

    A sum NAME that has a sum NAME/count beside it (`averaged`) is told as NAME in metrics.jsonl, one divided by the
    other over all micro-batches of the step.
    """

    sums: Mapping[str, Tensor]
    maxima: Mapping[str, Tensor] = field(default_factory=dict)


def averaged(name: str, value: Tensor) -> dict[str, Tensor]:
    """Entries of `Stats.sums` by which metrics.jsonl tells the mean of `value`: a number for each token or sequence."""
    value = value.detach().float()
    return {name: value.sum(), f"{name}/count": value.new_tensor(value.numel())}


@dataclass(frozen=True)
class LossTerm:
    """total: scalar with gradient, a sum over `count` units."""

    total: Tensor
    count: int
    stats: Stats


@dataclass(frozen=True)
class Cost:
    """What one step of a method takes, as it declares it.

    samples_per_prompt: responses drawn and graded.
    forwards: passes without gradient, by whose they are, in minibatches that they go over. `present` are those over
    the sequences, and these alone, of groups that the micro-batches of a later minibatch split: a loss that couples
    them reads the others' present log-ratios. At the first minibatch, all log-ratios being 0, it costs nothing.
    forward_backwards: passes with gradient, in minibatches.
    token_buffers, sequence_buffers: names of the numbers that are held for each response token, or each response, of
    the batch while it is learned from: log-probs and targets.
    """

    samples_per_prompt: int
    forwards: Mapping[str, int]
    forward_backwards: Mapping[str, int]
    token_buffers: tuple[str, ...]
    sequence_buffers: tuple[str, ...]


class Objective:
    """A training method. What it declares, by default what most need:

    samples_per_prompt  responses drawn for each prompt of a step
    max_draws           rounds in which a step's prompts are drawn: see `learns_from`
    target_log_probs    whose log-probs `prepare` reads
    loss_log_probs      whose log-probs `loss` reads
    takes_baseline      whether `prepare` reads a value source's baseline
    needs_critic        whether `prepare` reads a critic's values, and `value_loss` teaches it
    needs_first_logit   whether `loss` reads the raw logit of each response's first token
    couples             whether a sequence's loss depends on the log-ratio, to the old policy's, of its group's others
    unit                what `count` counts: the global count divides the gradient
    importance_levels   at which its gradient may be weighted (importance.py): `sequence` where the loss is a sum of a
                        term for each sequence, `token` where a token's log-prob enters by itself; none where what it
                        learns from was not sampled
    reinforce_scale     the loss's gradient, as a step begins, is this many times REINFORCE's; None where the two differ
                        by more than a factor
    targets_by          what has to be there before a sequence's targets are known: it, its group, or the whole batch.
                        Unless it is the batch, `prepare` may be given some whole groups at a time, and its metrics are
                        means over the sequences
    sequence_targets    the names in `Prepared.per_sequence`
    token_targets       the names in `Prepared.per_token`
    told                the names in `Prepared.metrics`, and those that the losses tell as `averaged`

    What a method's settings decide is a property here.
    """

    samples_per_prompt: int = 1
    max_draws: int = 1
    takes_baseline: ClassVar[bool] = False
    needs_critic: ClassVar[bool] = False
    needs_first_logit: ClassVar[bool] = False
    couples: ClassVar[bool] = False
    importance_levels: ClassVar[tuple[ImportanceLevel, ...]] = ("token",)
    targets_by: ClassVar[TargetsBy] = "batch"
    sequence_targets: ClassVar[tuple[str, ...]] = ()
    token_targets: ClassVar[tuple[str, ...]] = ()

    @property
    def told(self) -> frozenset[str]:
        return frozenset()

    @property
    def target_log_probs(self) -> frozenset[LogProbs]:
        return frozenset()

    @property
    def loss_log_probs(self) -> frozenset[LogProbs]:
        return frozenset()

    @property
    def needs_reference(self) -> bool:
        """Whether there is a reference model in training."""
        return "reference" in self.target_log_probs | self.loss_log_probs

    @property
    def unit(self) -> Literal["sequence", "token"]:
        return "sequence"

    @property
    def reinforce_scale(self) -> float | None:
        return None

    def learns_from(self, reward_G: Sequence[float]) -> bool:
        """Whether a group of these rewards, those of masked responses left out, is worth a place in the batch; another
        prompt is drawn for one that is not, in at most `max_draws` rounds."""
        return True

    def prepare(self, samples: Samples) -> Prepared:
        """Targets from the whole global batch, or from what `targets_by` says (baselines, group statistics, KL in the
        reward)."""
        raise NotImplementedError

    def loss(self, micro: Micro, prepared: Prepared) -> LossTerm:
        """The micro-batch's loss, summed."""
        raise NotImplementedError

    def value_loss(self, micro: Micro, prepared: Prepared) -> LossTerm:
        """The critic's loss of the micro-batch, summed over tokens."""
        raise NotImplementedError

    def cost(self, minibatches: int) -> Cost:
        """Of a step of so many minibatches, without what importance weights take.

        The old policy's log-probs of the first minibatch are those of its own training pass, unless targets need them
        before it.
        """
        needed = self.target_log_probs | self.loss_log_probs
        later = minibatches - 1
        forwards = {
            "reference": minibatches if "reference" in needed else 0,
            "old_policy": minibatches if "old_policy" in self.target_log_probs else later * ("old_policy" in needed),
            "critic": minibatches if self.needs_critic else 0,
            "present": later if self.couples else 0,
        }
        critic = ("critic",) if self.needs_critic else ()
        return Cost(
            samples_per_prompt=self.samples_per_prompt,
            forwards={name: number for name, number in forwards.items() if number},
            forward_backwards={name: minibatches for name in ("policy", *critic)},
            token_buffers=(*sorted(needed), *self.token_targets),
            sequence_buffers=self.sequence_targets,
        )


def sequence_sum(value_R: Tensor, sequence_R: Tensor, num_sequences: int) -> Tensor:
    """[B]: sum of `value_R` over each sequence, in fp32."""
    return value_R.new_zeros(num_sequences, dtype=torch.float32).index_add(0, sequence_R, value_R.float())


def first_tokens(sequence_R: Tensor) -> Tensor:
    """[R] whether a token is its sequence's first. sequence_R: which sequence it is of."""
    return sequence_R.diff(prepend=sequence_R.new_tensor([-1])) != 0


ADVANTAGE = frozenset({"advantage/mean", "advantage/second_moment"})


def advantage_metrics(advantage_K: Tensor, value_K: Tensor | None = None) -> dict[str, float]:
    """Mean and second moment, and the baseline's mean; NaN without any."""
    metrics = {
        "advantage/mean": float(advantage_K.mean()),
        "advantage/second_moment": float(advantage_K.square().mean()),
    }
    return metrics if value_K is None else {**metrics, "value/mean": float(value_K.mean())}


OBJECTIVES: dict[str, Callable[..., Objective]] = {}
