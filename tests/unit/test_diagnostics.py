"""What a step says of itself, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from megatron_apo.learner.diagnostics import LogRatioError, StepRecord, _Totals, diagnose
from megatron_apo.objectives import LossTerm, Stats
from megatron_apo.runtime.topology import Topology


def micro_batch(loss, count, log_prob, denominator, sampler):
    term = LossTerm(torch.tensor(loss), count, Stats({"loss": torch.tensor(loss)}))
    return diagnose(term, torch.tensor(log_prob), torch.tensor(denominator), torch.tensor(sampler))


def two_minibatches():
    record = StepRecord(reinforce_scale=0.2)
    record.add(
        [
            micro_batch(3.0, 2, [-1.0, -2.0, -3.0], [-1.5, -2.0, -2.0], [-1.25, -2.0, -3.0]),
            micro_batch(1.0, 1, [-0.5], [-0.25], [-1.0]),
        ],
        grad_norm=0.5,
    )
    record.add([micro_batch(5.0, 1, [-4.0], [-1.0], [0.0])], grad_norm=0.1)
    return record


EXPECTED = {
    "loss": 9 / 4,  # over both minibatches and their 4 sequences
    # The first minibatch alone: log-ratios 0.5, 0, -1 and -0.25 over 4 tokens of 3 sequences.
    "kl/per_token": -0.75 / 4,
    "kl/per_sequence": -0.75 / 3,
    "mismatch/max": 0.5,
    "mismatch/mean": 0.75 / 4,  # 0.25, 0, 0 and 0.5
    "grad_norm": 0.3,
    "grad_norm_reinforce": 1.5,
    "skipped_steps": 0,
}


def test_stats_of_a_micro_batch():
    stats = micro_batch(3.0, 2, [-1.0, -2.0, -3.0], [-1.5, -2.0, -2.0], [-1.25, -2.0, -3.0])
    sums = {name: float(value) for name, value in stats.sums.items()}
    assert sums == {"loss": 3, "count": 2, "tokens": 3, "log_ratio": -0.5, "mismatch": 0.25}
    assert {name: float(value) for name, value in stats.maxima.items()} == {"log_ratio": 1, "mismatch": 0.25}


@pytest.fixture
def one_rank(tmp_path):
    """The topology of a job of one rank, on a real gloo group."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    group = dist.group.WORLD
    try:
        yield Topology(0, 1, 0, 0, 0, 1, 1, 1, group, group, group, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def test_metrics_of_a_step(one_rank):
    record = two_minibatches().gather(one_rank)
    assert record.metrics() == pytest.approx(EXPECTED)
    assert all(type(value) is float for name, value in record.metrics().items() if name != "skipped_steps")
    assert record.first_log_ratio == 1.0  # the largest magnitude, though it is negative


def test_a_skipped_step_is_counted_and_in_no_mean(one_rank):
    record = two_minibatches()
    record.add([micro_batch(1.0, 1, [-4.0], [-1.0], [0.0])], grad_norm=math.inf)
    metrics = record.gather(one_rank).metrics()
    assert metrics["skipped_steps"] == 1 and metrics["grad_norm"] == pytest.approx(0.3)


def test_a_nan_is_not_lost_between_micro_batches(one_rank):
    record = StepRecord(reinforce_scale=1.0)
    bad = micro_batch(1.0, 1, [math.nan], [-1.0], [-1.0])
    record.add([micro_batch(1.0, 1, [-1.0], [-1.0], [-1.0]), bad], grad_norm=1.0)
    assert math.isnan(record.gather(one_rank).first_log_ratio)


@pytest.mark.parametrize("worst", [1e-6, math.nan])
def test_a_first_log_ratio_is_an_error(worst):
    record = StepRecord(reinforce_scale=0.2)
    record._gathered = [_Totals({}, {"log_ratio": worst})]
    with pytest.raises(LogRatioError, match="first_log_ratio_tolerance allows 0"):
        record.require_no_log_ratio(0.0)


def test_no_first_log_ratio_passes():
    record = StepRecord(reinforce_scale=0.2)
    record._gathered = [_Totals({}, {"log_ratio": 0.0})]
    record.require_no_log_ratio(0.0)
