"""One rank of the tests of what a resume reads and holds. Started by test_resume_memory.py.

    main(WORK, LAYOUT, MODEL, ACTION [DTYPE])

ACTION `save` writes a checkpoint of MODEL (`SPECS`) after one step on made-up gradients to WORK/MODEL. `ours` and
`theirs` load it, as `Checkpoints.restore` does or as Megatron-Core does, and leave WORK/ACTION-LAYOUT-RANK.json: a
`Loaded`. `copy` loads it and writes what it has to WORK/copy/MODEL.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_apo.config import OptimizerConfig
from megatron_apo.learner import optimizer_state
from megatron_apo.learner.optim import Trainable, make_trainable
from megatron_apo.model.build import build_model
from megatron_apo.model.precision import Precision
from megatron_apo.parallel.groups import distributed
from megatron_apo.telemetry.memory import pop_private_peak_bytes
from megatron_apo.weights import torch_dist
from tests.dist.ranks import parallel_of
from tests.specs import model_spec

_M_MMAP_THRESHOLD = -3  # mallopt(3), bytes
_TINY = {"num_layers": 2, "hidden_size": 48, "ffn_size": 96, "num_heads": 4, "num_query_groups": 2, "head_dim": 12}
SPECS = {
    # 12.7 million parameters, of which no tensor has more than 4 %.
    "large": model_spec(
        family="qwen3",
        num_layers=12,
        hidden_size=256,
        ffn_size=1024,
        num_heads=4,
        num_query_groups=4,
        head_dim=64,
        vocab_size=256,
        qk_norm=True,
    ),
    "tied": model_spec(family="qwen3", vocab_size=101, qk_norm=True, tied=True, **(_TINY | {"num_layers": 4})),
    "experts": model_spec(
        family="qwen3_moe",
        vocab_size=101,
        qk_norm=True,
        num_experts=4,
        experts_per_token=2,
        expert_ffn_size=40,
        **_TINY,
    ),
}


@dataclass(frozen=True)
class Loaded:
    """What a rank has after loading. Bytes are of private memory."""

    held_bytes: int  # before
    peak_bytes: int
    num_parameters: int  # of this rank's chunks
    largest: int  # of the parameters' sizes
    state: dict[str, str]  # sha256 of each tensor of weights and optimizer


def main(work: str, layout: str, name: str, action: str, dtype: str = "fp32") -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 65536)  # memory of tensors goes back at once: what is free would count as held
    parallel, folder = parallel_of(layout), Path(work) / name
    with distributed(parallel) as topology:
        torch.manual_seed(topology.rank)
        chunks = build_model(SPECS[name], parallel, topology, Precision(dtype))
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            parameter.data.normal_()
        trainable = make_trainable(chunks, OptimizerConfig(), total_steps=2)
        if action == "save":
            trainable.zero_grad()
            for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
                parameter.main_grad.normal_()
            trainable.step()
            torch_dist.write(folder, topology, trainable.sharded_state(), lambda path: None)
            return
        if action == "copy":
            ours(trainable, folder)
            torch_dist.write(Path(work) / "copy" / name, topology, trainable.sharded_state(), lambda path: None)
            return
        gc.collect()
        libc.malloc_trim(0)
        pop_private_peak_bytes()
        held = pop_private_peak_bytes()
        {"ours": ours, "theirs": theirs}[action](trainable, folder)
        peak = pop_private_peak_bytes()
        sizes = [parameter.numel() for chunk in chunks for parameter in chunk.parameters()]
        found = Loaded(held, peak, sum(sizes), max(sizes), dict(digests(trainable)))
        (Path(work) / f"{action}-{layout}-{topology.rank}.json").write_text(json.dumps(asdict(found)))


def ours(trainable: Trainable, folder: Path) -> None:
    trainable.load_state(torch_dist.read(folder, trainable.sharded_state(is_loading=True)), folder)


def theirs(trainable: Trainable, folder: Path) -> None:
    """Every rank reads the whole optimizer, as Megatron-Core would; with torch's Adam it needs a hand with `step`."""
    optimizer, model = trainable.optimizer, trainable._sharded_model()
    optimizer_state._allocate(optimizer)
    with optimizer_state._compact_index(optimizer):
        sharded = optimizer.sharded_state_dict(model, is_loading=True, metadata=optimizer_state.RESHARDABLE)
    state = torch_dist.read(folder, {"model": model, "optimizer": sharded, "schedule": 0})
    for index, chunk in enumerate(trainable.chunks):
        chunk.module.load_state_dict(state["model"][index])
    parts = optimizer.chained_optimizers
    for index, part in enumerate(parts):
        own = state["optimizer"] if len(parts) == 1 else state["optimizer"][index]
        parameters = own.pop("param_state")
        part.load_state_dict(own)
        steps = [values.pop("step").clone() for values in part.optimizer.state.values()]
        part.load_parameter_state_from_fully_reshardable(parameters)
        for values, step in zip(part.optimizer.state.values(), steps, strict=True):
            values["step"] = step


def digests(trainable: Trainable) -> Iterator[tuple[str, str]]:
    """The sha256 of each tensor of this rank's weights, and of what its optimizer holds."""
    for index, chunk in enumerate(trainable.chunks):
        for name, parameter in chunk.module.named_parameters():
            yield f"{index} {name}", _sha256(parameter)
            for part in trainable.optimizer.chained_optimizers:
                assert isinstance(part, DistributedOptimizer)
                if parameter in part.model_param_gbuf_map:
                    for key, value in part._get_main_param_and_optimizer_states(parameter).items():
                        yield f"{index} {name} {key}", _sha256(value)


def _sha256(tensor: Any) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
