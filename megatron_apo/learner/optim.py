"""A model under Megatron's DDP, its optimizer and its learning-rate schedule: the policy, or a critic beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_apo.config import OptimizerConfig, RecipeError
from megatron_apo.learner import optimizer_state
from megatron_apo.model.cpu_compat import cuda_type_names
from megatron_apo.model.placement import HostCopy, drop_quantized
from megatron_apo.model.precision import ddp_arguments, optimizer_arguments, optimizer_problems
from megatron_apo.runtime.gpus import visible_gpus
from megatron_apo.weights.torch_dist import sharded_state


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

    @torch.no_grad()
    def step(self) -> float:
        """Update the weights; returns the gradient's norm over all ranks, before clipping.

        A norm that is not finite, which every rank then has, leaves weights, moments and schedule as they were.
        Megatron-Core's own step would update first and tell afterwards (optimizer.py, `ChainedOptimizer.step`).
        """
        with cuda_type_names():
            overflow = self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.get_grad_norm())
            if overflow or not math.isfinite(grad_norm):
                return math.inf if math.isfinite(grad_norm) else grad_norm
            self._clip(grad_norm)
            self.optimizer.step_with_ready_grads()
        self.scheduler.step(increment=1)
        return grad_norm

    def _clip(self, grad_norm: float) -> None:
        """Scale the gradients to the largest norm allowed."""
        for part in self.optimizer.chained_optimizers:
            if getattr(part, "is_stub_optimizer", False):  # this rank has no parameter of its kind
                continue
            if part.config.clip_grad > 0 and (parameters := part.get_parameters()):
                clip_grad_by_total_norm_fp32(
                    parameters,
                    max_norm=part.config.clip_grad,
                    total_norm=grad_norm,
                    use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
                )

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    @contextmanager
    def offloaded(self, wanted: bool = True) -> Iterator[None]:
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

    def sharded_state(self, *, prefix: str = "", is_loading: bool = False) -> dict[str, Any]:
        """Weights, optimizer and schedule as Megatron-Core's sharded state, to be saved or (`is_loading`) filled.
        Collective.

        prefix: of all tensors' keys in the checkpoint, which tells them from another model's.
        """
        model = self._sharded_model()
        optimizer = optimizer_state.sharded(self.optimizer, model, is_loading=is_loading)
        state = {"model": model, "optimizer": optimizer, "schedule": self.scheduler.num_steps}
        add_prefix_for_sharding(state, prefix)
        return state

    def load_state(self, state: dict[str, Any], folder: Path, *, prefix: str = "") -> None:
        """Take over a `sharded_state` filled from the checkpoint `folder`, and the rest of the optimizer from there.

        This object must be as `make_trainable` made it. Raises `CheckpointError`, on the ranks concerned.
        """
        for index, chunk in enumerate(self.chunks):
            chunk.module.load_state_dict(state["model"][index])
        optimizer_state.load(self.optimizer, state["optimizer"], self._sharded_model(), folder, prefix=prefix)
        self.scheduler.step(increment=state["schedule"])

    def _sharded_model(self) -> dict[int, dict[str, Any]]:
        """By chunk, since each counts its layers from 0. In a checkpoint they are known by their place in the model."""
        return {index: sharded_state(chunk.module) for index, chunk in enumerate(self.chunks)}


def make_trainable(modules: Sequence[torch.nn.Module], config: OptimizerConfig, *, total_steps: int) -> Trainable:
    """Wrap a rank's model chunks (weights loaded) for training. `total_steps`: optimizer steps of the run, for the
    schedule. Raises `RecipeError` for what this machine cannot do."""
    if problems := optimizer_problems(config, min(visible_gpus(), default=None)):
        raise RecipeError(problems)
    model_config = modules[0].config
    ddp_config = DistributedDataParallelConfig(
        overlap_grad_reduce=False,
        use_distributed_optimizer=config.distributed,
        check_for_nan_in_grad=False,  # `step` looks at the norm, on every rank
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
        "clip_grad": config.clip_grad,
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
