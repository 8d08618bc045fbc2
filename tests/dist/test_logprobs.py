"""Log-probs, entropies and gradients with the vocabulary over real ranks, against one rank with all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from megatron_apo.model import logprobs
from megatron_apo.model.logprobs import vocab_parallel_log_probs
from tests.dist.ranks import forks

H, TEMPERATURE = 8, 0.7
CASES = [(19, 37), (19, 4), (0, 37)]  # (tokens, vocabulary): 3 ranks of 13, 13, 11 rows and of 2, 2, none


def measure(rank: int, world: int, work: Path) -> None:
    """One rank: every case, saved to WORK/rank<k>.pt."""
    dist.init_process_group("gloo", init_method=f"file://{work / 'store'}", rank=rank, world_size=world)
    logprobs.SLAB_ROWS = 5
    found = []
    for num_tokens, vocab in CASES:
        hidden, weight, target, upstream = inputs(num_tokens, vocab)
        shard_rows = -(-vocab // world)
        first_row = rank * shard_rows
        shard = torch.full((shard_rows, H), float("nan"))  # padding that must not be read
        own = weight[first_row : first_row + shard_rows]
        shard[: len(own)] = own
        found.append(run(hidden, shard, target, upstream, first_row, len(own), dist.group.WORLD))
    torch.save(found, work / f"rank{rank}.pt")
    dist.destroy_process_group()


def inputs(num_tokens: int, vocab: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(vocab)
    weight = 2 * torch.randn(vocab, H)
    return torch.randn(num_tokens, H), weight, torch.randint(vocab, (num_tokens,)), torch.randn(num_tokens)


def run(hidden, weight, target, upstream, first_row, num_rows, group) -> dict[str, torch.Tensor]:
    hidden.requires_grad_(), weight.requires_grad_()
    log_prob, entropy, _ = vocab_parallel_log_probs(
        hidden,
        weight,
        target,
        first_row=first_row,
        num_rows=num_rows,
        temperature=TEMPERATURE,
        chunk_tokens=7,
        group=group,
        entropy=True,
    )
    log_prob.backward(upstream)
    return {"log_prob": log_prob.detach(), "entropy": entropy, "hidden": hidden.grad, "weight": weight.grad}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, torch.Tensor]]]:
    work = tmp_path_factory.mktemp("logprobs")
    forks()
    torch.multiprocessing.start_processes(measure, (3, work), nprocs=3, start_method="forkserver")
    return [torch.load(work / f"rank{rank}.pt", weights_only=True) for rank in range(3)]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_ranks_together_are_one(case, ranks):
    hidden, weight, target, upstream = inputs(*CASES[case])
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    log_softmax = (exact[0] @ exact[1].T / TEMPERATURE).log_softmax(-1)
    log_prob = log_softmax.gather(1, target[:, None]).squeeze(1)
    log_prob.backward(upstream.double())
    entropy = torch.distributions.Categorical(logits=log_softmax.detach()).entropy() if len(target) else log_prob
    found = [rank[case] for rank in ranks]
    for mine in found:
        assert all(torch.equal(mine[key], found[0][key]) for key in ("log_prob", "entropy", "hidden"))
    weight_grad = torch.cat([mine["weight"] for mine in found])
    pairs = [
        (found[0]["log_prob"], log_prob),
        (found[0]["entropy"], entropy),
        (found[0]["hidden"], exact[0].grad),
        (weight_grad[: len(weight)], exact[1].grad),
    ]
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.double(), theirs.detach(), rtol=1e-5, atol=5e-6)
    assert not weight_grad[len(weight) :].any()  # the padding's
