"""The patches that let Megatron-Core run without a GPU: still needed, complete, and taken back where they say so."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe import moe_utils, token_dispatcher

from megatron_apo.model import cpu_compat

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for machines without a GPU")


def source_of(module: str) -> str:
    return Path(importlib.util.find_spec(module).origin).read_text()


@pytest.mark.parametrize(
    ("module", "text"),
    cpu_compat.CUDA_LITERALS
    + cpu_compat.CUDA_FUNCTIONS
    + cpu_compat.CUDA_STREAMS
    + cpu_compat.CUDA_RANDOM_STATE
    + cpu_compat.CUDA_TYPE_NAMES
    + cpu_compat.MISSING_NAMES,
)
def test_upstream_still_needs_the_patch(module, text):
    assert text in source_of(module), f"{module} no longer has `{text}`: its entry in cpu_compat.py can go"


@pytest.mark.parametrize("module", [module for module, _ in cpu_compat.CUDA_LITERALS])
def test_every_factory_that_names_the_device_is_patched(module):
    answered = r"(?:device=['\"]cuda['\"]|pin_memory=True)"
    factories = set(re.findall(r"torch\.(\w+)\([^()]*(?:\(.*?\))?[^()]*" + answered, source_of(module)))
    assert factories and factories <= set(cpu_compat._TorchOnCPU._FACTORIES)


@pytest.fixture
def installed(monkeypatch):
    """The patches applied, and taken back after the test."""
    for owner, name in ((torch.cuda, "current_device"), (torch.cuda, "synchronize"), (torch.Tensor, "cuda")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    modules = [importlib.import_module(name) for name, _ in cpu_compat.CUDA_LITERALS]
    for module in [*modules, token_dispatcher]:
        monkeypatch.setattr(module, "torch", torch)
    monkeypatch.setattr(token_dispatcher, "maybe_move_tensor_to_cpu", moe_utils.maybe_move_tensor_to_cpu)
    for name in ("_get_cuda_rng_state", "_set_cuda_rng_state"):
        monkeypatch.setattr(random, name, getattr(random, name))
    monkeypatch.setattr(random.CudaRNGStatesTracker, "add", random.CudaRNGStatesTracker.add)
    monkeypatch.delattr(torch.Tensor.cuda, "_on_cpu", raising=False)
    cpu_compat.install()
    return modules


@without_gpu
def test_install_keeps_everything_on_the_cpu(installed):
    for module in installed:
        for made in (
            module.torch.zeros([2], dtype=torch.int, device="cuda"),
            module.torch.tensor([1.5], dtype=torch.float, device=torch.device("cuda")),
            module.torch.full((2,), 7.0, device="cuda:0"),
        ):
            assert made.device.type == "cpu"
        assert module.torch.tensor([1.5], device="cuda").tolist() == [1.5]
        assert module.torch.zeros(2, device="meta").device.type == "meta"
        assert module.torch.Tensor is torch.Tensor and module.torch.float32 is torch.float32
    tensor = torch.ones(2)
    assert tensor.cuda() is tensor
    torch.cuda.synchronize()
    assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"
    with pytest.raises((RuntimeError, AssertionError)):  # other code still hears that there is no GPU
        torch.zeros(1, device="cuda")


@without_gpu
def test_a_dispatcher_of_experts_has_its_counts(installed):
    """What `MoEAlltoAllTokenDispatcher` does with its stream: move the counts, remember when, wait for them."""
    cuda = token_dispatcher.torch.cuda
    stream = cuda.Stream()
    assert cuda.current_stream() == stream  # so that nothing has to wait for another one
    counts = torch.tensor([2, 0, 3])
    with cuda.stream(stream):
        moved = token_dispatcher.maybe_move_tensor_to_cpu(counts, as_numpy=True, record_stream=False)
        kept = token_dispatcher.maybe_move_tensor_to_cpu(counts)
    stream.record_event().synchronize()
    assert isinstance(moved, numpy.ndarray) and moved.tolist() == [2, 0, 3]  # gloo refuses a tensor as sizes
    assert kept is counts
    assert token_dispatcher.maybe_move_tensor_to_cpu(None, as_numpy=True) is None
    assert cuda.is_available is torch.cuda.is_available and token_dispatcher.torch.Tensor is torch.Tensor


@without_gpu
def test_activations_are_computed_again(installed):
    calls, x = [], torch.tensor([3.0], requires_grad=True)

    def square(x):
        calls.append(torch.is_grad_enabled())
        return x * x

    random.checkpoint(square, False, x).backward()
    assert calls == [False, True] and x.grad.item() == 6


def test_a_router_without_transformer_engine_has_the_name_it_asks_for(installed):
    assert moe_utils.HAVE_TE or moe_utils.te_general_gemm is None


@without_gpu
def test_install_does_nothing_the_second_time(installed):
    def state():
        functions = (torch.Tensor.cuda, torch.cuda.current_device, torch.cuda.synchronize)
        return [id(x) for x in (*functions, *(module.torch for module in [*installed, token_dispatcher]))]

    before = state()
    cpu_compat.install()
    assert state() == before


@without_gpu
def test_type_names_are_cudas_within_and_their_own_after():
    original, tensor = torch.Tensor.type, torch.ones(2)
    with cpu_compat.cuda_type_names():
        assert tensor.type() == "torch.cuda.FloatTensor"
        assert tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert tensor.type(torch.float64).dtype == torch.float64  # as a cast it is left alone
    assert torch.Tensor.type is original and tensor.type() == "torch.FloatTensor"
    with pytest.raises(KeyError), cpu_compat.cuda_type_names():
        raise KeyError
    assert torch.Tensor.type is original
