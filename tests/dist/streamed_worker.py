"""One rank of the tests of streamed steps: the same batch whole and in waves. See test_streamed.py.

    main(WORK, LAYOUT)

Rank 0 writes WORK/LAYOUT.pt: {"apo", "masked", "sharded": {run: {"gradients", "norms", "change", "metrics", "calls",
"waves"}}, "methods": {method: {run: the same}}}, where a run is "whole", "waves", "whole, in the waves' micro-batches",
or a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_apo.config import Recipe
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.learner import step as step_module
from megatron_apo.learner.learner import Learner
from megatron_apo.learner.step import Step
from megatron_apo.learner.streamed import StreamedStep
from megatron_apo.objectives import Prepared
from megatron_apo.parallel.groups import distributed
from megatron_apo.parallel.pipeline import OpenGradient
from megatron_apo.runtime.topology import Topology
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.stream import WeightStream
from tests.dist import learner_worker, methods_worker
from tests.dist.ranks import parallel_of

# Which rows come together, of 14 in two minibatches: one alone, then one of each minibatch, then two of the second
# alone. On two replicas a wave is a call of one of them.
WAVES = ([4], [0, 9], [7, 12], [1, 2, 3, 5, 6, 8, 10, 11, 13])
# The same by groups of two, of eight rows.
GROUP_WAVES = ([2, 3], [6, 7], [0, 1, 4, 5])
METHODS = ("grpo", "dapo", "rebel", "rloo", "tbrm")  # by group and by response, by token, coupled, with a KL in targets
WHOLE, IN_WAVES, SAME = "whole", "waves", "whole, in the waves' micro-batches"


# ---- faults, put into a streamed step from outside. `patch` is undone afterwards.

Fault = Callable[[Learner, pytest.MonkeyPatch], None]


def finished_in_each_call(_: Learner, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OpenGradient, "added_to", lambda _: nullcontext())
    patch.setattr(OpenGradient, "close", lambda _: None)


def wave_left_out(_: Learner, patch: pytest.MonkeyPatch) -> None:
    """The first is not learned from."""
    add, added = Step.add, []

    def fewer(step: Step, part: Any) -> None:
        added.append(part)
        add(step, part) if len(added) > 1 else None

    patch.setattr(Step, "add", fewer)


def wave_twice(_: Learner, patch: pytest.MonkeyPatch) -> None:
    add, added = Step.add, []

    def more(step: Step, part: Any) -> None:
        added.append(part)
        add(step, part)
        add(step, part) if len(added) == 1 else None

    patch.setattr(Step, "add", more)


def targets_of_the_neighbour(learner: Learner, patch: pytest.MonkeyPatch) -> None:
    prepare = learner._prepare

    def wrong(*arguments: Any) -> Prepared:
        found = prepare(*arguments)
        return replace(found, per_sequence={n: value_K.roll(1) for n, value_K in found.per_sequence.items()})

    patch.setattr(learner, "_prepare", wrong)


def minibatches_by_arrival(learner: Learner, patch: pytest.MonkeyPatch) -> None:
    """Who comes first is in the first minibatch."""
    receive, come = StreamedStep.receive, [0]

    def wrong(step: StreamedStep, rows: list[int], wave: RolloutBatch | None) -> RolloutBatch:
        first = come[0]
        come[0] += len(rows)
        return receive(step, [*range(first, come[0])], wave)

    patch.setattr(StreamedStep, "receive", wrong)


def gradient_begun_in_each_wave(_: Learner, patch: pytest.MonkeyPatch) -> None:
    add = Step.add

    def wrong(step: Step, part: Any) -> None:
        step._first = None
        add(step, part)

    patch.setattr(Step, "add", wrong)


FAULTS: dict[str, Fault] = {
    "finished in each call": finished_in_each_call,
    "wave left out": wave_left_out,
    "wave twice": wave_twice,
    "targets of the neighbour": targets_of_the_neighbour,
    "minibatches by arrival": minibatches_by_arrival,
    "gradient begun in each wave": gradient_begun_in_each_wave,
}


def faults_of(layout: str) -> list[str]:
    """Those that end: with unequal calls, who reduces in each would wait for good."""
    return [fault for fault in FAULTS if parallel_of(layout).dp == 1 or fault != "finished in each call"]


def methods_of(layout: str) -> tuple[str, ...]:
    """Context-parallel ranks have the same losses, whatever the method."""
    return METHODS if parallel_of(layout).cp == 1 else ()


# ---- what is measured


def measure(
    topology: Topology,
    learner: Learner,
    whole: RolloutBatch,
    values_B: Sequence[float] | None,
    rows_of: Sequence[Sequence[int]],
    run: str,
) -> dict[str, Any]:
    """Two optimizer steps on the batch, which comes in waves of these rows, or in one."""
    trainable, gradients, norms, calls = learner.trainable, [], [], []
    step, spec = trainable.step, learner.spec
    before = {name: tensor.clone() for name, tensor in WeightStream(learner.policy, spec, topology)}

    def watched() -> float:
        stream = WeightStream(learner.policy, spec, topology, tensor_of=lambda parameter: parameter.main_grad)
        gradients.append({name: gradient.clone() for name, gradient in stream})
        norms.append(step())
        return norms[-1]

    trainable.step = watched  # type: ignore[method-assign]
    wave_B = np.empty(len(whole), dtype=np.int32)
    for number, rows in enumerate(rows_of):
        wave_B[list(rows)] = number
    waves = replace(whole, wave_B=wave_B).waves
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "forward_backward", counted(calls))
        if run in FAULTS:
            FAULTS[run](learner, patch)
        if run == WHOLE:
            own = learner.receive(whole if topology.is_driver else None)
            record = learner.learn(own, values_B)
        else:
            streamed = StreamedStep(learner, 0)
            for wave in waves:
                own = streamed.receive(wave.rows, wave.batch if topology.is_driver else None)
                streamed.add(own, values_B and [values_B[row] for row in wave.rows])
                assert not norms, "the weights stay while anything is sampled"
            found = streamed.batch()
            if topology.is_driver:
                assert run in FAULTS or found.sequences.token_ids_T.tolist() == whole.sequences.token_ids_T.tolist()
                assert run in FAULTS or found.wave_B.tolist() == wave_B.tolist()
            if run == SAME:
                gradients.clear()
                calls.clear()
                learner.plan = lambda _: streamed._planner.whole  # type: ignore[method-assign]
                record = learner.learn(learner.receive(whole if topology.is_driver else None), values_B)
            else:
                record = streamed.finish(found)
    change = {name: after - before[name] for name, after in WeightStream(learner.policy, spec, topology)}
    told: list[Any] = [None] * topology.world_size
    dist.all_gather_object(told, calls)
    metrics = {name: value for name, value in record.metrics().items() if not name.startswith("layout/")}
    return {"gradients": gradients, "norms": norms, "change": change, "metrics": metrics, "calls": told}


def counted(calls: list[int]) -> Callable:
    """`forward_backward` that notes how many micro-batches each call has."""
    work = step_module.forward_backward

    def run(chunks: Any, micro_batches: Any, *rest: Any) -> Any:
        calls.append(len(micro_batches))
        return work(chunks, micro_batches, *rest)

    return run


def built(recipe: Recipe, topology: Topology) -> Learner:
    readers = HFReader(recipe.model.path), HFReader(recipe.model.reference_path)
    return Learner.build(recipe, topology, policy_weights=readers[0], reference_weights=readers[1])


def apo(work: Path, layout: str, topology: Topology, run: str, *overrides: str, eps: float = 1.0) -> dict[str, Any]:
    recipe = learner_worker.recipe_of(work, layout, eps, *overrides)
    recipe.train.prompts_per_step = len(learner_worker.batch())
    whole = learner_worker.masked_batch(learner_worker.MASKED) if overrides else learner_worker.batch()
    return measure(topology, built(recipe, topology), whole, learner_worker.value_B(), WAVES, run)


def method(work: Path, layout: str, topology: Topology, name: str, run: str) -> dict[str, Any]:
    recipe = methods_worker.recipe_of(work, layout, name)
    learner = built(recipe, topology)
    recipe.train.prompts_per_step = len(methods_worker.batch()) // learner.objective.samples_per_prompt
    values_B = methods_worker.VALUES if learner.objective.takes_baseline else None
    return measure(topology, learner, methods_worker.batch(), values_B, GROUP_WAVES, run)


def main(folder: str, layout: str) -> None:
    work = Path(folder)
    with distributed(parallel_of(layout)) as topology:
        runs = (WHOLE, IN_WAVES, SAME)
        results: dict[str, Any] = {
            "apo": {run: apo(work, layout, topology, run) for run in (*runs, *faults_of(layout))},
            "masked": {run: apo(work, layout, topology, run, "reward.truncated=mask") for run in runs},
            "sharded": {run: apo(work, layout, topology, run, eps=1e-8) for run in runs},
            "methods": {
                name: {run: method(work, layout, topology, name, run) for run in runs} for name in methods_of(layout)
            },
        }
        if topology.is_driver:
            torch.save(results, work / f"{layout}.pt")
