"""Does the sampler still compute with the trainer's weights and numerics? Each step's mismatch held against the run's.

The mismatch is the mean over the first minibatch's tokens of |log pi_trainer - log pi_sampler|, nats. That minibatch's
forward pass is at the weights that sampled; after an optimizer step the difference has learning in it.

    baseline      = max(floor by precision, median of the means of the run's first 20 steps)
    warned above    mismatch.warn x baseline
    ends the run    mismatch.stop x baseline, before the optimizer takes its step

Until 20 steps are known the median is of those there are (of two in the middle the lower one), and of the first step
the floor alone counts. So the first step is judged as well, and by a limit that an honest one is well below
(`MismatchConfig.least_baseline`). A run that begins between floor and limit has its own level as its baseline from the
second step on. A sudden rise is seen at once, since a median does not follow a minority; what creeps up within the
first 20 steps is held against their middle. After these the baseline is fixed, so that slow drift is held against the
start of the run.

The mean is judged and not the maximum. Weights or numerics that differ move every token, so that the mean of thousands
is steady from step to step, and ten times its median is no chance. The maximum is the tail's: one improbable token in
a hundred thousand. It grows with their number and varies by an order of magnitude on an honest run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median_low

from megatron_apo.config import MismatchConfig

BASELINE_STEPS = 20


class MismatchError(RuntimeError):
    """The sampler's log-probs are too far from the trainer's for the run to go on."""


class MismatchWatch:
    """Judges each step's mismatch. Every rank has one, and gives it the same numbers.

    first_means: of the run's first steps, at most `BASELINE_STEPS`; a checkpoint keeps them.
    """

    def __init__(self, config: MismatchConfig, floor: float):
        """floor: the least baseline, nats."""
        self._config = config
        self._floor = floor
        self._was_warned = False
        self.first_means: list[float] = []

    def restore(self, first_means: Sequence[float]) -> None:
        """Go on from these."""
        self.first_means = list(first_means)

    @property
    def limits(self) -> dict[str, float]:
        """{"warn", "stop"} of the next step, nats; what is switched off is not there."""
        baseline = max([self._floor, *([median_low(self.first_means)] if self.first_means else [])])
        factors = {"warn": self._config.warn, "stop": self._config.stop}
        return {name: factor * baseline for name, factor in factors.items() if factor is not None}

    def judge(self, mean: float, step: int) -> tuple[dict[str, float], str | None]:
        """(What metrics.jsonl says of it, a warning where one begins) of step `step` of the run, from 0.

        Raises `MismatchError` where the run must not go on. A mean that is not finite is above every limit.
        """
        limits = self.limits
        above = [name for name, limit in limits.items() if not mean <= limit]  # so that a NaN is
        if "stop" in above:
            raise MismatchError(f"{self._told(mean, step, 'stop', limits['stop'])}; {_MEANING}, or {_REMEDY}")
        warning = None
        if above and not self._was_warned:
            warning = f"{self._told(mean, step, 'warn', limits['warn'])}; {_MEANING}"
        self._was_warned = bool(above)
        if len(self.first_means) < BASELINE_STEPS and math.isfinite(mean):
            self.first_means.append(mean)
        told = {f"mismatch/{name}_limit": limit for name, limit in limits.items()}
        return {**told, "mismatch/warned": int(bool(above))}, warning

    def _told(self, mean: float, step: int, name: str, limit: float) -> str:
        known = len(self.first_means)
        of = f"median of the first {known} steps {median_low(self.first_means):.3g}" if known else "no step before it"
        return (
            f"step {step + 1}: trainer and sampler differ by {mean:.3g} nats a token on average, and mismatch.{name} "
            f"allows {limit:.3g} ({getattr(self._config, name):g} x the baseline; {of}, floor {self._floor:.3g})"
        )


_MEANING = "the sampler does not compute with the trainer's weights or numerics"
_REMEDY = "change mismatch.stop, null being never (in a replay: the batches are of other weights)"
