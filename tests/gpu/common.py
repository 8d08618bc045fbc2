"""What the checks of a model share: shapes, random weights, one process that is the whole job, and what is measured.

Nothing is downloaded: a model is a `config.json` written here and weights drawn on the device.
"""

from __future__ import annotations

import gc
import json
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_apo.config import Recipe, build_recipe
from megatron_apo.data.layout import make_micro_batches
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.data.sequences import Sequences
from megatron_apo.learner.learner import Learner
from megatron_apo.model.hf_config import ModelSpec, read_hf_config
from megatron_apo.parallel.groups import alone
from megatron_apo.parallel.pipeline import forward_only
from megatron_apo.runtime.topology import Topology
from megatron_apo.telemetry.timers import Phase
from megatron_apo.weights.families import hf_tensors
from megatron_apo.weights.stream import WeightStream
from tests.batches import UNSAMPLED, make_batch, no_values
from tests.gpu.report import describe_machine

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


@contextmanager
def job() -> Iterator[Topology]:
    """This process as the only rank."""
    describe_machine()
    with alone() as topology:
        yield topology


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

    def __contains__(self, name: str) -> bool:
        return name in hf_tensors(self.spec)

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


def log_probs(learner: Learner, sequences: Sequences) -> list[Tensor]:
    """The policy's log-probs of each sequence's response tokens, fp64 on the CPU."""
    parts = {}
    micro_batches = [micro.to(learner.topology.device) for micro in make_micro_batches(learner.recipe, sequences)]
    for micro, log_prob_R in zip(micro_batches, forward_only(learner.policy, micro_batches), strict=True):
        counts = sequences.response_lengths_B[micro.indices].tolist()
        parts.update(zip(micro.indices, log_prob_R.double().cpu().split(counts), strict=True))
    return [parts[index] for index in range(len(parts))]


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
    log_prob_R = torch.cat(log_probs(learner, batch.sequences))
    first_log_ratio, gradients, phases = 0.0, {}, []
    for step in range(steps):
        record = learner.learn(batch, no_values(batch))
        phases.append(learner.timer.pop())
        if step == 0:
            first_log_ratio = record.first_log_ratio
            stream = WeightStream(learner.policy, spec, topology, tensor_of=lambda parameter: parameter.main_grad)
            gradients = {name: gradient.float().cpu() for name, gradient in stream}
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
