"""A step whose batch comes in waves: each is computed while the rest is still generated, on the weights that sample it.

    streamed = StreamedStep(learner, number)
    for wave in ...:                                  # on the driver a Wave; elsewhere its rows alone
        part = streamed.receive(rows, wave)
        streamed.add(part, value_B)                   # log-probs, targets, and gradients of the first minibatch
    batch = streamed.batch()                          # when all rows have come; scalars of all ranks' rows
    record = streamed.finish(batch)                   # optimizer steps

Which minibatch a sequence is in is fixed by its prompt's place in the step, so that short ones, which come first, do
not make one of their own: the gradient is that of the step that waits for all. When something comes decides with what
others it shares a micro-batch, and on which replica.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_apo.data.layout import WavePlanner
from megatron_apo.data.rollouts import RolloutBatch, Wave
from megatron_apo.learner.diagnostics import StepRecord
from megatron_apo.learner.learner import Learner
from megatron_apo.learner.step import Step
from megatron_apo.parallel.scatter import scatter


class StreamedStep:
    """That of this number in the run, from 0. Every method is called on every rank."""

    def __init__(self, learner: Learner, number: int):
        train, objective = learner.recipe.train, learner.objective
        assert objective.targets_by != "batch", "the method's targets are of the whole batch"
        self._learner = learner
        self._step = Step(learner, number)
        self._planner = WavePlanner(
            learner.recipe,
            train.prompts_per_step * objective.samples_per_prompt,
            num_minibatches=train.minibatches,
            dp=learner.topology.dp,
        )
        self._waves: list[Wave] = []  # on the driver
        self._num_waves = 0

    def receive(self, rows: list[int], wave: RolloutBatch | None) -> RolloutBatch:
        """This rank's part of the rows of the batch that have come: all scalars, and its replica's tokens.

        wave: these, held whole, on the driver; None elsewhere.
        """
        learner = self._learner

        def rows_of(whole: RolloutBatch) -> list[list[int]]:
            groups = whole.group_B.tolist() if learner.objective.couples else None
            self._plan = self._planner.plan(rows, whole.sequences, groups=groups)
            return [self._plan.rows_of(replica) for replica in range(learner.topology.dp)]

        if wave is not None:
            self._waves.append(Wave(rows, wave))
        return scatter(learner.topology, wave, rows_of)

    def add(self, own: RolloutBatch, value_B: Sequence[float] | None = None) -> None:
        """Compute what `receive` gave: all that is asked of it before the first optimizer step.

        value_B: the baseline of each response, where the objective takes one.
        """
        self._num_waves += 1
        self._step.add(self._learner.part(self._plan, own, value_B))

    def batch(self) -> RolloutBatch:
        """All that has come, in the order of the prompts: whole on the driver, without tokens elsewhere."""
        topology = self._learner.topology
        whole = RolloutBatch.of_waves(self._waves) if topology.is_driver else None
        shared: RolloutBatch = topology.broadcast(whole and whole.select([]))
        return whole or shared

    def finish(self, batch: RolloutBatch) -> StepRecord:
        """See `Step.finish`."""
        record = self._step.finish(self._planner.whole, batch)
        record.tell({"layout/waves": self._num_waves})
        return record
