"""What the GPU checks share: model shapes, random weights, one process that is the whole job, and the verdict.

Nothing is downloaded: a model is a `config.json` written here and weights drawn on the device. Each check prints a
table and ends with 0, with 1 where a figure is beyond its limit, or with 77 where it could not run (2 is an argument
that it does not know). `--tiny` makes a check small enough for a CPU, to see that it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from megatron_apo.config import Recipe, build_recipe
from megatron_apo.data.layout import make_micro_batches
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.learner.learner import Learner
from megatron_apo.model.hf_config import ModelSpec, read_hf_config
from megatron_apo.parallel.groups import alone
from megatron_apo.parallel.pipeline import forward_log_probs
from megatron_apo.runtime.topology import Topology
from megatron_apo.telemetry.timers import Phase
from megatron_apo.weights.families import hf_tensors
from megatron_apo.weights.stream import WeightStream
from tests.batches import UNSAMPLED, make_batch, no_values

CANNOT_RUN = 77  # exit code, as Automake's tests say it
FP8_RECIPES = ("tensorwise", "blockwise", "mxfp8")
# As DeepSeek-R1-Distill-Qwen-1.5B and -7B have it.
SHAPES: dict[str, dict[str, Any]] = {
    "1.5B": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "max_position_embeddings": 131072,
    },
    "7B": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
    },
}
# Sizes that `--tiny` puts in place of those above. 32 divides them, as FP8 asks.
TINY = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"intermediate_size": 256, "vocab_size": 1024}


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, `--tiny` among them. Without a GPU, only a tiny check goes on."""
    parser.add_argument("--tiny", action="store_true", help="small enough for a CPU; the figures mean nothing")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        cannot_run("needs a GPU")
    return args


def cannot_run(reason: str) -> NoReturn:
    print(f"tests/gpu: {reason}", file=sys.stderr)
    sys.exit(CANNOT_RUN)


@contextmanager
def job() -> Iterator[Topology]:
    """This process as the only rank."""
    describe_machine()
    with alone() as topology:
        yield topology


def describe_machine() -> None:
    print(f"{device_name()}, {', '.join(_versions())}, {date.today()}", flush=True)


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def free_memory() -> None:
    """Give back what a model took of the GPU. DDP's hooks and its parameters hold each other."""
    gc.collect()
    torch.cuda.empty_cache()


def spec_of(config: Mapping[str, Any]) -> ModelSpec:
    """The architecture that a `config.json` of this content describes."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return read_hf_config(Path(folder))


def recipe_of(overrides: Sequence[str] = ()) -> Recipe:
    """A recipe for the trainer alone: it names no model, data or store that exists."""
    return build_recipe({}, ["model.path=none", "data.train=none.jsonl", "vstar.dir=none", *UNSAMPLED, *overrides])


@dataclass(frozen=True)
class RandomWeights:
    """A checkpoint for `load_weights`: each tensor drawn on `device` by its name, so that it is always the same."""

    spec: ModelSpec
    device: torch.device
    seed: int = 0

    def get(self, name: str) -> Tensor:
        """fp32 of values that bf16 has too: norms and biases near 1 and 0, matrices as the configuration draws them."""
        generator = torch.Generator(self.device).manual_seed(self.seed + zlib.crc32(name.encode()))
        tensor = torch.randn(hf_tensors(self.spec)[name], generator=generator, device=self.device)
        if tensor.dim() == 1:
            tensor = tensor * 0.1 + name.endswith("norm.weight")
        else:
            tensor = tensor * self.spec.initializer_range
        return tensor.bfloat16().float()


def random_batch(spec: ModelSpec, lengths: Sequence[tuple[int, int]]) -> RolloutBatch:
    """Random tokens and rewards; `lengths`: (prompt tokens, response tokens). The same in every process."""
    generator = torch.Generator().manual_seed(5)
    rewards = torch.randn(len(lengths), generator=generator).tolist()

    def tokens(count: int) -> list[int]:
        return torch.randint(spec.vocab_size, (count,), generator=generator).tolist()

    pairs = [(tokens(prompt), tokens(response)) for prompt, response in lengths]
    return make_batch([prompt for prompt, _ in pairs], [response for _, response in pairs], rewards=rewards)


def prepared(recipe: Recipe, spec: ModelSpec, topology: Topology) -> Learner:
    """Stage 2's own learner, whose policy and reference have the same random weights."""
    weights = RandomWeights(spec, topology.device)
    return Learner.build(recipe, topology, spec=spec, policy_weights=weights, reference_weights=weights)


@dataclass(frozen=True)
class Measured:
    """A model's numbers on a batch. Tensors are on the CPU."""

    log_prob_R: Tensor  # fp64, every response's tokens in the batch's order
    gradients: dict[str, Tensor]  # of the objective, fp32, not clipped, by Hugging Face's names
    first_log_ratio: float  # between a pass with gradient and one without
    log_ratio_tolerance: float  # what the learner allows it
    phases: list[dict[str, Phase]]  # of each step


def measure(recipe: Recipe, spec: ModelSpec, topology: Topology, batch: RolloutBatch, steps: int = 1) -> Measured:
    """Stage 2's own steps on `batch`. Raises `RecipeError` where this machine cannot.

    Log-probs and gradients are those of the first step.
    """
    # The optimizer clips the gradients in place, and what is twice too large would look the same.
    assert recipe.optimizer.clip_grad == 0
    learner = prepared(recipe, spec, topology)
    parts = {}
    micro_batches = [micro.to(topology.device) for micro in make_micro_batches(recipe, batch.sequences)]
    for micro, log_prob_R in zip(micro_batches, forward_log_probs(learner.policy, micro_batches), strict=True):
        counts = batch.sequences.response_lengths_B[micro.indices].tolist()
        parts.update(zip(micro.indices, log_prob_R.double().cpu().split(counts), strict=True))
    first_log_ratio, gradients, phases = 0.0, {}, []
    for step in range(steps):
        record = learner.learn(batch, no_values(batch))
        phases.append(learner.timer.pop())
        if step == 0:
            first_log_ratio = record.first_log_ratio
            stream = WeightStream(learner.policy, spec, topology, tensor_of=lambda parameter: parameter.main_grad)
            gradients = {name: gradient.float().cpu() for name, gradient in stream}
    log_prob_R = torch.cat([parts[index] for index in range(len(batch))])
    return Measured(log_prob_R, gradients, first_log_ratio, learner.first_log_ratio_tolerance, phases)


@dataclass(frozen=True)
class Errors:
    """How far one `Measured` is from another. Log-probs in nats a token, gradients in the 2-norm as shares."""

    mean: float  # of |difference|
    bias: float  # |mean difference|: what a long sequence's sum does not average out
    largest: float
    gradient: float  # of the whole model
    scale: float  # |1 - its length along the true one, as a share of that|, in which noise averages out
    worst_gradient: float  # of one tensor
    worst_tensor: str


def errors(ours: Measured, truth: Measured) -> Errors:
    difference_R = ours.log_prob_R - truth.log_prob_R
    squares = {name: (gradient - truth.gradients[name]).norm() ** 2 for name, gradient in ours.gradients.items()}
    norms = {name: truth.gradients[name].norm() ** 2 for name in squares}
    along = sum((gradient * truth.gradients[name]).sum() for name, gradient in ours.gradients.items())
    shares = {name: float((squares[name] / norms[name].clamp_min(1e-30)).sqrt()) for name in squares}
    worst = max(shares, key=lambda name: (shares[name] != shares[name], shares[name]))  # NaN first
    return Errors(
        mean=float(difference_R.abs().mean()),
        bias=float(difference_R.mean().abs()),
        largest=float(difference_R.abs().max()),
        gradient=float((sum(squares.values()) / sum(norms.values())) ** 0.5),
        scale=float((1 - along / sum(norms.values())).abs()),
        worst_gradient=shares[worst],
        worst_tensor=worst,
    )


class Verdict:
    """Collects figures that are beyond their limits."""

    def __init__(self) -> None:
        self._missed: list[str] = []

    def of(self, row: str, **figures: tuple[float, float]) -> str:
        """ "met", or which of the figures (value, limit) are missed; NaN is."""
        missed = [f"{name} {value:.2g} > {limit:g}" for name, (value, limit) in figures.items() if not value <= limit]
        self._missed += [f"{row}: {miss}" for miss in missed]
        return f"MISSED: {', '.join(missed)}" if missed else "met"

    def finish(self) -> None:
        """Exit with 1 if anything was missed."""
        if self._missed:
            sys.exit("\n".join(["tests/gpu: beyond the limit:", *self._missed]))


def _versions() -> Iterator[str]:
    for name in ("torch", "megatron-core", "transformer-engine"):
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"no {name}"
