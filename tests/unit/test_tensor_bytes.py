"""Bytes of tensors on toys that are counted by hand, and by torch's allocator; and that what is missed is noticed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.benchmarks.memory import Miscounted, check_allocator, pass_with_gradient
from tests.tensor_bytes import REST, TensorBytes, allocator_peak


def test_a_storage_is_counted_once_until_its_last_tensor_goes() -> None:
    with TensorBytes() as counter:
        whole = torch.zeros(10, 10)
        assert counter.now.total == 400
        row, same, flat = whole[0], whole.detach(), whole.view(-1)
        row.add_(1)
        whole.t().mul_(2)
        assert counter.now.total == 400  # views, and work in place
        copy = whole.clone()
        assert counter.now.total == 800
        del whole, row, same
        assert counter.now.total == 800  # `flat` is the same storage
        del flat
        assert counter.now.total == 400
        del copy
    assert counter.now.parts == {} and counter.peak.total == 800


def test_what_is_freed_after_the_count_is_noticed() -> None:
    with TensorBytes() as counter:
        one = torch.zeros(3)
    other = torch.zeros(5)  # nobody looks
    assert counter.now.total == 12
    del one, other
    assert counter.now.total == 0


def test_what_was_there_before_is_counted_when_it_is_used() -> None:
    before, array = torch.ones(10), torch.from_numpy(np.ones(20, dtype=np.float64))
    with TensorBytes() as counter:
        assert counter.now.total == 0
        float(before.sum() + array.sum())
        assert counter.now.total == 40 + 160
        counter.label("given", [before])
        assert counter.now.parts == {"given": 40, REST: 160}


def test_a_storage_may_grow() -> None:
    with TensorBytes() as counter:
        tensor = torch.zeros(2)
        tensor.resize_(50)
        assert counter.now.total == 200
        tensor.untyped_storage().resize_(40)  # by no operation
        assert counter.now.total == 200
        tensor.resize_(5)
        assert counter.now.total == 40


def test_what_autograd_keeps_is_counted_until_the_backward_pass() -> None:
    """exp keeps what it gives, and sin what it takes, which is the same; the sum is a number."""
    with TensorBytes() as counter:
        weight = torch.zeros(100, requires_grad=True)
        counter.label("weight", [weight])
        with counter.within(pass_with_gradient):
            total = weight.exp().sin().sum()
            assert counter.now.parts == {"weight": 400, "activations": 400 + 4}
            total.backward()
        assert weight.grad is not None and counter.part_of(weight.grad) == "backward"
        assert counter.now.parts == {"weight": 400, "activations": 4, "backward": 400}
        del total
        weight.grad = None
        assert counter.now.parts == {"weight": 400}


def test_the_peak_is_an_instant_and_each_part_has_its_own() -> None:
    with TensorBytes() as counter:
        with counter.within("first"):
            first = torch.zeros(100)
        with counter.within("second"):
            second = torch.zeros(10)
        del first
        with counter.within("second"):
            third = torch.zeros(50)
        assert counter.peak.parts == {"first": 400, "second": 40} and counter.now.parts == {"second": 240}
        assert dict(counter.most) == {"first": 400, "second": 240}
        del third
        counter.restart()
        assert counter.peak.parts == {"second": 40} == dict(counter.most)
        counter.label("moved", [second])
        assert counter.now.parts == {"moved": 40} and counter.peak.total == 40
        del second
        assert counter.now.parts == {}


def one_step(model: torch.nn.Module, input_TH: torch.Tensor) -> None:
    model(input_TH).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.1 * parameter.grad)
            parameter.grad = None


class Blind(TensorBytes):
    """Does not see what has 96 columns."""

    def _see(self, tensor: torch.Tensor):
        return None if tensor.shape[-1:] == (96,) else super()._see(tensor)


@pytest.mark.parametrize("kind", [TensorBytes, Blind])
def test_the_allocator_agrees_to_the_byte_unless_storages_are_missed(kind: type[TensorBytes]) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 96), torch.nn.GELU(), torch.nn.Linear(96, 32, bias=False))
    input_TH = torch.randn(500, 32)
    with kind() as counter:
        one_step(model, input_TH)
        start = counter.now.total
        counter.restart()
        with allocator_peak() as given_out:
            one_step(model, input_TH)
        counted = counter.peak.total - start
    assert given_out[1] == 0 == counter.now.total - start
    if kind is TensorBytes:
        assert counted == given_out[0]
        check_allocator(counted, given_out[0], counter.peak.total)
    else:  # what the first layer gave, and what GELU did
        assert given_out[0] - counted >= 2 * 500 * 96 * 4
        with pytest.raises(Miscounted, match=f"{counted:,} bytes above the start were counted"):
            check_allocator(counted, given_out[0], counter.peak.total)
