"""A token's experts are added up in one order, which a GPU would choose by chance: seen by what torch is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_apo.config import ParallelConfig, TrainConfig
from megatron_apo.model.build import build_model
from megatron_apo.model.precision import Precision
from megatron_apo.parallel.groups import alone
from tests.unit.test_precision import EXPERTS

FOUR = replace(EXPERTS, num_layers=2, num_experts=8, experts_per_token=4)


class Sums(TorchDispatchMode):
    """(operation, whether it is deterministic) of every sum over repeated indices, on a GPU in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("scatter_add", "scatter_add_", "index_add", "index_add_"):
            self.seen.append((name, torch.are_deterministic_algorithms_enabled()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_forward_adds_a_tokens_experts_in_one_order(recompute):
    with alone() as topology:
        train = TrainConfig(recompute=recompute)
        (model,) = build_model(FOUR, ParallelConfig(), topology, Precision("bf16"), train=train)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        tokens_BS = torch.randint(FOUR.vocab_size, (1, 9))
        with Sums() as forward:
            log_prob_BS = model(tokens_BS, torch.arange(9).expand(1, 9), None, labels=tokens_BS)
        assert forward.seen == [("index_add_", True)] * FOUR.num_layers
        log_prob_BS.sum().backward()
    assert not torch.are_deterministic_algorithms_enabled()
