"""Tokens a second of several engines beside one, in the same run on the same cores.

    python -m tests.benchmarks.engines RUN [--replicas 2] [--rounds 6] [SECTION.KEY=VALUE ...]

RUN is a finished quickstart, whose model and prompts are used. One engine with all cores and several with an equal
share each are started, and take turns at the same step of prompts; grading is left out. It shows what handing requests
to several engines costs or gains where the cores are as many either way: an engine is one process that decodes, and two
of them do not wait for each other. It does not show how sampling grows with engines that bring hardware of their own
(GPUs, machines), nor what a trainer beside them takes. `rollout.threads` of the recipe is ignored.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

from megatron_apo.config import Recipe, load_recipe
from megatron_apo.rollout.fleet import Fleet, RequestQueue
from megatron_apo.rollout.inputs import load_inputs
from megatron_apo.rollout.sampler import generate_bodies


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as scratch:
        settings = ["rollout.threads=null", *args.overrides, f"run.dir={scratch}"]
        recipes = {
            replicas: load_recipe(args.run / "recipe.yaml", [*settings, f"rollout.replicas={replicas}"])
            for replicas in (1, args.replicas)
        }
        report(recipes[1], measure(recipes, args.rounds))


def measure(recipes: dict[int, Recipe], rounds: int) -> dict[int, list[float]]:
    """Tokens a second of each round, by number of engines; the first round warms up and is left out."""
    inputs = load_inputs(recipes[1])
    found: dict[int, list[float]] = {replicas: [] for replicas in recipes}
    fleets = {replicas: Fleet.of(recipe, recipe.model.path) for replicas, recipe in recipes.items()}
    try:
        for fleet in fleets.values():
            fleet.start()
            fleet.serve_own_weights()
        for step in range(rounds + 1):
            recipe = recipes[1]
            prompts = [
                inputs.training.prompts[(step * recipe.train.prompts_per_step + index) % len(inputs.training.prompts)]
                for index in range(recipe.train.prompts_per_step)
            ]
            bodies = generate_bodies(recipe, "train", step, prompts, inputs.sampling(recipe.sampling))
            for replicas, fleet in fleets.items():
                queue = RequestQueue(bodies)
                start = time.perf_counter()
                fleet.generate(queue, lambda index, completion: None)
                seconds = time.perf_counter() - start
                found[replicas].append(sum(len(one.token_ids) for one in queue.completions) / seconds)
    finally:
        for fleet in fleets.values():
            fleet.stop()
    return {replicas: rates[1:] for replicas, rates in found.items()}


def report(recipe: Recipe, rates: dict[int, list[float]]) -> None:
    cores = len(os.sched_getaffinity(0))
    print(f"{recipe.train.prompts_per_step} prompts a step on {cores} cores, medians of {len(rates[1])} rounds:")
    for replicas, values in rates.items():
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        ratio = median(value / one for value, one in zip(values, rates[1], strict=True))
        print(f"  {replicas} engines: {median(values):8,.0f} tokens/s ({spread}), {ratio:.2f} x one")


if __name__ == "__main__":
    main()
