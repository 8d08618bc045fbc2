"""The policy under Megatron's DDP, its optimizer and its learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_apo.config import OptimizerConfig
from megatron_apo.model.cpu_compat import cuda_type_names

_NO_CLIPPING = 1e30  # Megatron computes the norm only when it clips


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
        if not updated:
            raise FloatingPointError("the gradient is not finite; the step was not taken")
        self.scheduler.step(increment=1)
        return float(grad_norm)

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]


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
        init_lr=0.0,
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
