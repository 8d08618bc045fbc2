"""Tiled log-probs, their gradients and entropies against log_softmax over all logits in float64."""

from __future__ import annotations

import pytest
import torch

from megatron_apo.model import logprobs
from megatron_apo.model.logprobs import vocab_parallel_log_probs
from tests.largest import Largest

T, H, V = 19, 8, 37


@pytest.fixture(autouse=True)
def several_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "SLAB_ROWS", 10)


def log_probs(hidden, weight, target, temperature=1.0, chunk=7, **options):
    log_prob, entropy, _ = vocab_parallel_log_probs(
        hidden, weight, target, first_row=0, temperature=temperature, chunk_tokens=chunk, group=None, **options
    )
    return log_prob if entropy is None else (log_prob, entropy)


def exactly(hidden, weight, target, temperature=1.0):
    logits = hidden.double() @ weight.double().T / temperature
    return logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1)


def inputs(seed=0, num_tokens=T, hidden=H, vocab=V):
    torch.manual_seed(seed)
    return torch.randn(num_tokens, hidden), torch.randn(vocab, hidden), torch.randint(vocab, (num_tokens,))


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("chunk", [1, 7, T, 1000])
@pytest.mark.parametrize("slab", [1, 10, V, 1000])
def test_values_and_gradients(slab, chunk, temperature, monkeypatch):
    monkeypatch.setattr(logprobs, "SLAB_ROWS", slab)
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


@pytest.mark.parametrize("slab", [1, 10])
def test_logits_of_a_thousand(slab, monkeypatch):
    # Integer logits, exact in fp32: -1000, 990, 999, 1000, and a target that is hopeless, good or nearly certain.
    # Tiles of one row meet each maximum in turn, upwards and downwards.
    monkeypatch.setattr(logprobs, "SLAB_ROWS", slab)
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


def test_bf16_logits_and_sums_are_fp32():
    hidden, weight, target = inputs(2)
    half = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in half]
    found, wanted = log_probs(*half, target), exactly(*exact, target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=2e-6)
    found.sum().backward()
    wanted.sum().backward()
    for mine, theirs in zip(half, exact, strict=True):
        # One rounding, of the whole sum: half a unit of bf16's eight bits.
        torch.testing.assert_close(mine.grad.double(), theirs.grad.bfloat16().double(), rtol=2**-7, atol=2e-6)
        assert float((mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()) < 2**-9


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_entropy_is_that_of_the_distribution(temperature):
    hidden, weight, target = inputs(3)
    weight[:, 0] *= 60  # near-certain tokens among the uncertain ones
    hidden.requires_grad_(), weight.requires_grad_()
    with_entropy, entropy = log_probs(hidden, weight, target, temperature, entropy=True)
    logits = hidden.detach().double() @ weight.detach().double().T / temperature
    wanted = torch.distributions.Categorical(logits=logits).entropy()
    assert float(wanted.min()) < 0.01 and float(wanted.max()) > 0.5
    assert not entropy.requires_grad
    torch.testing.assert_close(entropy.double(), wanted, rtol=1e-5, atol=2e-5)
    without = log_probs(hidden, weight, target, temperature)
    assert torch.equal(with_entropy, without)
    gradients = [torch.autograd.grad(x.square().sum(), (hidden, weight)) for x in (with_entropy, without)]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_raw_logits_and_their_gradients_are_before_the_temperature(temperature):
    hidden, weight, target = inputs(5)
    ours = [x.clone().requires_grad_() for x in (hidden, weight)]
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    log_prob, _, logit = vocab_parallel_log_probs(
        *ours, target, first_row=0, temperature=temperature, chunk_tokens=7, group=None, logit=True
    )
    logits = exact[0] @ exact[1].T
    wanted = logits.gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(logit.double(), wanted, rtol=1e-5, atol=2e-6)
    of_log_prob, of_logit = torch.randn(2, T)
    (of_log_prob @ log_prob + of_logit @ logit).backward()
    (of_log_prob.double() @ exactly(*exact, target, temperature) + of_logit.double() @ wanted).backward()
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=2e-6 * float(theirs.grad.abs().max()))


def test_padding_is_neither_read_nor_moved():
    hidden, weight, target = inputs(4)
    padded = torch.cat([weight, torch.full((3, H), float("nan"))]).requires_grad_()
    weight.requires_grad_()
    found, wanted = log_probs(hidden, padded, target, num_rows=V), log_probs(hidden, weight, target)
    assert torch.equal(found, wanted)
    found.sum().backward()
    wanted.sum().backward()
    assert torch.equal(padded.grad[:V], weight.grad)
    assert not padded.grad[V:].any()


@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16])
def test_main_grad_gets_the_gradient_and_autograd_none(main_dtype):
    hidden, weight, target = inputs(5)
    weight = torch.nn.Parameter(weight.bfloat16())
    weight.main_grad = torch.full_like(weight, 3, dtype=main_dtype)  # an earlier micro-batch's
    hidden = hidden.bfloat16()
    exact = weight.detach().double().requires_grad_()
    exactly(hidden, exact, target).sum().backward()
    embedded = weight[:4].sum()  # a tied embedding's gradient, which autograd does get
    (log_probs(hidden, weight, target).sum() + embedded).backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight).index_fill_(0, torch.arange(4), 1))
    atol = 1e-5 if main_dtype == torch.float32 else 0.04
    torch.testing.assert_close(weight.main_grad.double(), 3 + exact.grad, rtol=0, atol=atol)


def test_frozen_weights_and_no_tokens():
    hidden, weight, target = inputs(6)
    hidden.requires_grad_()
    log_probs(hidden, weight, target).sum().backward()
    assert weight.grad is None and hidden.grad.abs().sum() > 0
    weight.requires_grad_()
    found, entropy = log_probs(hidden[:0], weight, target[:0], entropy=True)
    assert found.shape == entropy.shape == (0,)
    found.sum().backward()
    assert not weight.grad.any()


@pytest.mark.parametrize("entropy", [False, True])
def test_no_tensor_of_tokens_by_vocabulary(entropy, monkeypatch):
    monkeypatch.setattr(logprobs, "SLAB_ROWS", 100)
    hidden, weight, target = inputs(7, num_tokens=512, hidden=4, vocab=700)
    hidden.requires_grad_(), weight.requires_grad_()
    with Largest() as naive:
        (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None]).sum().backward()
    assert naive.num_elements == 512 * 700
    with Largest() as forward:
        found = log_probs(hidden, weight, target, temperature=0.5, chunk=32, entropy=entropy)
    with Largest() as backward:
        (found[0] if entropy else found).sum().backward()
    # A tile's logits are the largest: weights and hidden states have 2800 and 2048 elements.
    assert forward.num_elements == backward.num_elements == 32 * 100
