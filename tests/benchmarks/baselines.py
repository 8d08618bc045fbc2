"""Baselines beside the true success rate along a run: the kernel source, a group's mean, V* and others, at G = 1, 2, 4.

    python -m tests.benchmarks.baselines [--groups 1 2 4] [--bandwidths 0.1 0.25 0.5 1 inf]
                                         [--prompts 512] [--steps 160] [--prompts-per-step 32] [--seeds 3]
    python -m tests.benchmarks.baselines --run RUN --truth FILE [--store STORE --beta1 0.5 --estimator log_mean_exp]

The first kind needs no model: a policy whose responses can be enumerated, 16 for each prompt, softmax of features that
all prompts share, so that training on some prompts changes the others, as it does in a model. REINFORCE with the exact
baseline trains it, on one response a prompt; the true rates are known at every step. Each G looks at the first G of the
same responses.

The second kind reads a recorded run (`train --record`), RUN/rollouts/step-*.parquet, of as many responses a prompt as
the largest G, and a Parquet file of `step` (from 1, as in the files' names), `prompt_id` and `value`: the mean reward
of many samples, 256, of the weights that the step sampled from. Steps without truth are taken and not counted.

error: root mean square of baseline - truth over responses. moment: mean of (reward - baseline)^2, the second moment of
the advantage; that of `truth` is the least that the prompt's value can give. A mean with one's own reward in it has a
smaller one and a gradient shorter by 1 - 1/G: it saves nothing. Both are of the run's last half too, where V* is old.
no value: responses for which the source fell back on the batch's other rewards.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from megatron_apo.data.order import step_prompts
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.values.baselines import Baseline, BatchMean, GroupMean, LeaveOneOut, Lookup, Offline, StepRewards
from megatron_apo.values.estimators import ESTIMATORS
from megatron_apo.values.kernel import KernelSmoothed
from megatron_apo.values.samples import Array, SampledRewards
from megatron_apo.values.store import VStarStore

NUM_RESPONSES, NUM_FEATURES = 16, 48
LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Step:
    """A step's responses, prompt by prompt. truth_B: NaN where nothing is known. learned_B: not masked."""

    step: int
    prompt_ids: list[str]
    group_B: Array
    reward_B: Array
    learned_B: Array
    truth_B: Array

    def first(self, group: int) -> Step:
        """The first `group` responses of each prompt."""
        order = np.argsort(self.group_B, kind="stable")
        sizes = np.bincount(self.group_B)
        place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        rows = np.sort(order[place < group])
        ids = [self.prompt_ids[row] for row in rows]
        return Step(self.step, ids, self.group_B[rows], self.reward_B[rows], self.learned_B[rows], self.truth_B[rows])


class Truth(Baseline):
    """What there is to know: told before each step, and not counted where it is not known."""

    truth_B: Array

    def _values(self, batch: StepRewards) -> Array:
        return np.nan_to_num(self.truth_B)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--bandwidths", type=float, nargs="+", default=[0.1, 0.25, 0.5, 1.0, float("inf")])
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--prompts-per-step", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--truth", type=Path)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--beta1", type=float, default=0.5)
    parser.add_argument("--estimator", choices=list(ESTIMATORS), default="log_mean_exp")
    args = parser.parse_args()
    if args.run:
        vstar = VStarStore.open(args.store).values(args.beta1, args.estimator).lookup if args.store else None
        runs = [(recorded(args.run, args.truth), vstar)]
    else:
        runs = [simulated(args, seed) for seed in range(args.seeds)]
    for group in args.groups:
        show(group, runs, args.bandwidths)


# ---- runs


def recorded(run: Path, truth: Path) -> list[Step]:
    """A recorded run; the grader's NaN is a masked response."""
    table = pq.read_table(truth, columns=["step", "prompt_id", "value"]).to_pydict()
    known = {(step, one): value for step, one, value in zip(*table.values(), strict=True)}
    steps = []
    for path in sorted((run / "rollouts").glob("step-*.parquet")):
        number, batch = int(path.stem.removeprefix("step-")), RolloutBatch.read(path)
        truth_B = np.array([known.get((number, one), np.nan) for one in batch.prompt_ids])
        ids, learned_B = list(batch.prompt_ids), ~np.isnan(batch.reward_B)
        steps.append(Step(number - 1, ids, batch.group_B, batch.reward_B, learned_B, truth_B))
    if not with_truth(steps):
        raise SystemExit(f"--truth: {truth} knows of no step in {run}/rollouts")
    return steps


def simulated(args: argparse.Namespace, seed: int) -> tuple[list[Step], Lookup]:
    """A run, and V* of 8 samples of the policy that it starts from."""
    rng = np.random.default_rng(seed)
    num, largest = args.prompts, max(args.groups)
    # Half of a response's features are those of its kind, by which it is right in any prompt, the others its own.
    right_PA = rng.random((num, NUM_RESPONSES)) < rng.beta(1.0, 2.0, (num, 1))
    kinds = rng.normal(size=(2, NUM_FEATURES))
    features_PAF = kinds[right_PA.astype(int)] + 2.0 * rng.normal(size=(num, NUM_RESPONSES, NUM_FEATURES))
    features_PAF /= np.sqrt(NUM_FEATURES)
    weights_F = np.zeros(NUM_FEATURES)
    names = [f"{prompt:032x}" for prompt in range(num)]

    def policy(prompts: Array) -> Array:
        logits_PA = features_PAF[prompts] @ weights_F
        policy_PA = np.exp(logits_PA - logits_PA.max(axis=1, keepdims=True))
        return policy_PA / policy_PA.sum(axis=1, keepdims=True)

    def sample(policy_PA: Array, count: int) -> Array:
        drawn_PG = rng.random((len(policy_PA), count))
        return np.minimum((policy_PA.cumsum(axis=1)[:, None] < drawn_PG[..., None]).sum(axis=2), NUM_RESPONSES - 1)

    everyone = np.arange(num)
    rewards_PN = np.take_along_axis(right_PA, sample(policy(everyone), 8), axis=1).astype(float)
    vstar = dict(zip(names, ESTIMATORS[args.estimator](SampledRewards.of_rows(rewards_PN), args.beta1), strict=True))
    steps = []
    for step in range(args.steps):
        chosen = np.array(step_prompts(step, num_prompts=num, prompts_per_step=args.prompts_per_step, seed=seed))
        chosen = np.unique(chosen)  # an epoch's end may bring a prompt twice
        policy_PA = policy(chosen)
        arms_PG = sample(policy_PA, largest)
        rewards_PG = np.take_along_axis(right_PA[chosen], arms_PG, axis=1).astype(float)
        truth_P = (policy_PA * right_PA[chosen]).sum(axis=1)
        rows = np.repeat(np.arange(len(chosen)), largest)
        ids = [names[prompt] for prompt in chosen[rows]]
        known_B = np.full(len(rows), True)
        steps.append(Step(step, ids, rows, rewards_PG.reshape(-1), known_B, truth_P[rows]))
        for prompt, policy_A, arm, reward, truth in zip(
            chosen, policy_PA, arms_PG[:, 0], rewards_PG[:, 0], truth_P, strict=True
        ):
            score_F = features_PAF[prompt, arm] - policy_A @ features_PAF[prompt]
            weights_F += LEARNING_RATE / len(chosen) * (reward - truth) * score_F
    return steps, lambda ids: np.array([vstar[one] for one in ids])


# ---- what is told of them


def sources(vstar: Lookup | None, bandwidths: list[float]) -> Iterator[tuple[str, Callable[[], Baseline]]]:
    yield "truth", Truth
    if vstar:
        yield "V*", lambda: Offline(vstar)
    yield "batch mean", BatchMean
    yield "group mean", GroupMean
    yield "leave one out", LeaveOneOut
    for kernel in ("triangular", "exponential"):
        for bandwidth in bandwidths:
            yield (
                f"{kernel} {bandwidth:g}",
                lambda kernel=kernel, bandwidth=bandwidth: KernelSmoothed(kernel, bandwidth),
            )


def show(group: int, runs: list[tuple[list[Step], Lookup | None]], bandwidths: list[float]) -> None:
    ends = [
        [np.nanmean(known[place].truth_B) for place in (0, -1)] for steps, _ in runs if (known := with_truth(steps))
    ]
    title = f"G = {group}, {len(runs)} runs; true rate from {{:.3f}} to {{:.3f}}".format(*np.mean(ends, axis=0))
    table = Table(title=title, title_justify="left", box=None)
    for name in ("source", "error", "moment", "last half: error", "moment", "no value"):
        table.add_column(name, justify="left" if name == "source" else "right", no_wrap=True)
    names = [name for name, _ in sources(runs[0][1], bandwidths)]
    for place, name in enumerate(names):
        rows = []
        for steps, vstar in runs:
            source = list(sources(vstar, bandwidths))[place][1]()
            rows.append(measured(source, [step.first(group) for step in steps]))
        error, moment, late_error, late_moment, without = np.mean(rows, axis=0)
        table.add_row(name, *(f"{x:.3f}" for x in (error, moment, late_error, late_moment)), f"{without:.1%}")
    Console(width=120).print(table, "")


def with_truth(steps: list[Step]) -> list[Step]:
    return [step for step in steps if not np.isnan(step.truth_B).all()]


def measured(source: Baseline, steps: list[Step]) -> tuple[float, ...]:
    """Error and second moment, the same of the last half, and the share of responses that the source had nothing of."""
    errors, moments, without, num = [], [], 0, 0
    for step in steps:
        batch = (step.step, step.prompt_ids, step.group_B, step.reward_B, step.learned_B)
        if isinstance(source, Truth):
            source.truth_B = step.truth_B
        value_B = source.values(*batch)
        source.update(*batch)
        known_B = step.learned_B & ~np.isnan(step.truth_B)
        errors.append(np.square(value_B - step.truth_B)[known_B])
        moments.append(np.square(step.reward_B - value_B)[known_B])
        without, num = without + source.num_fallbacks, num + int(step.learned_B.sum())
    half = len(steps) // 2
    late = (np.sqrt(np.concatenate(errors[half:]).mean()), np.concatenate(moments[half:]).mean())
    return (np.sqrt(np.concatenate(errors).mean()), np.concatenate(moments).mean(), *late, without / num)


if __name__ == "__main__":
    main()
