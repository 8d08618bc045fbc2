"""Chunked log-probs and their gradients against log_softmax over all logits in float64."""

from __future__ import annotations

import pytest
import torch

from megatron_apo.model.logprobs import vocab_parallel_log_probs
from tests.largest import Largest

T, H, V = 19, 8, 37


def log_probs(hidden, weight, target, temperature=1.0, chunk=7):
    return vocab_parallel_log_probs(
        hidden, weight, target, first_row=0, temperature=temperature, chunk_tokens=chunk, group=None
    )


def exactly(hidden, weight, target, temperature=1.0):
    logits = hidden.double() @ weight.double().T / temperature
    return logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1)


def inputs(seed=0, num_tokens=T, hidden=H, vocab=V):
    torch.manual_seed(seed)
    return torch.randn(num_tokens, hidden), torch.randn(vocab, hidden), torch.randint(vocab, (num_tokens,))


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("chunk", [1, 7, T, 1000])
def test_values_and_gradients(chunk, temperature):
    hidden, weight, target = inputs()
    upstream = torch.randn(T)
    ours = [x.clone().requires_grad_() for x in (hidden, weight)]
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    found, wanted = log_probs(*ours, target, temperature, chunk), exactly(*exact, target, temperature)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=2e-6)
    found.backward(upstream)
    wanted.backward(upstream.double())
    for mine, theirs in zip(ours, exact, strict=True):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=2e-6 * scale)


def test_gradients_by_finite_differences():
    hidden, weight, target = inputs(1)
    hidden.requires_grad_()
    upstream, direction = torch.randn(T), torch.randn(T, H)
    log_probs(hidden, weight, target).backward(upstream)
    step = 1e-5
    ends = [exactly(hidden.detach().double() + sign * step * direction, weight, target) for sign in (1, -1)]
    slope = float((ends[0] - ends[1]) @ upstream.double()) / (2 * step)
    assert float((hidden.grad * direction).sum()) == pytest.approx(slope, rel=1e-5)


def test_logits_of_a_thousand():
    # Integer logits, exact in fp32: -1000, 990, 999, 1000, and a target that is hopeless, good or nearly certain.
    weight = torch.tensor([[-1000.0], [990.0], [999.0], [1000.0]], requires_grad=True)
    hidden = torch.tensor([[1.0], [1.0], [1.0], [-1.0]], requires_grad=True)
    target = torch.tensor([0, 2, 3, 0])
    found = log_probs(hidden, weight, target)
    wanted = exactly(hidden, weight, target)
    torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-6, atol=1e-6)
    found.sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exactly(*exact, target).sum().backward()
    torch.testing.assert_close(hidden.grad.double(), exact[0].grad, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(weight.grad.double(), exact[1].grad, rtol=1e-5, atol=1e-5)


def test_bf16_weights_give_fp32_log_probs_of_the_bf16_logits():
    hidden, weight, target = inputs(2)
    half = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
    found = log_probs(*half, target)
    logits = (half[0] @ half[1].T).detach().double()
    wanted = logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.detach().double(), wanted, rtol=1e-6, atol=1e-6)
    found.sum().backward()
    exact = [x.detach().double().requires_grad_() for x in half]
    exactly(*exact, target).sum().backward()
    for mine, theirs in zip(half, exact, strict=True):
        assert mine.grad.dtype == torch.bfloat16
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=0.02 * float(theirs.grad.abs().max()))


def test_no_tensor_of_tokens_by_vocabulary():
    hidden, weight, target = inputs(3, num_tokens=512, hidden=4, vocab=700)
    hidden.requires_grad_(), weight.requires_grad_()
    with Largest() as naive:
        (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None]).sum().backward()
    assert naive.num_elements == 512 * 700
    with Largest() as forward:
        found = log_probs(hidden, weight, target, temperature=0.5, chunk=8)
    with Largest() as backward:
        found.sum().backward()
    # A chunk's logits are the largest: weights and hidden states have 2800 and 2048 elements.
    assert forward.num_elements == backward.num_elements == 8 * 700
