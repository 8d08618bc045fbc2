"""Lets Megatron-Core run on gloo and CPU tensors. Active only where no GPU is.

Megatron-Core 0.16 runs its dense models, schedules, DDP and optimizers on CPU tensors except for a handful of
places that name the device. Each patch below answers one of them, with the upstream file and the text it
answers; `tests/unit/test_cpu_compat.py` fails when that text is gone, which says the patch can go too.
"""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Modules whose own code makes tensors with device="cuda"; their name `torch` becomes a proxy that maps it to the CPU.
# (module, upstream text that makes the patch necessary)
CUDA_LITERALS = (
    ("megatron.core.pipeline_parallel.schedules", 'torch.zeros([], dtype=torch.int, device="cuda")'),
    ("megatron.core.optimizer.clip_grads", "torch.zeros(1, dtype=torch.int, device='cuda')"),
    ("megatron.core.utils", 'torch.tensor([float(l2_reduced)], dtype=torch.float, device="cuda")'),
    ("megatron.core.optimizer.optimizer", "torch.tensor([0], dtype=torch.int, device='cuda')"),
)
# Functions of torch.cuda that are called without asking whether a GPU exists.
CUDA_FUNCTIONS = (
    ("megatron.core.pipeline_parallel.p2p_communication", "device=torch.cuda.current_device()"),
    ("megatron.core.pipeline_parallel.p2p_communication", "torch.cuda.synchronize()"),
    ("megatron.core.models.common.language_module.language_module", "weight.data = weight.data.cuda()"),
)
# Checks of a tensor's type name.
CUDA_TYPE_NAMES = (
    ("megatron.core.optimizer.distrib_optimizer", "model_param.type() == 'torch.cuda.FloatTensor'"),
    ("megatron.core.optimizer.clip_grads", "param.grad.type() == 'torch.cuda.FloatTensor'"),
)


class _TorchOnCPU(types.ModuleType):
    """`torch`, but factory functions called with device="cuda" make CPU tensors."""

    _FACTORIES = ("zeros", "tensor", "empty", "ones", "full")

    def __init__(self) -> None:
        super().__init__("torch")
        for name in self._FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


def install() -> None:
    """Apply the patches for this process; does nothing where a GPU is, and nothing the second time."""
    if torch.cuda.is_available() or getattr(torch.Tensor.cuda, "_on_cpu", False):
        return
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]

    def stay(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor

    stay._on_cpu = True  # type: ignore[attr-defined]
    torch.Tensor.cuda = stay  # type: ignore[method-assign, assignment]
    for name, _ in CUDA_LITERALS:
        importlib.import_module(name).torch = _TorchOnCPU()  # type: ignore[attr-defined]


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """Within: `tensor.type()` of a CPU tensor is spelled as a CUDA one, for the optimizers' type checks."""
    if torch.cuda.is_available():
        yield
        return
    original = torch.Tensor.type

    def spelled(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(tensor, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = spelled  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]
