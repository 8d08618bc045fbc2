"""One rank of the checkpoint tests: stage 2's learner on fixed batches. Started by test_checkpoint.py.

    main(WORK, LAYOUT, RUN... [KEY=VALUE...])

Each RUN is FROM:TO:EVERY:NAME: take up run folder WORK/FROM if it has a checkpoint, train to step TO saving every EVERY
steps, and write WORK/NAME.pt: {"start", "skipped", "first_mismatches" (at the start) and "mismatches" (at
the end), "losses", "lr", "weights", "save_s", "load_s"}.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch

from megatron_apo.config import Recipe, build_recipe
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.learner.checkpoint import Checkpoints
from megatron_apo.learner.learner import Learner
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.parallel.groups import distributed
from megatron_apo.runtime.topology import Topology
from megatron_apo.weights.stream import WeightStream
from tests.batches import UNSAMPLED, make_batch, no_values
from tests.dist.ranks import parallel_of
from tests.dist.worker import BETA2, batch

TOTAL_STEPS = 4
SEQUENCES_PER_STEP = 8
SKIPPED = 1  # the last step before the checkpoint of step 2


def recipe_of(work: Path, run: str, every: int, *overrides: str) -> Recipe:
    """A schedule and a decay that matter within four steps; the model, store and run folder of the tests."""
    fixed = [
        f"run.dir={work / run}",
        f"model.path={work / 'models' / 'qwen3-tied'}",
        f"model.reference={work / 'references' / 'qwen3-tied'}",
        f"vstar.dir={work / 'vstar'}",
        *UNSAMPLED,
        "data.train=unused.jsonl",
        f"train.save_every={every}",
        f"train.steps={TOTAL_STEPS}",
        "train.minibatches=1",
        f"objective.beta2={BETA2}",
        "optimizer.lr=1e-3",
        "optimizer.schedule=linear",
        "optimizer.warmup_steps=1",
        "optimizer.weight_decay=0.1",
        "optimizer.clip_grad=1e-3",
        "train.prompts_per_step=8",
        "train.tokens_per_micro_batch=60",
        "data.max_prompt_tokens=10",
        "sampling.max_response_tokens=50",
    ]
    return build_recipe({}, [*fixed, *overrides])


def train(recipe: Recipe, topology: Topology, steps: int) -> dict:
    learner = Learner.build(recipe, topology)
    checkpoints = Checkpoints(recipe, topology, learner)
    begin = time.perf_counter()
    start = checkpoints.restore()
    found: dict = {
        "start": start,
        "skipped": learner.skipped_in_a_row,
        "first_mismatches": list(learner.mismatch.first_means),
        "load_s": time.perf_counter() - begin,
        "losses": [],
        "lr": [],
        "save_s": 0.0,
    }
    for step in range(start, steps):
        part = learner.receive(batch_of(step) if topology.is_driver else None)
        found["losses"].append(learner.learn(part, no_values(part), step).metrics()["loss"])
        found["lr"].append(learner.trainable.lr)
        begin = time.perf_counter()
        if checkpoints.is_due(step + 1):
            checkpoints.save(step + 1)
        found["save_s"] = max(found["save_s"], time.perf_counter() - begin)
    found["mismatches"] = list(learner.mismatch.first_means)
    return found | {"weights": dict(WeightStream(learner.policy, read_hf_config(recipe.model.path), topology))}


def batch_of(step: int) -> RolloutBatch:
    """Other sequences each step. That of step `SKIPPED` has a reward that is no number: nothing is learned from it."""
    whole = batch()
    rows = [(step * 5 + index) % len(whole) for index in range(SEQUENCES_PER_STEP)]
    prompts, responses = (
        [of(row).tolist() for row in rows] for of in (whole.sequences.prompt, whole.sequences.response)
    )
    rewards = whole.reward_B[rows].tolist()
    if step == SKIPPED:
        rewards[0] = math.nan
    return make_batch(prompts, responses, rewards=rewards)


def main(work: str, layout: str, *arguments: str) -> None:
    parallel = parallel_of(layout)
    with distributed(parallel) as topology:
        overrides = [argument for argument in arguments if "=" in argument]
        for run in arguments[: len(arguments) - len(overrides)]:
            folder, steps, every, name = run.split(":")
            recipe = recipe_of(Path(work), folder, int(every), *overrides)
            recipe.parallel = parallel
            found = train(recipe, topology, int(steps))
            if topology.is_driver:
                torch.save(found, Path(work) / f"{name}.pt")
