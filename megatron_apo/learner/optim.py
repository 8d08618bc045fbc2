"""The policy under Megatron's DDP, its optimizer and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_apo.config import OptimizerConfig, RecipeError
from megatron_apo.model.cpu_compat import cuda_type_names
from megatron_apo.model.gpus import visible_gpus
from megatron_apo.model.placement import HostCopy, drop_quantized
from megatron_apo.model.precision import ddp_arguments, optimizer_arguments, optimizer_problems
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
    """A model that learns: `chunks` are its DDP wrappers, `step()` one optimizer step on the accumulated gradients."""

    chunks: list[DistributedDataParallel]
    optimizer: Any
    scheduler: OptimizerParamScheduler

    def zero_grad(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
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

    @contextmanager
    def parked(self, wanted: bool = True) -> Iterator[None]:
        """Within, if `wanted`: nothing but the weights is on the device, whose memory is free for other processes.

        Main weights and Adam's moments wait in the host's (pinned) memory: 12 bytes for each parameter of this rank's
        shard beside bf16 weights (8 with moments in bf16, and not what optimizer.cpu_offload has there already), 8
        beside fp32 ones, which are the main weights themselves. Gradients are dropped and come back as zeros.

        Megatron-Core's own `offload_to_cpu` is not used for the optimizer: it copies to new, pageable memory every
        time, and brings back parameters that were views of the weights as tensors apart. The precision-aware optimizer
        would go on training those, and the model would stay as it is (distrib_optimizer.py,
        `_copy_main_params_to_model_params`).
        """
        if not wanted:
            yield
            return
        self.optimizer.zero_grad()
        drop_quantized(self.chunks)
        state = HostCopy(self._own_tensors())
        try:
            state.free()
            for chunk in self.chunks:
                chunk.offload_grad_buffers()  # and empties torch's cache of freed memory
            yield
        finally:
            state.refill()
            for chunk in self.chunks:
                chunk.restore_grad_buffers()

    def _own_tensors(self) -> list[torch.Tensor]:
        """What the optimizer keeps on the weights' device beside the weights, some of which are its own parameters."""
        weights = [parameter for chunk in self.chunks for parameter in chunk.parameters()]
        found = []
        for part in self.optimizer.chained_optimizers:
            for inner in getattr(part.optimizer, "sub_optimizers", [part.optimizer]):  # the offloading one has several
                found += [parameter for group in inner.param_groups for parameter in group["params"]]
                found += [value for state in inner.state.values() for value in state.values()]
        storages = {weight.untyped_storage()._cdata for weight in weights}
        return [
            tensor
            for tensor in found
            if isinstance(tensor, torch.Tensor)
            and tensor.device == weights[0].device
            and tensor.untyped_storage()._cdata not in storages
        ]

    def sharded_state(self, *, is_loading: bool = False) -> dict[str, Any]:
        """Weights, optimizer and schedule as Megatron-Core's sharded state, to be saved or (`is_loading`) filled.

        The optimizer's is in the parameters' own shapes, so that another layout can load it; for that, data-parallel
        rank 0 gathers its shards in main memory when saving. Collective.
        """
        if is_loading:
            _allocate(self.optimizer)
        # By chunk, since each counts its layers from 0. In the checkpoint they are known by their place in the model.
        model = {index: sharded_state(chunk.module) for index, chunk in enumerate(self.chunks)}
        with _compact_index(self.optimizer):
            optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_RESHARDABLE)
        return {"model": model, "optimizer": optimizer, "schedule": self.scheduler.num_steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over a filled `sharded_state`; this object must be as `make_trainable` made it."""
        for index, chunk in enumerate(self.chunks):
            chunk.module.load_state_dict(state["model"][index])
        _load(self.optimizer, state["optimizer"])
        self.scheduler.step(increment=state["schedule"])


def make_trainable(modules: Sequence[torch.nn.Module], config: OptimizerConfig, *, total_steps: int) -> Trainable:
    """Wrap a rank's model chunks (weights loaded) for training. `total_steps`: optimizer steps of the run, for the
    schedule. Raises `RecipeError` for what this machine cannot do."""
    if problems := optimizer_problems(config, min(visible_gpus(), default=None)):
        raise RecipeError(problems)
    model_config = modules[0].config
    ddp_config = DistributedDataParallelConfig(
        overlap_grad_reduce=False,
        use_distributed_optimizer=config.distributed,
        check_for_nan_in_grad=False,  # the norm is checked in `step`, on every rank
        **ddp_arguments(model_config),
    )
    chunks = [DistributedDataParallel(config=model_config, ddp_config=ddp_config, module=module) for module in modules]
    with cuda_type_names():
        optimizer = get_megatron_optimizer(MegatronOptimizerConfig(**_adam_arguments(config, model_config)), chunks)
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
    no_sync = [chunk.no_sync for chunk in chunks]
    model_config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    model_config.finalize_model_grads_func = finalize_model_grads
    model_config.grad_scale_func = optimizer.scale_loss
    return Trainable(chunks, optimizer, scheduler)


def _adam_arguments(config: OptimizerConfig, model_config: Any) -> dict[str, Any]:
    """Fields of Megatron-Core's `OptimizerConfig`, for a model of this `TransformerConfig`.

    Main weights are whole fp32 numbers with moments in bf16 too. Megatron-Core would keep the 16 bits that bf16 weights
    lack, which saves 2 bytes a parameter of the shard, and put them into a checkpoint as if they were the weights
    (distrib_optimizer.py, `get_parameter_state_dp_zero`).
    """
    moments = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.moments]
    return {
        "optimizer": "adam",
        "lr": config.lr,
        "min_lr": config.min_lr,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.beta1,
        "adam_beta2": config.beta2,
        "adam_eps": config.eps,
        "clip_grad": config.clip_grad or _NO_CLIPPING,
        "use_distributed_optimizer": config.distributed,
        # Offloading is made for the precision-aware optimizer: without it all main weights stay on the GPU as well.
        "use_precision_aware_optimizer": config.cpu_offload > 0 or config.moments == "bf16",
        "exp_avg_dtype": moments,
        "exp_avg_sq_dtype": moments,
        "store_param_remainders": False,
        "optimizer_cpu_offload": config.cpu_offload > 0,
        "optimizer_offload_fraction": config.cpu_offload,
        "overlap_cpu_optimizer_d2h_h2d": config.cpu_offload > 0,
    } | optimizer_arguments(model_config)


def _allocate(optimizer: Any) -> None:
    """Give a new optimizer the state that a checkpoint will fill, where Megatron-Core does not do so itself.

    Where TE and Apex are not, it reads `step` (distrib_optimizer.py, `state_dict`) before there is one
    (optimizer/__init__.py, `init_state_fn`).
    """
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            part.optimizer.dummy_step()  # a real step on random gradients: the checkpoint's weights must follow
        elif isinstance(part.optimizer, torch.optim.Adam):
            part.init_state_fn(part.optimizer, part.config)
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
