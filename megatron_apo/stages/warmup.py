"""Warm start: supervised fine-tuning on prompt/response pairs, exported as the HF folder both stages start from."""

from __future__ import annotations

import math

from rich.progress import Progress

from megatron_apo.config import OptimizerConfig, Recipe
from megatron_apo.data.layout import make_micro_batches
from megatron_apo.data.order import step_prompts
from megatron_apo.data.sequences import Sequences
from megatron_apo.data.sft import Examples
from megatron_apo.learner.optim import make_trainable
from megatron_apo.learner.step import GradientError
from megatron_apo.model.build import build_model
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.model.precision import Precision
from megatron_apo.objectives import SFT, Micro, Prepared
from megatron_apo.parallel.pipeline import forward_backward
from megatron_apo.preflight import open_warmup
from megatron_apo.runtime.collective import on_driver
from megatron_apo.runtime.launch import write_recipe
from megatron_apo.runtime.topology import Topology
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.parameters import load_weights
from megatron_apo.weights.stream import WeightStream, export_hf


def train(recipe: Recipe, topology: Topology) -> None:
    """Train `warmup.start` on `warmup.data` and export it to `model.path`, on every rank."""
    examples = on_driver(topology, lambda: open_warmup(recipe))
    if topology.is_driver:
        write_recipe("warmup", recipe)
    warmup = recipe.warmup
    assert warmup.start is not None
    spec = read_hf_config(warmup.start)
    precision = Precision.of(recipe.model, recipe.parallel)
    settings = recipe.train.model_copy(update={"entropy": False})  # no one would read it
    chunks = build_model(spec, recipe.parallel, topology, precision, train=settings)
    load_weights(chunks, spec, topology, HFReader(warmup.start))
    config = OptimizerConfig(
        lr=warmup.lr,
        schedule="linear",
        beta2=0.999,
        warmup_steps=max(1, warmup.steps // 20),
        # What decides where the optimizer fits is the recipe's, as its layout is.
        distributed=recipe.optimizer.distributed,
        moments=recipe.optimizer.moments,
        cpu_offload=recipe.optimizer.cpu_offload,
    )
    trainable = make_trainable(chunks, config, total_steps=warmup.steps)
    with Progress(disable=not (topology.is_driver and recipe.telemetry.progress)) as progress:
        task = progress.add_task("warm start (SFT)", total=warmup.steps)
        for step in range(warmup.steps):
            _step(recipe, topology, trainable, examples, step)
            progress.advance(task)
    export_hf(WeightStream(chunks, spec, topology), topology, source=warmup.start, out=recipe.model.path)


def _step(recipe: Recipe, topology: Topology, trainable, examples: Examples, step: int) -> None:
    chosen = step_prompts(
        step, num_prompts=len(examples.prompts), prompts_per_step=recipe.warmup.sequences_per_step, seed=recipe.run.seed
    )
    sequences = Sequences.of([examples.prompts[i] for i in chosen], [examples.responses[i] for i in chosen])
    micro = [
        one.to(topology.device)
        for one in make_micro_batches(recipe, sequences, dp=topology.dp, replica=topology.dp_rank)
    ]
    objective = SFT()
    trainable.zero_grad()
    forward_backward(
        trainable.chunks,
        micro,
        lambda log_prob_R, k: objective.loss(
            Micro(log_prob_R, range(len(micro[k].indices)), micro[k].sequence_R), Prepared()
        ),
    )
    if not math.isfinite(norm := trainable.step()):
        raise GradientError(f"warm start, step {step + 1}: the gradient's norm is {norm}; use a lower warmup.lr")
