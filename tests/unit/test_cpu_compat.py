"""The patches that let Megatron-Core run without a GPU: still needed, complete, and taken back where they say so."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from megatron_apo.model import cpu_compat

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for machines without a GPU")


def source_of(module: str) -> str:
    return Path(importlib.util.find_spec(module).origin).read_text()


@pytest.mark.parametrize(
    ("module", "text"), cpu_compat.CUDA_LITERALS + cpu_compat.CUDA_FUNCTIONS + cpu_compat.CUDA_TYPE_NAMES
)
def test_upstream_still_needs_the_patch(module, text):
    assert text in source_of(module), f"{module} no longer has `{text}`: its entry in cpu_compat.py can go"


@pytest.mark.parametrize("module", [module for module, _ in cpu_compat.CUDA_LITERALS])
def test_every_factory_that_names_the_device_is_patched(module):
    factories = set(re.findall(r"torch\.(\w+)\([^()]*(?:\(.*?\))?[^()]*device=['\"]cuda['\"]", source_of(module)))
    assert factories and factories <= set(cpu_compat._TorchOnCPU._FACTORIES)


@pytest.fixture
def installed(monkeypatch):
    """The patches applied, and taken back after the test."""
    for owner, name in ((torch.cuda, "current_device"), (torch.cuda, "synchronize"), (torch.Tensor, "cuda")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    modules = [importlib.import_module(name) for name, _ in cpu_compat.CUDA_LITERALS]
    for module in modules:
        monkeypatch.setattr(module, "torch", torch)
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
def test_install_does_nothing_the_second_time(installed):
    def state():
        functions = (torch.Tensor.cuda, torch.cuda.current_device, torch.cuda.synchronize)
        return [id(x) for x in (*functions, *(module.torch for module in installed))]

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
