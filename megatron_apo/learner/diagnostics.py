"""What a training step says of itself, over all ranks: log-ratio, KL, mismatch with the sampler, loss and norms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_apo.objectives import LossTerm, Stats
from megatron_apo.runtime.topology import Topology


def diagnose(term: LossTerm, log_prob_R: Tensor, denominator_R: Tensor, sampler_R: Tensor) -> Stats:
    """The objective's own stats and, over response tokens: the log-ratio, and the distance to the sampler.

    All [R], without gradient: log-probs by the policy, of the ratio's denominator, and by the engine that sampled.
    """
    log_ratio_R = log_prob_R - denominator_R
    mismatch_R = (log_prob_R - sampler_R).abs()
    one = log_prob_R.new_ones(())
    sums = {
        "count": one * term.count,
        "tokens": one * len(log_prob_R),
        "log_ratio": log_ratio_R.sum(),
        "mismatch": mismatch_R.sum(),
    }
    maxima = {"log_ratio": log_ratio_R.abs().max(), "mismatch": mismatch_R.max()}
    return Stats({**term.stats.sums, **sums}, {**term.stats.maxima, **maxima})


class LogRatioError(RuntimeError):
    """The first batch's log-ratio is not zero: policy and reference are not computed the same way."""


class StepRecord:
    """Stats and gradient norms of a step's minibatches. Norms that are not finite are those of skipped optimizer steps.

    KL and mismatch are those of the first minibatch, which alone is evaluated at the weights that sampled it.
    """

    def __init__(self, reinforce_scale: float, layout: Mapping[str, float] | None = None):
        """`layout`: how evenly the batch's work was spread, by the names of metrics.jsonl."""
        self._reinforce_scale = reinforce_scale
        self._layout = dict(layout or {})
        self._minibatches: list[Stats] = []
        self._gathered: list[_Totals] = []
        self._grad_norms: list[float] = []

    def add(self, stats: Sequence[Stats], grad_norm: float) -> None:
        """One minibatch: its micro-batches' stats (none before the last stage), and its gradient's norm."""
        if stats:
            sums = {name: torch.stack([piece.sums[name] for piece in stats]).sum() for name in stats[0].sums}
            maxima = {name: torch.stack([piece.maxima[name] for piece in stats]).max() for name in stats[0].maxima}
            self._minibatches.append(Stats(sums, maxima))
        self._grad_norms.append(grad_norm)

    def gather(self, topology: Topology) -> StepRecord:
        """Reduce over data-parallel replicas and tell every rank. Collective; returns itself."""
        if topology.is_last_stage and topology.dp > 1:
            for stats in self._minibatches:
                for values, op in ((stats.sums, dist.ReduceOp.SUM), (stats.maxima, dist.ReduceOp.MAX)):
                    for value in values.values():
                        dist.all_reduce(value, op=op, group=topology.dp_group)
        plain = [_Totals(_plain(stats.sums), _plain(stats.maxima)) for stats in self._minibatches]
        self._gathered = topology.broadcast(plain, src=topology.last_stage_rank)
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
        return [totals.sums["loss"] for totals in self._gathered]

    @property
    def first_log_ratio(self) -> float:
        """Largest |log-ratio| of a token in the first minibatch, nats."""
        return self._gathered[0].maxima["log_ratio"]

    def metrics(self) -> dict[str, float]:
        """By the names of metrics.jsonl."""
        first, total_count = self._gathered[0], sum(totals.sums["count"] for totals in self._gathered)
        finite = [norm for norm in self._grad_norms if math.isfinite(norm)]
        grad_norm = sum(finite) / len(finite) if finite else math.nan
        return {
            "loss": sum(totals.sums["loss"] for totals in self._gathered) / total_count,
            "kl/per_token": first.sums["log_ratio"] / first.sums["tokens"],
            "kl/per_sequence": first.sums["log_ratio"] / first.sums["count"],
            "mismatch/max": first.maxima["mismatch"],
            "mismatch/mean": first.sums["mismatch"] / first.sums["tokens"],
            "grad_norm": grad_norm,
            "grad_norm_reinforce": grad_norm / self._reinforce_scale,
            "skipped_steps": len(self._grad_norms) - len(finite),
            **({"entropy/per_token": first.sums["entropy"] / first.sums["tokens"]} if "entropy" in first.sums else {}),
            **self._layout,
        }


@dataclass(frozen=True)
class _Totals:
    """A minibatch's `Stats` over all ranks."""

    sums: dict[str, float]
    maxima: dict[str, float]


def _plain(values: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
