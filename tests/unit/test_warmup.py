"""A warm start whose gradient is not finite stops, in one line."""

from __future__ import annotations

import pytest
import torch

from megatron_apo.config import OptimizerConfig, ParallelConfig, build_recipe
from megatron_apo.data.sft import Examples
from megatron_apo.learner.optim import make_trainable
from megatron_apo.learner.step import GradientError
from megatron_apo.model.build import build_model
from megatron_apo.parallel.groups import alone
from megatron_apo.stages import warmup
from tests.unit.test_precision import SPEC


def test_a_gradient_that_is_not_finite_stops_the_warm_start() -> None:
    settings = ["model.path=m", "data.train=t", "vstar.dir=v", "warmup.sequences_per_step=2"]
    examples = Examples([[5, 6], [7]], [[8, 1], [9, 1]])
    with alone() as topology:
        chunks = build_model(SPEC, ParallelConfig(), topology)
        for parameter in chunks[0].parameters():  # drawn by nobody yet
            torch.nn.init.constant_(parameter, 0.1)
        trainable = make_trainable(chunks, OptimizerConfig(), total_steps=2)
        warmup._step(build_recipe({}, settings), topology, trainable, examples, 0)
        with torch.no_grad():
            next(trainable.chunks[0].parameters()).fill_(float("nan"))
        with pytest.raises(
            GradientError, match="warm start, step 2: the gradient's norm is nan; use a lower warmup.lr"
        ):
            warmup._step(build_recipe({}, settings), topology, trainable, examples, 1)
