"""Padding is in no sum: log-probs, loss and gradients of any layout are those of each sequence alone, unpadded."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_apo.config import ParallelConfig
from megatron_apo.data.batch import MicroBatch, make_micro_batch
from megatron_apo.data.packing import aligned, plan_micro_batches
from megatron_apo.model.build import IGNORE, build_model
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.objectives import APO, Samples
from megatron_apo.parallel.context import context_split
from megatron_apo.parallel.topology import alone
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.stream import load_weights
from tests.models import make_model
from tests.unit.test_context import Group

NUM_VOCAB = 101
OBJECTIVE = APO(beta2=0.05)
SEEDS = st.integers(0, 2**31)
# 4: two context-parallel ranks; 16 and 32: FP8 without and with them; 48: no power of two.
MULTIPLES = st.sampled_from([4, 16, 32, 48])


@pytest.fixture(scope="module", params=["qwen3", "qwen2-tied-one-group", "qwen3_moe"])
def model(request, tmp_path_factory):
    folder = make_model(request.param, tmp_path_factory.mktemp("models"))
    with alone() as topology:
        spec = read_hf_config(folder)
        (model,) = build_model(spec, ParallelConfig(), topology, temperature=0.7)
        load_weights([model], spec, topology, HFReader(folder))
        yield model


def draw_batch(seed: int, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, responses), lengths from 1 to about 60, mostly short."""
    draw = random.Random(seed)

    def tokens(longest: int) -> list[int]:
        return [draw.randrange(NUM_VOCAB) for _ in range(1 + int(longest * draw.random() ** 3))]

    return [tokens(12) for _ in range(count)], [tokens(50) for _ in range(count)]


def run(model: torch.nn.Module, micro_batches: Sequence[MicroBatch], responses: list[list[int]]):
    """(log-probs of each response, sum and count of the loss, gradients by name), over all micro-batches."""
    ids = [str(index) for index in range(len(responses))]
    rewards = torch.tensor([index % 3 - 1.0 for index in range(len(responses))])
    targets = OBJECTIVE.prepare(Samples(ids, rewards, None), dict.fromkeys(ids, 0.5))
    anchor = [[-4.0 + 0.01 * token for token in response] for response in responses]
    model.zero_grad()
    log_probs, total, count = {}, 0.0, 0
    for micro in micro_batches:
        found_BS = model(micro.input_BS, micro.position_BS, None, labels=micro.label_BS, packed_seq_params=micro.layout)
        found_R = found_BS[micro.label_BS != IGNORE]
        term = OBJECTIVE.loss(found_R, micro.gather(anchor), micro.sequence_R, targets.select(micro.indices))
        term.total.backward()
        parts = found_R.detach().split([len(responses[index]) for index in micro.indices])
        log_probs |= dict(zip(micro.indices, parts, strict=True))
        total, count = total + term.total.item(), count + term.count
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return [log_probs[index] for index in range(len(responses))], total, count, gradients


@settings(deadline=None, max_examples=15)
@given(
    seed=SEEDS,
    count=st.integers(1, 9),
    packing=st.booleans(),
    multiple=MULTIPLES,
    room=st.integers(1, 4),
    filled=st.booleans(),
)
def test_padding_changes_no_sum(model, seed, count, packing, multiple, room, filled):
    prompts, responses = draw_batch(seed, count)
    lengths = [len(p) + len(r) - 1 for p, r in zip(prompts, responses, strict=True)]
    budget = room * aligned(max(lengths), multiple)
    (plan,) = plan_micro_batches(lengths, dp=1, budget_tokens=budget, packing=packing, multiple=multiple)
    fill_to = budget + aligned(300, multiple) if packing and filled else 0
    laid_out = [make_micro_batch(indices, prompts, responses, packing, multiple, fill_to) for indices in plan]
    assert not fill_to or {sum(micro.lengths) for micro in laid_out} == {fill_to}
    assert all(length % multiple == 0 for micro in laid_out for length in micro.lengths)
    found, total, num_counted, gradients = run(model, laid_out, responses)
    alone_each = [make_micro_batch([index], prompts, responses, False) for index in range(count)]
    wanted, total_alone, _, gradients_alone = run(model, alone_each, responses)
    assert num_counted == count
    torch.testing.assert_close(torch.cat(found), torch.cat(wanted), rtol=0, atol=1e-5)
    assert total == pytest.approx(total_alone, rel=1e-5)
    # Some are nearly zero, and so rounding alone: a query's where sequences have one token, a hardly used expert's.
    rounding = 1e-8 * torch.stack([gradient.norm() for gradient in gradients_alone.values()]).norm()
    for name, wanted_gradient in gradients_alone.items():
        error = (gradients[name] - wanted_gradient).norm()
        assert error <= 1e-5 * wanted_gradient.norm() + rounding, name


@settings(deadline=None, max_examples=10)
@given(seed=SEEDS, packing=st.booleans(), multiple=MULTIPLES)
def test_what_the_padding_holds_changes_no_bit(model, seed, packing, multiple):
    if model.config.num_moe_experts:
        pytest.skip("experts get their tokens in batches whose sizes, and so rounding, depend on all tokens")
    prompts, responses = draw_batch(seed, 5)
    micro = make_micro_batch(list(range(5)), prompts, responses, packing, multiple)
    found, total, _, gradients = run(model, [micro], responses)
    real = torch.zeros_like(micro.input_BS, dtype=torch.bool).flatten()
    start = 0
    for prompt, response in zip(prompts, responses, strict=True):
        length = len(prompt) + len(response) - 1
        real[start : start + length] = True
        start += aligned(length, multiple) if packing else micro.input_BS.shape[1]
    assert start == len(real)
    noise = torch.randint(NUM_VOCAB, micro.input_BS.shape, generator=torch.Generator().manual_seed(seed))
    micro.input_BS = torch.where(real.view_as(micro.input_BS), micro.input_BS, noise)
    other, other_total, _, other_gradients = run(model, [micro], responses)
    assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True)) and total == other_total
    # The embedding of a token that is only padding gets zeros either way.
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)


@settings(deadline=None)
@given(
    seed=SEEDS,
    count=st.integers(1, 9),
    packing=st.booleans(),
    cp=st.sampled_from([2, 3]),
    times=st.sampled_from([1, 8, 16]),
    filled=st.booleans(),
)
def test_context_parallel_ranks_hold_each_label_once_and_no_padding_at_one(seed, count, packing, cp, times, filled):
    """So that a sum over the ranks' labels is that over each sequence's, in its own order when put together again."""
    prompts, responses = draw_batch(seed, count)
    multiple = 2 * cp * times
    fill_to = 60 * multiple if packing and filled else 0
    micro = make_micro_batch(list(range(count)), prompts, responses, packing, multiple, fill_to)
    lengths = tuple(micro.lengths) if packing else (micro.input_BS.shape[1],)
    splits = [context_split(lengths, Group(rank, cp)) for rank in range(cp)]
    parts = [(split.take(micro.input_BS, 1), split.take(micro.label_BS, 1)) for split in splits]
    assert len({labels_BL.shape for _, labels_BL in parts}) == 1  # equal shares
    labels = sorted(int(label) for _, labels_BL in parts for label in labels_BL[labels_BL != IGNORE])
    assert labels == sorted(token for response in responses for token in response)
    whole = [torch.cat(rank_parts, 1)[:, splits[0].back_T] for rank_parts in zip(*parts, strict=True)]
    inputs_R, labels_R = (values_BS[whole[1] != IGNORE].tolist() for values_BS in whole)
    assert labels_R == [token for response in responses for token in response]
    # What a label is predicted from is the token before it, and no padding.
    before = [([prompt[-1], *response[:-1]]) for prompt, response in zip(prompts, responses, strict=True)]
    assert inputs_R == [token for sequence in before for token in sequence]
