"""One rank of the critic's tests: a step of a critic as it is and with faults put into it, and its way through a
checkpoint beside the policy. See test_critic.py.

    main(WORK, LAYOUT, VARIANT .. [from=SAVED_AT])

Rank 0 writes WORK/LAYOUT.pt: {variant: {"steps": {fault ("none" for none): {eps: {"values", "gradients", "norm",
"change"}}}, "parameters", "checkpoint"}}. Faults and checkpoints are the first variant's alone, and of a fault there is
the first eps. With `from`, a layout whose checkpoints are there, it is the step after these.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megatron_apo.config import OptimizerConfig, ParallelConfig
from megatron_apo.data.batch import MicroBatch
from megatron_apo.data.layout import make_micro_batches
from megatron_apo.learner.checkpoint import CRITIC, POLICY, load_states, sharded_states
from megatron_apo.learner.optim import Trainable, make_trainable
from megatron_apo.model.build import build_model
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.model.value import build_critic
from megatron_apo.objectives.base import LossTerm, Stats
from megatron_apo.parallel import pipeline
from megatron_apo.parallel.groups import distributed
from megatron_apo.parallel.pipeline import forward_backward, forward_only
from megatron_apo.runtime.topology import Topology
from megatron_apo.weights import torch_dist
from megatron_apo.weights.files import CheckpointError
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.parameters import load_weights
from megatron_apo.weights.stream import WeightStream
from tests.dist.learner_worker import SETTINGS
from tests.dist.ranks import parallel_of
from tests.dist.worker import Case, batch, by_sequence, optimizer_tensors, recipe_of

SEQUENCE_PARALLEL = "sequence-parallel"  # in a layout's name


def layout_of(name: str) -> ParallelConfig:
    return parallel_of(name).model_copy(update={"sequence_parallel": SEQUENCE_PARALLEL in name})


def targets() -> list[torch.Tensor]:
    """Of each response's values, another number for each token; the same everywhere."""
    generator = torch.Generator().manual_seed(23)
    # So large that gradients are far above an eps of 1e-8.
    return [20 * torch.rand(int(count), generator=generator) for count in batch().sequences.response_lengths_B]


def micro_batches(parallel: ParallelConfig, topology: Topology) -> list[MicroBatch]:
    return make_micro_batches(
        recipe_of(parallel, Case(budget=120)), batch().sequences, dp=topology.dp, replica=topology.dp_rank
    )


class Critic:
    """The critic of WORK/critics/VARIANT and its optimizer."""

    def __init__(self, work: Path, variant: str, parallel: ParallelConfig, topology: Topology, config: OptimizerConfig):
        folder = work / "critics" / variant
        self.spec, self.topology = read_hf_config(folder).as_critic(), topology
        self.chunks = build_critic(self.spec, parallel, topology)
        reader = HFReader(folder)
        reader.check(self.spec)
        load_weights(self.chunks, self.spec, topology, reader)
        self.trainable = make_trainable(self.chunks, config, total_steps=4)
        self.micro = micro_batches(parallel, topology)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in WeightStream(self.chunks, self.spec, self.topology)}

    def gradients(self) -> dict[str, torch.Tensor]:
        stream = WeightStream(self.chunks, self.spec, self.topology, tensor_of=lambda parameter: parameter.main_grad)
        return {name: tensor.clone() for name, tensor in stream}

    def heads(self) -> list[torch.nn.Parameter]:
        """On the last stage one."""
        return [chunk.value_head for chunk in self.chunks if chunk.post_process]

    def backward(self) -> None:
        """Gradients of the mean squared error over the tokens of the batch."""

        def loss(value_R: torch.Tensor, index: int) -> LossTerm:
            error_R = value_R - torch.cat([targets()[row] for row in self.micro[index].indices])
            return LossTerm(error_R.square().sum(), len(error_R), Stats({}))

        self.trainable.zero_grad()
        forward_backward(self.trainable.chunks, self.micro, loss)


# ---- faults, put into a critic from outside. `patch` is undone afterwards.


def value_of_the_neighbour(critic: Critic, patch: pytest.MonkeyPatch) -> None:
    """Each value is taken to be that of the token after it."""
    of_responses = pipeline._of_responses
    patch.setattr(pipeline, "_of_responses", lambda *arguments: of_responses(*arguments).roll(-1))


def _after_backward(critic: Critic, work: Callable[[torch.Tensor], Any], before: bool = False) -> None:
    """Do `work` on the number of tokens before the ranks' gradients are added up, or on each head afterwards."""
    config = critic.chunks[0].config
    finalize = config.finalize_model_grads_func

    def wrong(chunks: list, num_tokens: torch.Tensor, **options: Any) -> None:
        if before:
            work(num_tokens)
        finalize(chunks, num_tokens, **options)
        if not before:
            for head in critic.heads():
                work(head)

    config.finalize_model_grads_func = wrong


def head_doubled(critic: Critic, patch: pytest.MonkeyPatch) -> None:
    """As if the gradients of two tensor ranks, each of which has all of it, were added up."""
    _after_backward(critic, lambda head: head.main_grad.mul_(2))


def head_kept(critic: Critic, patch: pytest.MonkeyPatch) -> None:
    """The optimizer's step is undone there."""
    step, before = critic.trainable.step, [head.detach().clone() for head in critic.heads()]

    def wrong() -> float:
        norm = step()
        for head, value in zip(critic.heads(), before, strict=True):
            head.data.copy_(value)
        return norm

    critic.trainable.step = wrong  # type: ignore[method-assign]


def one_ranks_count_for_all(critic: Critic, patch: pytest.MonkeyPatch) -> None:
    """Each rank's number of tokens is taken to be the first one's."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    first = dist.get_global_rank(group, 0)
    _after_backward(critic, lambda count: dist.broadcast(count, src=first, group=group), before=True)


def head_counted_by_each_tensor_rank(critic: Critic, patch: pytest.MonkeyPatch) -> None:
    """In the norm, as a weight that is split between them."""
    for head in critic.heads():
        head.tensor_model_parallel = True


def head_of_own_positions(critic: Critic, patch: pytest.MonkeyPatch) -> None:
    """Sequence-parallel ranks' gradients of the head are not added up."""
    for head in critic.heads():
        head.sequence_parallel = False


STEP = {"gradients", "norm", "weights, eps 1"}
# fault: (what puts it in, which comparisons must fail)
FAULTS: dict[str, tuple[Callable[[Critic, pytest.MonkeyPatch], None], set[str]]] = {
    "value of the neighbour": (value_of_the_neighbour, STEP | {"values"}),
    "head doubled": (head_doubled, STEP),
    "head kept": (head_kept, {"weights, eps 1"}),
    "one rank's count for all": (one_ranks_count_for_all, STEP),
    "head counted by each tensor rank": (head_counted_by_each_tensor_rank, {"norm"}),
    "head of own positions": (head_of_own_positions, STEP),
}


def faults_of(layout: str) -> list[str]:
    """Those that this layout can have."""
    parallel = layout_of(layout)
    impossible = {
        "one rank's count for all": parallel.dp * parallel.cp == 1,
        "head counted by each tensor rank": parallel.tp == 1,
        "head of own positions": not parallel.sequence_parallel,
    }
    return [fault for fault in FAULTS if not impossible.get(fault)]


# ---- what is measured


def measure(work: Path, variant: str, layout: str, eps: float, fault: str | None, topology: Topology) -> dict:
    """One optimizer step, with `fault` in it."""
    lr, sharded = SETTINGS[eps]
    config = OptimizerConfig(lr=lr, eps=eps, clip_grad=0, distributed=sharded)
    critic = Critic(work, variant, layout_of(layout), topology, config)
    with pytest.MonkeyPatch.context() as patch:
        if fault:
            FAULTS[fault][0](critic, patch)
        found: dict = {"values": by_sequence(forward_only(critic.chunks, critic.micro), critic.micro, topology)}
        before = critic.weights()
        critic.backward()
        if not sharded:  # else each rank has its own part of the reduced gradient alone
            found["gradients"] = critic.gradients()
        found["norm"] = critic.trainable.step()
        return found | {"change": {name: after - before[name] for name, after in critic.weights().items()}}


def parameters(work: Path, variant: str, layout: str, topology: Topology) -> dict:
    """What all ranks hold: {"count": numbers of one replica, "names", "buffers": whether DDP's hold no more}."""
    critic = Critic(work, variant, layout_of(layout), topology, OptimizerConfig(distributed=False))
    replica, count, names = topology.dp_rank * topology.cp + topology.cp_rank, 0, set()
    for name, parameter in (pair for chunk in critic.chunks for pair in chunk.named_parameters()):
        of_an_expert = not getattr(parameter, "allreduce", True)
        split = of_an_expert or getattr(parameter, "tensor_model_parallel", False)
        if (split or topology.tp_rank == 0) and replica < (topology.ep if of_an_expert else 1):
            count += parameter.numel()
        names.add(name)
    held = sum(parameter.numel() for chunk in critic.chunks for parameter in chunk.parameters())
    buffers = [buffer for chunk in critic.trainable.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    same = held == sum(buffer.numel_unpadded for buffer in buffers)
    found: list = [None] * topology.world_size
    dist.all_gather_object(found, (count, names, same))
    return {
        "count": sum(one[0] for one in found),
        "names": sorted(set().union(*(one[1] for one in found))),
        "buffers": all(one[2] for one in found),
    }


# A schedule and a decay that matter within three steps.
POLICYS = OptimizerConfig(lr=1e-3, schedule="linear", warmup_steps=1, weight_decay=0.1)
CRITICS = OptimizerConfig(lr=2e-3, schedule="cosine", warmup_steps=2, weight_decay=0.2)


def make_policy(work: Path, variant: str, layout: str, topology: Topology) -> Trainable:
    folder = work / "models" / variant
    spec = read_hf_config(folder)
    chunks = build_model(spec, layout_of(layout), topology)
    load_weights(chunks, spec, topology, HFReader(folder))
    return make_trainable(chunks, POLICYS, total_steps=4)


class Both:
    """A policy and a critic."""

    def __init__(self, work: Path, variant: str, layout: str, topology: Topology):
        self.critic = Critic(work, variant, layout_of(layout), topology, CRITICS)
        self.policy = make_policy(work, variant, layout, topology)
        self.trainables = {POLICY: self.policy, CRITIC: self.critic.trainable}

    def step(self) -> None:
        self.critic.backward()
        self.critic.trainable.step()
        self.policy.zero_grad()
        forward_backward(
            self.policy.chunks,
            self.critic.micro,
            lambda log_prob_R, _: LossTerm(-log_prob_R.sum(), len(log_prob_R), Stats({})),
        )
        self.policy.step()

    def load(self, folder: Path) -> None:
        state = torch_dist.read(folder, sharded_states(self.trainables, is_loading=True))
        load_states(self.trainables, state, folder)

    def state(self) -> dict[str, list[torch.Tensor]]:
        """Each one's weights, moments and learning rate, as this rank has them."""
        return {name: tensors_of(trainable) for name, trainable in self.trainables.items()}


def tensors_of(trainable: Trainable) -> list[torch.Tensor]:
    weights = [parameter for chunk in trainable.chunks for parameter in chunk.parameters()]
    found = [*weights, *optimizer_tensors(trainable), torch.tensor(trainable.lr, dtype=torch.float64)]
    return [tensor.detach().clone() for tensor in found]


def same(ours: dict[str, list[torch.Tensor]], theirs: dict[str, list[torch.Tensor]]) -> list[dict[str, bool]]:
    """Whether each one's tensors are equal in every bit, on each rank."""
    mine = {
        name: len(tensors) == len(theirs[name]) and all(map(torch.equal, tensors, theirs[name]))
        for name, tensors in ours.items()
    }
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def through_a_checkpoint(work: Path, variant: str, layout: str, topology: Topology) -> dict:
    """Saved after two steps, loaded into new objects, and the third step of both; and what else is read of it."""
    folder = work / "checkpoints" / f"{layout}-{variant}"
    straight, resumed = Both(work, variant, layout, topology), Both(work, variant, layout, topology)
    straight.step(), straight.step()
    torch_dist.write(folder, topology, sharded_states(straight.trainables), lambda path: None)
    alone = folder.with_name(f"{folder.name}-policy")
    torch_dist.write(alone, topology, sharded_states({POLICY: straight.policy}), lambda path: None)
    found: dict = {"before": same(resumed.state(), straight.state())}
    resumed.load(folder)
    found["loaded"] = same(resumed.state(), straight.state())
    policy = {POLICY: make_policy(work, variant, layout, topology)}
    load_states(policy, torch_dist.read(folder, sharded_states(policy, is_loading=True)), folder)
    found["policy alone"] = same({POLICY: tensors_of(policy[POLICY])}, straight.state())
    straight.step(), resumed.step()
    found["next"] = same(resumed.state(), straight.state())
    found["weights"] = straight.critic.weights()
    try:
        torch_dist.read(alone, sharded_states(straight.trainables, is_loading=True))
    except CheckpointError as error:
        found["without a critic"] = str(error)
    return found


def resume(work: Path, variant: str, saved_at: str, layout: str, topology: Topology) -> dict:
    """The third step, from another layout's checkpoint."""
    both = Both(work, variant, layout, topology)
    both.load(work / "checkpoints" / f"{saved_at}-{variant}")
    both.step()
    return {"weights": both.critic.weights()}


def norms_for_sequence_parallelism() -> None:
    """Let torch's norms say of their weights what Transformer Engine's say: that each tensor rank has the gradient of
    its own positions. Megatron-Core's wrapper refuses (torch_norm.py)."""

    def marked(cls: type, config: Any, hidden_size: int, eps: float, **unused: Any) -> torch.nn.Module:
        norm = torch.nn.RMSNorm(hidden_size, eps=eps)
        norm.weight.sequence_parallel = True
        return norm

    WrappedTorchNorm.__new__ = marked  # type: ignore[method-assign, assignment]


def main(folder: str, layout: str, *arguments: str) -> None:
    work, results = Path(folder), {}
    saved_at = next((argument.removeprefix("from=") for argument in arguments if argument.startswith("from=")), None)
    if layout_of(layout).sequence_parallel:
        norms_for_sequence_parallelism()
    with distributed(layout_of(layout)) as topology:
        for number, variant in enumerate(argument for argument in arguments if "=" not in argument):
            if saved_at:
                results[variant] = resume(work, variant, saved_at, layout, topology)
                continue
            runs: list = [(None, eps) for eps in SETTINGS]
            runs += [(fault, 1.0) for fault in faults_of(layout) if number == 0]
            steps: dict = {}
            for fault, eps in runs:
                steps.setdefault(fault or "none", {})[eps] = measure(work, variant, layout, eps, fault, topology)
            results[variant] = {
                "steps": steps,
                "parameters": parameters(work, variant, layout, topology),
                **({"checkpoint": through_a_checkpoint(work, variant, layout, topology)} if number == 0 else {}),
            }
        if topology.is_driver:
            torch.save(results, work / (f"{layout}-from-{saved_at}.pt" if saved_at else f"{layout}.pt"))
