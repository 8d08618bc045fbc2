"""Peak bytes of tensors in a training step of each method, by what they are for, counted by torch's dispatch.

    python -m tests.benchmarks.memory [--methods apo ppo ..] [--dtypes fp32 bf16] [--responses 4] [--tokens 512]
                                      [--micro-batch 1200] [--allocator] ..

SmolLM2-135M's shape with random weights (or --model FOLDER), one rank, TP 1 x PP 1, `Learner.receive` and
`Learner.learn` on one batch of random tokens, two minibatches, a process for each method. All methods get as many
responses of the same length, in groups of --group where they need groups, and micro-batches of as many tokens. A first
step on a small batch makes the optimizer's moments, the second one is counted. No engine runs here: its KV cache is
arithmetic.

Each storage is counted once (tests/tensor_bytes.py), as one of these parts:

    weights, gradients, optimizer     of the policy; "optimizer" is Adam's moments, and main weights beside bf16 ones
    reference                         its weights
    critic                            its weights, gradients and optimizer
    activations                       what a forward pass with gradient makes, until it is freed
    backward                          what a backward pass makes: gradients of activations, and of a weight, before they
                                      are added to those
    no gradient                       what a pass without gradient makes
    head                              what the log-prob head makes, in any pass: tiles of logits, gradient of its input
    tokens                            micro-batches, log-probs, targets and all else of a learner's between the passes
    reduce                            what the sum of gradients over ranks makes: over gloo a copy of them, also of one
                                      rank's
    step                              what an optimizer step makes for itself
    rest                              what there is besides before a step: tables of rotary embeddings and such

What must hold, else it ends with 1: weights, gradients, optimizer, reference and critic are exactly what the number of
parameters says, before the step and after it; what else there is then is below 0.1 %; and with --allocator torch's
allocator, asked by its profiler, gave out the same at its peak up to 1 %. Private memory of the process is there for
comparison: it has the interpreter, libraries and what malloc keeps for later in it, and with --allocator more than a
gigabyte of the profiler's.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_apo.config import Recipe, build_recipe
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.learner import learner as learner_module
from megatron_apo.learner import step as step_module
from megatron_apo.learner.learner import Learner
from megatron_apo.learner.optim import Trainable
from megatron_apo.model import logprobs
from megatron_apo.model.hf_config import ModelSpec, read_hf_config
from megatron_apo.objectives import OBJECTIVES, objective_of
from megatron_apo.parallel.groups import alone
from megatron_apo.telemetry.memory import pop_private_peak_bytes
from megatron_apo.telemetry.timers import PhaseTimer
from megatron_apo.telemetry.units import data_size
from megatron_apo.weights.families import hf_tensors, model_entries
from tests.batches import UNSAMPLED, make_batch
from tests.tensor_bytes import REST, Instant, TensorBytes, allocator_peak

# SmolLM2-135M's config.json, as far as the architecture goes.
SHAPE = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
METHODS = [name for name in OBJECTIVES if name != "sft"]
NUM_MINIBATCHES = 2
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
PAD = 128  # a buffer's length is a multiple of it under the sharded optimizer (param_and_grad_buffer.py)
CRITIC = "critic"
CRITIC_PARTS = tuple(f"{CRITIC} {part}" for part in ("weights", "gradients", "optimizer"))
STATE = ("weights", "gradients", "optimizer", "reference", *CRITIC_PARTS)
PASSES = ("activations", "backward", "no gradient", "head", "tokens", "reduce", "step")
PARTS = (*STATE, *PASSES, REST)
REST_SHARE, ALLOCATOR_SHARE = 1e-3, 1e-2


class Miscounted(AssertionError):
    """A count that is not what another way of counting gives."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Hugging Face folder; none: SmolLM2-135M's shape, random weights")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--dtypes", nargs="+", choices=WEIGHT_BYTES, default=["fp32"])
    parser.add_argument("--responses", type=int, default=4)
    parser.add_argument("--group", type=int, default=2, help="responses a prompt, of methods that have groups")
    parser.add_argument("--tokens", type=int, default=512, help="of each response")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=1200, help="train.tokens_per_micro_batch")
    parser.add_argument("--prompts", type=int, default=32, help="for the KV cache: of a step")
    parser.add_argument("--allocator", action="store_true", help="hold each peak against torch's allocator")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a file for the counts as JSON")
    parser.add_argument("--run", nargs=2, metavar=("METHOD", "DTYPE"), help="one method, in this process")
    args = parser.parse_args()
    if args.run:
        print(json.dumps(measure(args, *args.run)))
        return
    found = {}
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        args.model = args.model or write_model(Path(folder))
        for dtype in args.dtypes:
            found[dtype] = {method: child(args, method, dtype) for method in args.methods}
            report(args, dtype, found[dtype])
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


def write_model(folder: Path, shape: dict[str, Any] = SHAPE) -> Path:
    """A Hugging Face folder of this shape with random weights."""
    (folder / "config.json").write_text(json.dumps(shape | {"architectures": ["LlamaForCausalLM"]}))
    generator = torch.Generator().manual_seed(0)
    sizes = hf_tensors(read_hf_config(folder))
    save_file(
        {name: 0.02 * torch.randn(size, generator=generator) for name, size in sizes.items()},
        folder / "model.safetensors",
    )
    return folder


def child(args: argparse.Namespace, method: str, dtype: str) -> dict[str, Any]:
    """`measure` in a process of its own, whose private memory is then the method's."""
    names = ("model", "responses", "group", "tokens", "prompt_tokens", "micro_batch", "threads")
    settings = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    settings += ["--allocator"] * args.allocator
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.memory", *settings, "--run", method, dtype]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


# ---- one method


def recipe_of(args: argparse.Namespace, method: str, dtype: str) -> Recipe:
    group = group_of(args, method)
    overrides = [
        "run.dir=unused",
        f"model.path={args.model}",
        f"model.dtype={dtype}",
        *UNSAMPLED,
        "data.train=unused.jsonl",
        f"data.max_prompt_tokens={args.prompt_tokens}",
        f"sampling.max_response_tokens={args.tokens}",
        "vstar.dir=unused",
        f"train.minibatches={NUM_MINIBATCHES}",
        f"train.prompts_per_step={args.responses // group}",
        f"train.tokens_per_micro_batch={args.micro_batch}",
        f"objective.name={method}",
        *([f"objective.samples_per_prompt={group}"] if group > 1 else []),
    ]
    return build_recipe({}, overrides)


def group_of(args: argparse.Namespace, method: str) -> int:
    """Responses a prompt: as many as were asked for, where the method takes more than one by default."""
    return args.group if OBJECTIVES[method].samples_per_prompt > 1 else 1  # type: ignore[attr-defined]


def batch_of(spec: ModelSpec, responses: int, group: int, prompt_tokens: int, tokens: int) -> RolloutBatch:
    """Random tokens, `group` responses to each prompt; rewards are 0 and 1 in turn, so that they differ in a group."""
    generator = torch.Generator().manual_seed(5)

    def draw(count: int) -> list[int]:
        return torch.randint(0, spec.vocab_size, (count,), generator=generator).tolist()

    prompts = [prompt for _ in range(responses // group) for prompt in [draw(prompt_tokens)] * group]
    return make_batch(
        prompts,
        [draw(tokens) for _ in prompts],
        rewards=[float(row % 2) for row in range(responses)],
        prompt_ids=[f"{row // group}" for row in range(responses)],
    )


def measure(args: argparse.Namespace, method: str, dtype: str) -> dict[str, Any]:
    """Counts of one step, bytes: see `count`, and "private", the process's."""
    with alone() as topology, TensorBytes() as counter:
        torch.set_num_threads(args.threads)
        recipe = recipe_of(args, method, dtype)
        learner = Learner.build(recipe, topology)
        group = group_of(args, method)
        sizes = (args.responses, group, args.prompt_tokens, args.tokens)
        small = (NUM_MINIBATCHES * group, group, 2, 2)
        small_batch, batch = (batch_of(learner.spec, *one) for one in (small, sizes))
        return count(counter, learner, small_batch, batch, allocator=args.allocator)


def count(
    counter: TensorBytes, learner: Learner, small: RolloutBatch, batch: RolloutBatch, *, allocator: bool
) -> dict[str, Any]:
    """Bytes of a step on `batch`, after one on `small`: "peak", by part; "phase" in which it is; "most", each part's
    own maximum; "phases", the peak of each; "private", the process's. And above the step's start, at most: "counted",
    and "allocator", if asked for."""
    with watched(counter, learner) as phases:
        step(learner, small)
        gc.collect()
        label_state(counter, learner)
        check_state(counter, learner)
        before = counter.now
        pop_private_peak_bytes()
        phases.restart()
        with allocator_peak() if allocator else nullcontext() as given_out:
            step(learner, batch)
        private = pop_private_peak_bytes()
    gc.collect()
    check_after(before, counter.now)
    peak = phases.peak
    counted = peak.total - before.total
    if given_out:
        check_allocator(counted, given_out[0], peak.total)
    return {
        "peak": peak.parts,
        "phase": phases.phase_of_peak,
        "most": phases.most,
        "phases": phases.totals,
        "private": private,
        "counted": counted,
        "allocator": given_out[0] if given_out else None,
    }


def step(learner: Learner, batch: RolloutBatch) -> None:
    values = [0.5] * len(batch) if learner.objective.takes_baseline else None
    learner.learn(learner.receive(batch), values)


class Phases(PhaseTimer):
    """The learner's timer, which also keeps the peak of each of its phases. Phases are not within each other."""

    def __init__(self, counter: TensorBytes) -> None:
        super().__init__()
        self._counter = counter
        self.restart()

    def restart(self) -> None:
        self.peak, self.phase_of_peak = Instant(), ""
        self.most: defaultdict[str, int] = defaultdict(int)
        self.totals: defaultdict[str, int] = defaultdict(int)
        self._counter.restart()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._take("between")
        with super().phase(name):
            yield
        self._take(name)

    def _take(self, name: str) -> None:
        peak = self._counter.peak
        self.totals[name] = max(self.totals[name], peak.total)
        if peak.total > self.peak.total:
            self.peak, self.phase_of_peak = peak, name
        for part, num_bytes in self._counter.most.items():
            self.most[part] = max(self.most[part], num_bytes)
        self._counter.restart()


@contextmanager
def watched(counter: TensorBytes, learner: Learner) -> Iterator[Phases]:
    """Within: what the learner's passes, its head and its optimizers make is known for that."""
    with pytest.MonkeyPatch.context() as patch:

        def made_as(owner: Any, name: str, part: str | Callable[[], str], *, static: bool = False) -> None:
            work = getattr(owner, name)

            def run(*arguments: Any, **options: Any) -> Any:
                with counter.within(part):
                    return work(*arguments, **options)

            patch.setattr(owner, name, staticmethod(run) if static else run)

        def kept_as(name: str, tensors_of: Callable[[Any], Iterator[torch.Tensor]]) -> None:
            work = getattr(learner, name)

            def run(*arguments: Any) -> Any:
                found = work(*arguments)
                counter.label("tokens", tensors_of(found))
                return found

            patch.setattr(learner, name, run)

        made_as(learner, "learn", "tokens")
        made_as(learner_module, "forward_only", "no gradient")
        made_as(step_module, "forward_backward", pass_with_gradient)
        for name in ("forward", "backward"):
            made_as(logprobs._TiledLogProbs, name, "head", static=True)
        for trainable in learner.trainables.values():
            made_as(trainable, "step", "step")
            made_as(trainable.chunks[0].config, "finalize_model_grads_func", "reduce")
        kept_as("micro_batches", tensors_in)
        kept_as("_known_log_probs", lambda known: tensors_in(known.found))
        kept_as("_critic_values", tensors_in)
        kept_as("_prepare", tensors_in)
        phases = Phases(counter)
        patch.setattr(learner, "timer", phases)
        yield phases


def pass_with_gradient() -> str:
    """Whether autograd is on its way back."""
    return "activations" if torch._C._current_graph_task_id() == -1 else "backward"


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Of nested lists, dictionaries and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_in(one)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif hasattr(value, "__dataclass_fields__"):
        yield from tensors_in(list(vars(value).values()))


def label_state(counter: TensorBytes, learner: Learner) -> None:
    """What is there between steps, by what it is."""
    owners = {"": learner.trainable} | ({f"{CRITIC} ": learner.critic} if learner.critic else {})
    for prefix, trainable in owners.items():
        counter.label(f"{prefix}optimizer", trainable._own_tensors())
        counter.label(f"{prefix}gradients", (buffer.grad_data for buffer in buffers_of(trainable)))
        counter.label(f"{prefix}weights", (one for chunk in trainable.chunks for one in chunk.parameters()))
    if learner.reference:
        with learner.reference.active() as chunks:
            counter.label("reference", (one for chunk in chunks for one in chunk.parameters()))


def buffers_of(trainable: Trainable) -> list[Any]:
    return [buffer for chunk in trainable.chunks for buffer in chunk.buffers]


# ---- what the counts are held against


def check_state(counter: TensorBytes, learner: Learner) -> None:
    """Each part of the state by the model's number of parameters, and what is left over is next to nothing."""
    found = counter.now
    said = state_bytes(learner.spec, learner.recipe)
    wrong = {part: (found.parts.get(part, 0), said[part]) for part in STATE if found.parts.get(part, 0) != said[part]}
    if wrong:
        raise Miscounted(
            "; ".join(f"{part}: {ours:,} bytes counted, {by:,} said" for part, (ours, by) in wrong.items())
        )
    others = found.total - sum(said.values())
    if others > REST_SHARE * found.total:
        raise Miscounted(f"{others:,} bytes before a step are nothing that is known: {found.parts}")


def state_bytes(spec: ModelSpec, recipe: Recipe) -> dict[str, int]:
    """Bytes of each part of `STATE`, from the shapes of the Hugging Face tensors alone."""
    weight = WEIGHT_BYTES[recipe.model.dtype]
    moments = 8 + (4 if weight == 2 else 0)

    def trained(of: ModelSpec) -> tuple[int, int, int]:
        sizes = [prod(size) for size in hf_tensors(of).values()]
        padded = -(-sum(sizes) // PAD) * PAD
        assert all(size % (PAD // 2) == 0 for size in sizes), "each parameter would be padded in the buffers"
        steps = 4 * len(model_entries(of, pp=1))  # Adam counts each Megatron parameter's
        return weight * padded, 4 * padded, moments * sum(sizes) + steps

    has_critic = recipe.objective.own_critic is not None
    has_reference = "reference" in reference_users(recipe)
    number = sum(prod(size) for size in hf_tensors(spec).values())
    policy, critic = trained(spec), trained(spec.as_critic()) if has_critic else (0, 0, 0)
    return dict(zip(STATE, (*policy, weight * number * has_reference, *critic), strict=True))


def reference_users(recipe: Recipe) -> frozenset[str]:
    objective = objective_of(recipe)
    return objective.target_log_probs | objective.loss_log_probs


def check_after(before: Instant, after: Instant) -> None:
    """A step leaves the state as large as it was, and next to nothing besides: Megatron-Core keeps tables of rotary
    embeddings, one for each length."""
    changed = [part for part in STATE if before.parts.get(part) != after.parts.get(part)]
    if changed or after.total - before.total > REST_SHARE * after.total:
        raise Miscounted(f"a step left {after.parts} where {before.parts} had been")


def check_allocator(counted: int, given_out: int, total: int) -> None:
    """Both: bytes above the step's start, at most."""
    if abs(counted - given_out) > ALLOCATOR_SHARE * total:
        raise Miscounted(f"{counted:,} bytes above the start were counted, and the allocator gave out {given_out:,}")


# ---- the tables


def report(args: argparse.Namespace, dtype: str, found: dict[str, dict[str, Any]]) -> None:
    spec = read_hf_config(args.model)
    base = "apo" if "apo" in found else next(iter(found))
    base_total = sum(found[base]["peak"].values())
    print(
        f"{dtype}, {args.responses} responses of {args.tokens} tokens behind {args.prompt_tokens}, micro-batches of at "
        f"most {args.micro_batch} tokens, {NUM_MINIBATCHES} minibatches; MB (1e6 bytes)\n"
    )

    def table(columns: list[str], cells: Callable[[dict[str, Any]], list[str]]) -> None:
        print(f"| method | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
        for method, one in found.items():
            print(f"| {method} | {' | '.join(cells(one))} |")
        print(flush=True)

    def there(key: str) -> list[str]:
        return [part for part in PARTS if any(megabytes(one[key].get(part, 0)) for one in found.values())]

    def peak(one: dict[str, Any]) -> list[str]:
        total = sum(one["peak"].values())
        own = [megabytes(one["peak"].get(part, 0)) for part in there("peak")]
        return [megabytes(total), f"{total / base_total:.3f}", one["phase"], *own]

    table(["peak", f"x {base}", "in", *there("peak")], peak)
    print("Each part's own maximum:\n")
    table(there("most"), lambda one: [megabytes(one["most"].get(part, 0)) for part in there("most")])
    print("The peak of each phase, and private memory of the process:\n")
    phases = list(dict.fromkeys(name for one in found.values() for name in one["phases"]))
    table(
        [*phases, "private"],
        lambda one: [*(megabytes(one["phases"].get(name, 0)) for name in phases), megabytes(one["private"])],
    )
    if args.allocator:
        print("Above the step's start, at most, in bytes:\n")
        table(["counted", "torch's allocator"], lambda one: [f"{one['counted']:,}", f"{one['allocator']:,}"])
    print(
        f"All logits of a micro-batch at once would be {data_size(args.micro_batch * spec.vocab_size * 4)}. KV cache, "
        f"computed, of {args.prompts} prompts at once, each with the method's own number of responses: "
        + ", ".join(f"{method} {data_size(kv_cache_bytes(args, spec, method, dtype))}" for method in found),
        flush=True,
    )


def kv_cache_bytes(args: argparse.Namespace, spec: ModelSpec, method: str, dtype: str) -> int:
    """Keys and values of a step's tokens, all at once: a prompt's are shared by its responses."""
    token = 2 * spec.num_layers * spec.num_query_groups * spec.head_dim * WEIGHT_BYTES[dtype]
    samples = OBJECTIVES[method].samples_per_prompt  # type: ignore[attr-defined]
    return args.prompts * (args.prompt_tokens + samples * args.tokens) * token


def megabytes(num_bytes: int) -> str:
    """Empty where it would round to 0."""
    text = f"{num_bytes / 1e6:,.1f}"
    return "" if text == "0.0" else text


if __name__ == "__main__":
    main()
