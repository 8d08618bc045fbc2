"""Does vLLM compute what the trainer does? Its log-probs of a few sequences against those that the policy computes.

That it has the trainer's weights is another question, which every sync answers (`weight_sync.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_apo.config import Difference, Recipe
from megatron_apo.data.batch import by_sequence
from megatron_apo.data.layout import make_micro_batches
from megatron_apo.data.sequences import Sequences
from megatron_apo.model.build import LogProbModel, at_temperature
from megatron_apo.parallel.pipeline import forward_only
from megatron_apo.rollout.engine import Engine, State, at_once
from megatron_apo.rollout.server import ServerDied
from megatron_apo.rollout.weight_sync import SyncError, WeightSync
from megatron_apo.runtime.topology import Topology
from megatron_apo.telemetry.units import some

IN_FP32 = Difference(mean=2e-5, max=1e-4)


def policy_log_probs(
    recipe: Recipe, topology: Topology, policy: Sequence[LogProbModel], sequences: Sequence[list[int]]
) -> list[list[float]]:
    """The policy's log-probs of each sequence's tokens but the first, at temperature 1, on every rank. Collective."""
    first, rest = [s[:1] for s in sequences], [s[1:] for s in sequences]
    micro_batches = [micro.to(topology.device) for micro in make_micro_batches(recipe, Sequences.of(first, rest))]
    with at_temperature(policy, 1.0):
        found = forward_only(policy, micro_batches)
    ours = by_sequence(micro_batches, found)
    return topology.broadcast([ours[index].tolist() for index in sorted(ours)], src=topology.last_stage_rank)


def prove(
    sync: WeightSync,
    sequences: Sequence[Sequence[int]] = (),
    log_probs: Sequence[Sequence[float]] = (),
    tolerance: Difference = IN_FP32,
    expected_digests: Mapping[str, str] | None = None,
    engines: Sequence[Engine] | None = None,
) -> Difference:
    """Compare vLLM's log-probs of `sequences` with the trainer's; return the largest absolute difference and the mean,
    of the engine that is further off. Collective.

    Arguments count on rank 0 only, the result is on every rank. `log_probs[i]` are, at temperature 1, of
    `sequences[i]`'s tokens but the first, or of its last `len(log_probs[i])` tokens. `expected_digests` (name ->
    digest, of all tensors or some) are of the weights that the trainer's log-probs were computed with. `engines`:
    those to ask (none: all of `sync` that answer). One that dies is left out; ServerDied is raised when none serves.
    Raises SyncError beyond `tolerance`, or where the last sync sent other tensors than expected, naming the worst
    token and the tensors to blame as far as digests tell: those that differ from `expected_digests`, else those
    that came unchanged in the last sync while others changed. The engine is then paused.
    """

    def compare() -> Difference:
        worst = Difference(0.0, 0.0)
        asked = [engine for engine in sync.engines if engine.answers] if engines is None else engines
        suspects = sync.suspects(expected_digests)
        for engine, scores in at_once(asked, lambda engine: engine.client.score(sequences)).items():
            if isinstance(scores, ServerDied):
                engine.fail(scores)
                continue
            if isinstance(scores, Exception):
                raise scores
            found, where = differences(sequences, scores, log_probs)
            worst = Difference(max(worst.mean, found.mean), max(worst.max, found.max))
            if found.mean > tolerance.mean or found.max > tolerance.max or suspects:
                engine.client.pause()
                raise SyncError(_mismatch(found, tolerance, where, suspects or sync.unchanged()))
            engine.is_proven()
        if not any(engine.state is State.SERVING for engine in sync.engines):
            raise ServerDied(str(sync.engines[-1].failure) if sync.engines else "no rollout engine is running")
        return worst

    return sync.on_rank_0(compare)


def differences(
    sequences: Sequence[Sequence[int]], ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]
) -> tuple[Difference, str]:
    """|vLLM - trainer|, and where it is largest. Not-a-number counts as infinite."""
    worst, total, count, where = 0.0, 0.0, 0, "anywhere"
    for row, (tokens, server, trainer) in enumerate(zip(sequences, ours, theirs, strict=True)):
        first = len(tokens) - len(trainer)
        if first < 1:
            raise SyncError(
                f"probe sequence {row}: {len(trainer)} log-probs for {len(tokens)} tokens, the first has none"
            )
        difference = (torch.tensor(server[first - 1 :]).double() - torch.tensor(trainer).double()).abs()
        difference = difference.nan_to_num(nan=float("inf"))
        total, count = total + float(difference.sum()), count + len(difference)
        if len(difference) and difference.max() > worst:
            at = int(difference.argmax())
            worst = float(difference[at])
            where = (
                f"at probe sequence {row}, position {first + at}, token {tokens[first + at]}: "
                f"vLLM {server[first - 1 + at]:.6f}, trainer {trainer[at]:.6f}"
            )
    return Difference(total / max(count, 1), worst), where


def _mismatch(found: Difference, tolerance: Difference, where: str, suspects: list[str]) -> str:
    blame = f"stale: {some(suspects)}" if suspects else "it holds the weights that were sent, and computes otherwise"
    return (
        f"vLLM's log-probs differ from the trainer's by {found.max:.3g} (allowed: {tolerance.max:g}), {found.mean:.3g} "
        f"in the mean ({tolerance.mean:g}), most {where}; {blame}"
    )
