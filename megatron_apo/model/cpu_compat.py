"""Lets Megatron-Core run on gloo and CPU tensors. Active only where no GPU is.

Megatron-Core 0.16 runs its models, schedules, DDP and optimizers on CPU tensors except for a handful of places that
name the device. Each patch below answers one of them, with the upstream file and the text it
answers; `tests/unit/test_cpu_compat.py` fails when that text is gone, which says the patch can go too.
"""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Modules whose own code makes tensors with device="cuda" or in pinned memory; their name `torch` becomes a proxy that
# maps them to the CPU's.
# (module, upstream text that makes the patch necessary)
CUDA_LITERALS = (
    ("megatron.core.pipeline_parallel.schedules", 'torch.zeros([], dtype=torch.int, device="cuda")'),
    ("megatron.core.optimizer.clip_grads", "torch.zeros(1, dtype=torch.int, device='cuda')"),
    ("megatron.core.utils", 'torch.tensor([float(l2_reduced)], dtype=torch.float, device="cuda")'),
    ("megatron.core.optimizer.optimizer", "torch.tensor([0], dtype=torch.int, device='cuda')"),
    ("megatron.core.models.common.embeddings.rope_utils", 'device="cpu", pin_memory=True'),
)
# Functions of torch.cuda that are called without asking whether a GPU exists.
CUDA_FUNCTIONS = (
    ("megatron.core.pipeline_parallel.p2p_communication", "device=torch.cuda.current_device()"),
    ("megatron.core.pipeline_parallel.p2p_communication", "torch.cuda.synchronize()"),
    ("megatron.core.models.common.language_module.language_module", "weight.data = weight.data.cuda()"),
    ("megatron.core.models.common.embeddings.rotary_pos_embedding", "inv_freq.to(device=torch.cuda.current_device())"),
    ("megatron.core.transformer.moe.router", "weight.data.to(device=torch.cuda.current_device())"),
    ("megatron.core.tensor_parallel.mappings", "device=torch.cuda.current_device()"),
)
# Streams that carry a mixture's token counts to the CPU, where these are already; and the one place that makes them
# arrays, as gloo's all-to-all needs them, only if they come from a GPU.
CUDA_STREAMS = (
    ("megatron.core.transformer.moe.token_dispatcher", "cuda_dtoh_stream = torch.cuda.Stream()"),
    ("megatron.core.transformer.moe.token_dispatcher", "torch.cuda.current_stream() != self.cuda_dtoh_stream"),
    ("megatron.core.transformer.moe.token_dispatcher", "with torch.cuda.stream(self.cuda_dtoh_stream)"),
    ("megatron.core.transformer.moe.moe_utils", "if torch.is_tensor(tensor) and tensor.is_cuda:"),
)
# The GPU's random state, which recomputation puts back and sequence parallelism has copies of.
CUDA_RANDOM_STATE = (
    ("megatron.core.tensor_parallel.random", "orig_rng_state = torch.cuda.get_rng_state()"),
    ("megatron.core.tensor_parallel.random", "return torch.cuda.random.get_rng_state(device=device)"),
    ("megatron.core.tensor_parallel.random", "_lazy_call(cb)"),
)
# Names that are imported with Transformer Engine and asked for without it, on a GPU as well.
MISSING_NAMES = (
    ("megatron.core.transformer.moe.moe_utils", "te_general_gemm is not None and router_dtype != torch.float64"),
)
# Checks of a tensor's type name.
CUDA_TYPE_NAMES = (
    ("megatron.core.optimizer.distrib_optimizer", "model_param.type() == 'torch.cuda.FloatTensor'"),
    ("megatron.core.optimizer.clip_grads", "param.grad.type() == 'torch.cuda.FloatTensor'"),
)


class _TorchOnCPU(types.ModuleType):
    """`torch`, but factory functions make plain CPU tensors, whatever device="cuda" or pin_memory they are given."""

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
        kwargs.pop("pin_memory", None)  # memory is pinned for a GPU
        return factory(*args, **kwargs)

    return make


class _Stream:
    """A CUDA stream where there is none: whatever it is given is done."""

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        pass


class _OneStream(types.ModuleType):
    """`torch.cuda` with one stream, which is always the current one."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        stream = _Stream()
        self.Stream = self.current_stream = lambda: stream
        self.stream = contextlib.nullcontext

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


def _to_array(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron-Core's `maybe_move_tensor_to_cpu` for a tensor that is there."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _add_no_state(tracker: Any, name: str, seed: int) -> None:
    """Megatron-Core's `CudaRNGStatesTracker.add` where the state has no bytes."""
    tracker.set_states({**tracker.get_states(), name: torch.empty(0, dtype=torch.uint8)})


def install() -> None:
    """Apply the patches for this process; does nothing the second time, and where a GPU is only names the missing."""
    for name, _ in MISSING_NAMES:
        vars(importlib.import_module(name)).setdefault("te_general_gemm", None)
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
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.torch = _TorchOnCPU()
    dispatcher.torch.cuda = _OneStream()
    dispatcher.maybe_move_tensor_to_cpu = _to_array
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.empty(0, dtype=torch.uint8)
    random._set_cuda_rng_state = lambda *args, **kwargs: None
    random.CudaRNGStatesTracker.add = _add_no_state


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
