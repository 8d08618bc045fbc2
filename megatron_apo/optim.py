"""The policy under Megatron's DDP, its optimizer and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_apo.config import OptimizerConfig
from megatron_apo.model.cpu_compat import cuda_type_names
from megatron_apo.weights.torch_dist import LAYOUT, sharded_state

_RESHARDABLE = LAYOUT | {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
_NO_CLIPPING = 1e30  # Megatron computes the norm only when it clips


class GradientError(RuntimeError):
    """A gradient that is not finite."""


@dataclass
class Trainable:
    """A model that learns: `model` is the DDP wrapper, `step()` one optimizer step on the accumulated gradients."""

    model: DistributedDataParallel
    optimizer: Any
    scheduler: OptimizerParamScheduler

    def zero_grad(self) -> None:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self) -> float:
        """Update the weights; returns the gradient norm over all ranks, before clipping."""
        with cuda_type_names():
            updated, grad_norm, _ = self.optimizer.step()
        if not updated or not math.isfinite(grad_norm):
            raise GradientError(
                f"the gradient's norm is {grad_norm}; the weights are lost, resume from the last checkpoint"
            )
        self.scheduler.step(increment=1)
        return float(grad_norm)

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def sharded_state(self, *, is_loading: bool = False) -> dict[str, Any]:
        """Weights, optimizer and schedule as Megatron-Core's sharded state, to be saved or (`is_loading`) filled.

        The optimizer's is in the parameters' own shapes, so that another layout can load it; for that, data-parallel
        rank 0 gathers its shards in main memory when saving. Collective.
        """
        if is_loading:
            _allocate(self.optimizer)
        model = sharded_state(self.model.module)
        with _compact_index(self.optimizer):
            optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_RESHARDABLE)
        return {"model": model, "optimizer": optimizer, "schedule": self.scheduler.num_steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over a filled `sharded_state`; this object must be as `make_trainable` made it."""
        self.model.module.load_state_dict(state["model"])
        _load(self.optimizer, state["optimizer"])
        self.scheduler.step(increment=state["schedule"])


def make_trainable(module: torch.nn.Module, config: OptimizerConfig, *, total_steps: int) -> Trainable:
    """Wrap `module` (weights loaded) for training. `total_steps`: optimizer steps of the run, for the schedule."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=config.distributed,
        check_for_nan_in_grad=False,  # the norm is checked in `step`, on every rank
    )
    model = DistributedDataParallel(config=module.config, ddp_config=ddp_config, module=module)
    half = module.config.params_dtype == torch.bfloat16
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad or _NO_CLIPPING,
        bf16=half,
        params_dtype=module.config.params_dtype,
        use_distributed_optimizer=config.distributed,
    )
    with cuda_type_names():
        optimizer = get_megatron_optimizer(megatron_config, [model])
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr / (config.warmup_steps + 1),  # from 0, the first step would change nothing
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(total_steps, config.warmup_steps + 1),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    module.config.no_sync_func = model.no_sync
    module.config.finalize_model_grads_func = finalize_model_grads
    module.config.grad_scale_func = optimizer.scale_loss
    return Trainable(model, optimizer, scheduler)


def _allocate(optimizer: Any) -> None:
    """Give a new optimizer the state that a checkpoint will fill.

    Where TE and Apex are not, Megatron-Core uses torch's Adam and reads its `step` (distrib_optimizer.py, `state_dict`)
    before there is one (optimizer/__init__.py, `init_state_fn`).
    """
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.Adam):
            for parameter_state in part.optimizer.state.values():
                parameter_state["step"] = torch.tensor(0.0)


@contextmanager
def _compact_index(optimizer: Any) -> Iterator[None]:
    """Within: parameters are where the optimizer state that data-parallel rank 0 gathered has them.

    Megatron-Core gathers buckets without the padding between them (distrib_optimizer.py, `get_parameter_state_dp_zero`)
    and looks parameters up with it (`sharded_param_state_fully_reshardable`): all behind the first padded bucket would
    be saved shifted. The last stage of a tied model has two buckets.
    """
    buffers = [
        b for part in optimizer.chained_optimizers if isinstance(part, DistributedOptimizer) for b in part.buffers
    ]
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        sizes = [bucket.numel_unpadded for bucket in buffer.buckets]
        shifts = [bucket.offset - sum(sizes[:index]) for index, bucket in enumerate(buffer.buckets)]
        buffer.param_index_map = {
            parameter: (start - shifts[bucket], end - shifts[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, index in zip(buffers, padded, strict=True):
            buffer.param_index_map = index


def _load(optimizer: Any, state: dict[str, Any]) -> None:
    """Load a state that `sharded_state` asked for.

    With torch's Adam the distributed optimizer needs a hand: it takes `step` for a tensor of the parameter's shape
    (distrib_optimizer.py, `_set_main_param_and_optimizer_states`), and leaves all parameters one `step` object, which
    each of them would count up (`load_state_dict`).
    """
    parts = optimizer.chained_optimizers  # experts have one of their own
    for index, part in enumerate(parts):
        _load_part(part, state if len(parts) == 1 else state[index])


def _load_part(part: Any, state: dict[str, Any]) -> None:
    if not (isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.Adam)):
        part.load_state_dict(state)
        return
    parameters = state.pop("param_state")
    part.load_state_dict(state)
    steps = [parameter_state.pop("step").clone() for parameter_state in part.optimizer.state.values()]
    part.load_parameter_state_from_fully_reshardable(parameters)
    for parameter_state, step in zip(part.optimizer.state.values(), steps, strict=True):
        parameter_state["step"] = step
