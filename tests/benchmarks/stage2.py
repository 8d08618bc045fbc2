"""A step of stage 2 against the sum of its parts, each measured alone in the same run, and weights that move.

    python -m tests.benchmarks.stage2 RUN [--rounds 12] [SECTION.KEY=VALUE ...]

RUN is a finished quickstart: its reference, prompts and V* store are used, its files left as they are. Whole steps and
lone parts take turns, so that both see the same machine; medians are printed. Parts: generation (sampling and grading),
the hand-out of the batch to the ranks, the learner's own (`reference`: its log-probs; `train`: forward and backward;
`optimizer`), the weight sync.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch.distributed as dist

from megatron_apo.config import Recipe, load_recipe


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    scratch = Path(os.environ.get("BENCHMARK_DIR") or tempfile.mkdtemp())
    recipe = load_recipe(args.run / "recipe.yaml", [*args.overrides, f"run.dir={scratch}", "eval.max_prompts=1"])
    if "RANK" in os.environ:
        measure(recipe, args.rounds)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = recipe.parallel.world_size
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.stage2", *sys.argv[1:]]
    ranks = [
        subprocess.Popen(command, env=os.environ | common | {"RANK": str(rank), "BENCHMARK_DIR": str(scratch)})
        for rank in range(world)
    ]
    try:
        sys.exit(max(rank.wait() for rank in ranks))
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        shutil.rmtree(scratch)


def measure(recipe: Recipe, rounds: int) -> None:
    """On every rank."""
    from megatron_apo.data.prompt_source import PromptSource
    from megatron_apo.data.rollouts import RolloutBatch
    from megatron_apo.learner.learner import Learner
    from megatron_apo.model.hf_config import read_hf_config
    from megatron_apo.parallel.groups import distributed
    from megatron_apo.preflight import open_training
    from megatron_apo.rollout.rollouts import Rollouts

    with distributed(recipe.parallel) as topology:
        data = open_training(recipe) if topology.is_driver else None
        learner = Learner.build(recipe, topology)
        found: defaultdict[str, list[float]] = defaultdict(list)

        def timed(name: str, work):
            dist.barrier()
            start = time.perf_counter()
            value = work()
            dist.barrier()
            found[name].append(time.perf_counter() - start)
            return value

        source = PromptSource(recipe, data.prompts) if data else None

        def values_of(batch: RolloutBatch) -> list[float]:
            return topology.broadcast(data.vstar.lookup(list(batch.prompt_ids)).tolist() if data else None)

        def sample(step: int) -> RolloutBatch | None:
            prompts = source.draw(recipe.train.prompts_per_step) if source else []
            return rollouts.sample(prompts, step, num_samples=learner.objective.samples_per_prompt)

        inputs = data.inputs if data else None
        with Rollouts(recipe, topology, learner.policy, read_hf_config(recipe.model.path), inputs) as rollouts:
            rollouts.sync(0)
            for step in range(rounds + 2):

                def whole(step=step):
                    batch = learner.receive(sample(step))
                    learner.learn(batch, values_of(batch))
                    rollouts.sync(step + 1)

                timed("whole step", whole)
                sampled = timed("generation", lambda step=step: sample(step))
                batch = timed("hand-out", lambda sampled=sampled: learner.receive(sampled))
                learner.timer.pop()
                learner.learn(batch, values_of(batch))
                for name, phase in learner.timer.pop().items():
                    found[name].append(phase.seconds)
                timed("sync", lambda s=step: rollouts.sync(s + 1))
        if topology.is_driver:
            report(recipe, {name: median(values[2:]) for name, values in found.items()})


def report(recipe: Recipe, medians: dict[str, float]) -> None:
    whole = medians.pop("whole step")
    parts = sum(medians.values())
    parallel = recipe.parallel
    print(f"TP {parallel.tp} x PP {parallel.pp} x DP {parallel.dp}, {recipe.train.prompts_per_step} prompts, medians:")
    for name, seconds in medians.items():
        print(f"  {name:<22}{seconds:7.3f} s")
    print(
        f"  {'sum of the parts':<22}{parts:7.3f} s\n  {'whole step':<22}{whole:7.3f} s   {whole / parts:.2f} x the sum"
    )


if __name__ == "__main__":
    main()
