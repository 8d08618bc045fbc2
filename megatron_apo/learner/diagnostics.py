"""What a training step says of itself, over all ranks: log-ratio, KL, mismatch with the sampler, loss and norms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_apo.objectives import LossTerm, Stats
from megatron_apo.objectives.base import sequence_sum
from megatron_apo.runtime.topology import Topology

# Largest exponent of a ratio that is only told: e^20 is 5e8, and its square still an fp32 number.
_MOST_NATS = 20.0
_COUNT = "/count"


def diagnose(
    term: LossTerm,
    log_prob_R: Tensor,
    reference_R: Tensor | None,
    sampler_R: Tensor,
    sequence_R: Tensor,
    num_sequences: int,
) -> Stats:
    """The objective's own stats and, over response tokens, also those of masked responses: the log-ratio to the
    reference, where that was asked for, and the distance to the sampler.

    All [R], without gradient: log-probs by the policy, by the reference, and by the engine that sampled; the sequence,
    of so many, that a token belongs to.
    """
    difference_R = log_prob_R - sampler_R
    mismatch_R = difference_R.abs()
    ratio_B = sequence_sum(difference_R, sequence_R, num_sequences).clamp(max=_MOST_NATS).exp()
    one = log_prob_R.new_ones(())
    sums = {
        "count": one * term.count,
        "tokens": one * len(log_prob_R),
        "sequences": one * num_sequences,
        "log_prob": log_prob_R.sum(),
        "mismatch": mismatch_R.sum(),
        "mult_prob_error": mismatch_R.clamp(max=_MOST_NATS).exp().sum(),
        "sequence_ratio": ratio_B.sum(),
        "sequence_ratio_square": ratio_B.square().sum(),
    }
    maxima = {"mismatch": mismatch_R.max(), "sequence_ratio": ratio_B.max()}
    if reference_R is not None:
        log_ratio_R = log_prob_R - reference_R
        sums["log_ratio"], maxima["log_ratio"] = log_ratio_R.sum(), log_ratio_R.abs().max()
    return Stats({**term.stats.sums, **sums}, {**term.stats.maxima, **maxima})


class LogRatioError(RuntimeError):
    """The first batch's log-ratio is not zero: policy and reference are not computed the same way."""


class StepRecord:
    """Stats and gradient norms of a step's minibatches. Norms that are not finite are those of skipped optimizer steps;
    minibatches of masked responses alone have none.

    KL and mismatch are those of the first minibatch, which alone is evaluated at the weights that sampled it.
    """

    def __init__(self, reinforce_scale: float | None, layout: Mapping[str, float] | None = None):
        """reinforce_scale: the objective's. layout: how evenly the work was spread, by the names of metrics.jsonl."""
        self._reinforce_scale = reinforce_scale
        self._told = dict(layout or {})
        self._policy, self._critic = _Minibatches(), _Minibatches()
        self._grad_norms: list[float] = []
        self._critic_norms: list[float] = []
        self._masked_steps = 0

    def add(self, stats: Sequence[Stats]) -> None:
        """One minibatch, before its optimizer step: its micro-batches' stats (none before the last stage)."""
        self._policy.add(stats)

    def add_critic(self, stats: Sequence[Stats], grad_norm: float) -> None:
        """The critic's part of a minibatch, and its gradient's norm."""
        self._critic.add(stats)
        self._critic_norms.append(grad_norm)

    def add_step(self, grad_norm: float | None) -> None:
        """The minibatch's optimizer step: its gradient's norm; None: none was taken, all responses being masked."""
        if grad_norm is None:
            self._masked_steps += 1
        else:
            self._grad_norms.append(grad_norm)

    def tell(self, values: Mapping[str, float]) -> None:
        """More of the step, by the names of metrics.jsonl."""
        self._told.update(values)

    def gather(self, topology: Topology) -> StepRecord:
        """Reduce the minibatches that were added since the last call over data-parallel replicas, and tell every rank.
        Collective; returns itself."""
        self._policy.gather(topology)
        self._critic.gather(topology)
        return self

    def require_no_log_ratio(self, tolerance: float) -> None:
        """Raise `LogRatioError` unless the first minibatch's log-ratio is 0, policy and reference being one model."""
        if not self.first_log_ratio <= tolerance:  # so that a NaN fails
            raise LogRatioError(
                f"the first batch's log-ratio is up to {self.first_log_ratio:.3g} a token, not 0: policy and reference "
                f"differ in weights, layout or precision (train.first_log_ratio_tolerance allows {tolerance:g})"
            )

    @property
    def losses(self) -> list[float]:
        """Each minibatch's summed loss."""
        return [totals.sums["loss"] for totals in self._policy.totals]

    @property
    def first_log_ratio(self) -> float:
        """Largest |log-ratio| to the reference of a token in the first minibatch, nats."""
        return self._policy.totals[0].maxima.get("log_ratio", 0.0)

    @property
    def mismatch(self) -> float:
        """Mean |log-prob difference| of policy and sampler over the first minibatch's tokens, nats."""
        first = self._policy.totals[0].sums
        return first["mismatch"] / first["tokens"]

    @property
    def is_finite(self) -> bool:
        """Whether policy and reference computed numbers for every token of the first minibatch."""
        sums = self._policy.totals[0].sums
        return all(math.isfinite(sums[name]) for name in ("log_prob", "log_ratio") if name in sums)

    def metrics(self) -> dict[str, float]:
        """By the names of metrics.jsonl.

        mismatch/token_mult_prob_error is NeMo-RL's: the mean over tokens of exp |log pi - log pi_sampler|.
        mismatch/sequence_ratio_* is pi / pi_sampler of a whole response; of its mean, 1 is expected where the sampler
        is only noisy. mismatch/sequence_ess: (sum w)^2 / (B sum w^2) of these ratios w, the share of the responses that
        would be left as an effective sample if they were weighted so. Exponents are cut at 20.
        """
        first, total_count = self._policy.totals[0], sum(totals.sums["count"] for totals in self._policy.totals)
        finite = [norm for norm in self._grad_norms if math.isfinite(norm)]
        grad_norm = sum(finite) / len(finite) if finite else math.nan
        return {
            "loss": _ratio(sum(totals.sums["loss"] for totals in self._policy.totals), total_count),
            **self._kl(),
            "mismatch/max": first.maxima["mismatch"],
            "mismatch/mean": self.mismatch,
            "mismatch/token_mult_prob_error": first.sums["mult_prob_error"] / first.sums["tokens"],
            "mismatch/sequence_ratio_mean": first.sums["sequence_ratio"] / first.sums["sequences"],
            "mismatch/sequence_ratio_max": first.maxima["sequence_ratio"],
            "mismatch/sequence_ess": _effective_share(first.sums),
            "grad_norm": grad_norm,
            **({"grad_norm_reinforce": grad_norm / self._reinforce_scale} if self._reinforce_scale else {}),
            "skipped_steps": len(self._grad_norms) - len(finite),
            "masked_steps": self._masked_steps,
            **({"entropy/per_token": first.sums["entropy"] / first.sums["tokens"]} if "entropy" in first.sums else {}),
            **self._importance(),
            **self._policy.averages(),
            **self._of_critic(),
            **self._told,
        }

    def _kl(self) -> dict[str, float]:
        """To the reference, where its log-probs are known."""
        sums = self._policy.totals[0].sums
        names = {"kl/per_token": "tokens", "kl/per_sequence": "sequences"}
        return {name: sums["log_ratio"] / sums[unit] for name, unit in names.items() if "log_ratio" in sums}

    def _of_critic(self) -> dict[str, float]:
        if not self._critic_norms:
            return {}
        totals = self._critic.totals
        loss, count = (sum(one.sums[name] for one in totals) for name in ("loss", "count"))
        finite = [norm for norm in self._critic_norms if math.isfinite(norm)]
        return {
            "critic/loss": _ratio(loss, count),
            "critic/grad_norm": _ratio(sum(finite), len(finite)),
            "critic/skipped_steps": len(self._critic_norms) - len(finite),
            **self._critic.averages(),
        }

    def _importance(self) -> dict[str, float]:
        """Mean weight and share of those that were cut, of the step's tokens or responses; nothing without weights."""
        names = ("importance", "importance_capped", "importance_units")
        if names[0] not in self._policy.totals[0].sums:
            return {}
        weight, capped, units = (sum(totals.sums[name] for totals in self._policy.totals) for name in names)
        return {"importance/mean": _ratio(weight, units), "importance/capped": _ratio(capped, units)}


class _Minibatches:
    """Stats of a model's minibatches; `totals`: over all ranks, of those that were gathered."""

    def __init__(self) -> None:
        self.totals: list[_Totals] = []
        self._added: list[Stats] = []

    def add(self, stats: Sequence[Stats]) -> None:
        if stats:
            sums = {name: torch.stack([piece.sums[name] for piece in stats]).sum() for name in stats[0].sums}
            maxima = {name: torch.stack([piece.maxima[name] for piece in stats]).max() for name in stats[0].maxima}
            self._added.append(Stats(sums, maxima))

    def gather(self, topology: Topology) -> None:
        """Context- and tensor-parallel ranks of the last stage have the same stats, and count once."""
        new = self._added
        if topology.is_last_stage and topology.dp > 1:
            new = [_reduced(stats, topology) for stats in new]
        plain = [_Totals(_plain(stats.sums), _plain(stats.maxima)) for stats in new]
        self.totals += topology.broadcast(plain, src=topology.last_stage_rank)
        self._added = []

    def averages(self) -> dict[str, float]:
        """What the objective tells of its losses (`averaged`), over all minibatches."""
        names = [name.removesuffix(_COUNT) for name in self.totals[0].sums if name.endswith(_COUNT)]
        sums = {name: sum(one.sums[name] for one in self.totals) for name in names}
        counts = {name: sum(one.sums[name + _COUNT] for one in self.totals) for name in names}
        return {name: _ratio(sums[name], counts[name]) for name in names}


@dataclass(frozen=True)
class _Totals:
    """A minibatch's `Stats` over all ranks."""

    sums: dict[str, float]
    maxima: dict[str, float]


def _reduced(stats: Stats, topology: Topology) -> Stats:
    """A minibatch's stats over all data-parallel replicas."""
    found = []
    for values, op in ((stats.sums, dist.ReduceOp.SUM), (stats.maxima, dist.ReduceOp.MAX)):
        together = torch.stack([value.float() for value in values.values()]) if values else torch.empty(0)
        if values:
            dist.all_reduce(together, op=op, group=topology.dp_group)
        found.append(dict(zip(values, together, strict=True)))
    return Stats(*found)


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan  # a step may learn from no response


def _effective_share(sums: Mapping[str, float]) -> float:
    square = sums["sequence_ratio_square"] * sums["sequences"]
    return sums["sequence_ratio"] ** 2 / square if square else math.nan  # all ratios may round to 0


def _plain(values: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
