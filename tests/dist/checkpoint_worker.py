"""One rank of the checkpoint tests: trains on fixed batches. Started by test_checkpoint.py.

    main(WORK, LAYOUT, RUN... [KEY=VALUE...])

Each RUN is FROM:TO:EVERY:NAME: take up run folder WORK/FROM if it has a checkpoint, train to step TO saving every EVERY
steps, and write WORK/NAME.pt: {"start", "losses", "lr", "weights", "save_s", "load_s"}.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_apo.config import Recipe, build_recipe
from megatron_apo.data.layout import lay_out
from megatron_apo.learner.checkpoint import Checkpoints
from megatron_apo.learner.optim import Trainable, make_trainable
from megatron_apo.model.build import build_model
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.model.precision import Precision
from megatron_apo.objectives import APO, Samples
from megatron_apo.parallel.pipeline import forward_backward
from megatron_apo.parallel.topology import Topology, distributed
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.stream import WeightStream, load_weights
from tests.dist.ranks import parallel_of
from tests.dist.worker import BETA2, anchors, batch

TOTAL_STEPS = 4
SEQUENCES_PER_STEP = 8


def recipe_of(work: Path, run: str, every: int, *overrides: str) -> Recipe:
    """A schedule and a decay that matter within four steps; the model, store and run folder of the tests."""
    fixed = [
        f"run.dir={work / run}",
        f"model.path={work / 'models' / 'qwen3-tied'}",
        f"vstar.dir={work / 'vstar'}",
        "data.train=unused.jsonl",
        f"train.save_every={every}",
        f"train.steps={TOTAL_STEPS}",
        "train.minibatches=1",
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
    spec = read_hf_config(recipe.model.path)
    chunks = build_model(spec, recipe.parallel, topology, Precision(recipe.model.dtype))
    load_weights(chunks, spec, topology, HFReader(recipe.model.path))
    trainable = make_trainable(chunks, recipe.optimizer, total_steps=TOTAL_STEPS)
    checkpoints = Checkpoints(recipe, topology, trainable)
    begin = time.perf_counter()
    start = checkpoints.restore()
    found: dict = {"start": start, "load_s": time.perf_counter() - begin, "losses": [], "lr": [], "save_s": 0.0}
    for step in range(start, steps):
        found["losses"].append(learn(recipe, trainable, topology, step))
        found["lr"].append(trainable.lr)
        begin = time.perf_counter()
        checkpoints.save_if_due(step + 1)
        found["save_s"] = max(found["save_s"], time.perf_counter() - begin)
    return found | {"weights": dict(WeightStream(chunks, spec, topology))}


def learn(recipe: Recipe, trainable: Trainable, topology: Topology, step: int) -> float:
    """One optimizer step on the batch of `step`; returns the summed loss over all ranks."""
    prompts, responses, advantage = batch()
    rows = [(step * 5 + index) % len(prompts) for index in range(SEQUENCES_PER_STEP)]  # other ones each step
    prompts, responses = [prompts[row] for row in rows], [responses[row] for row in rows]
    micro = lay_out(recipe, topology, prompts, responses)
    objective, names = APO(beta2=BETA2), list(map(str, rows))
    targets = objective.prepare(Samples(names, advantage[rows], None), dict.fromkeys(names, 0.0))
    anchor = anchors(responses)

    def loss(log_prob_R: torch.Tensor, index: int):
        piece = micro[index]
        return objective.loss(log_prob_R, piece.gather(anchor), piece.sequence_R, targets.select(piece.indices))

    trainable.zero_grad()
    terms = forward_backward(trainable.chunks, micro, loss)
    total = torch.stack([stats.sums["loss"] for stats in terms]).sum() if terms else torch.zeros(())
    dist.all_reduce(total, group=topology.dp_group)
    dist.broadcast(total, src=dist.get_global_rank(topology.pp_group, topology.pp - 1), group=topology.pp_group)
    trainable.step()
    return total.item()


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
