"""What a step says of itself, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from megatron_apo.learner.diagnostics import LogRatioError, StepRecord, _Totals, diagnose
from megatron_apo.objectives import LossTerm, Stats
from megatron_apo.objectives.base import averaged
from megatron_apo.runtime.topology import Topology


def micro_batch(loss, num, log_prob, denominator, sampler, sequence=None, count=None):
    """By default the last token is a sequence by itself, the others are one or none, and no response is masked."""
    count = num if count is None else count
    term = LossTerm(torch.tensor(loss), count, Stats({"loss": torch.tensor(loss)}))
    tensors = (torch.tensor(values) for values in (log_prob, denominator, sampler))
    sequence = sequence or [0] * (len(log_prob) - 1) + [num - 1]
    return diagnose(term, *tensors, torch.tensor(sequence), num)


# Differences from the sampler: .25 and -.5 in one sequence, 1 in another, and .5 in that of the second micro-batch.
FIRST = (3.0, 2, [-1.0, -2.0, -3.0], [-1.5, -2.0, -2.0], [-1.25, -1.5, -4.0])
SECOND = (1.0, 1, [-0.5], [-0.25], [-1.0])


def two_minibatches():
    record = StepRecord(reinforce_scale=0.2)
    record.add([micro_batch(*FIRST), micro_batch(*SECOND)])
    record.add_step(0.5)
    record.add([micro_batch(5.0, 1, [-4.0], [-1.0], [0.0])])
    record.add_step(0.1)
    return record


RATIOS = [math.exp(-0.25), math.e, math.exp(0.5)]  # of the three sequences

EXPECTED = {
    "loss": 9 / 4,  # over both minibatches and their 4 sequences
    # The first minibatch alone: log-ratios 0.5, 0, -1 and -0.25 over 4 tokens of 3 sequences.
    "kl/per_token": -0.75 / 4,
    "kl/per_sequence": -0.75 / 3,
    "mismatch/max": 1.0,
    "mismatch/mean": 2.25 / 4,
    "mismatch/token_mult_prob_error": (math.exp(0.25) + math.exp(0.5) + math.e + math.exp(0.5)) / 4,
    "mismatch/sequence_ratio_mean": sum(RATIOS) / 3,
    "mismatch/sequence_ratio_max": math.e,
    "mismatch/sequence_ess": sum(RATIOS) ** 2 / (3 * sum(ratio * ratio for ratio in RATIOS)),
    "grad_norm": 0.3,
    "grad_norm_reinforce": 1.5,
    "skipped_steps": 0,
    "masked_steps": 0,
}


def test_stats_of_a_micro_batch():
    stats = micro_batch(*FIRST)
    sums = {name: float(value) for name, value in stats.sums.items()}
    assert sums == pytest.approx(
        {"loss": 3, "count": 2, "tokens": 3, "sequences": 2, "log_ratio": -0.5, "mismatch": 1.75}
        | {"log_prob": -6}
        | {"mult_prob_error": math.exp(0.25) + math.exp(0.5) + math.e, "sequence_ratio": RATIOS[0] + RATIOS[1]}
        | {"sequence_ratio_square": RATIOS[0] ** 2 + RATIOS[1] ** 2}
    )
    maxima = {name: float(value) for name, value in stats.maxima.items()}
    assert maxima == pytest.approx({"log_ratio": 1, "mismatch": 1, "sequence_ratio": math.e})


def test_what_is_far_off_is_still_a_number(one_rank):
    """A sampler 300 nats away, on either side: e^300 is none in fp32."""
    for log_prob, mean, share in ((-1.0, math.exp(20), 1.0), (-601.0, 0.0, math.nan)):
        record = StepRecord(reinforce_scale=1.0)
        record.add([micro_batch(1.0, 1, [log_prob], [-1.0], [-301.0])])
        metrics = record.gather(one_rank).metrics()
        assert metrics["mismatch/mean"] == 300
        assert metrics["mismatch/token_mult_prob_error"] == pytest.approx(math.exp(20))
        assert metrics["mismatch/sequence_ratio_mean"] == metrics["mismatch/sequence_ratio_max"] == pytest.approx(mean)
        assert metrics["mismatch/sequence_ess"] == pytest.approx(share, nan_ok=True)


def test_what_was_gathered_is_not_gathered_again(one_rank):
    """As a step does: the first minibatch before its optimizer step, the others after all of them."""
    record = StepRecord(reinforce_scale=0.2)
    record.add([micro_batch(*FIRST), micro_batch(*SECOND)])
    assert record.gather(one_rank).mismatch == pytest.approx(2.25 / 4)
    record.add_step(0.5)
    record.add([micro_batch(5.0, 1, [-4.0], [-1.0], [0.0])])
    record.add_step(0.1)
    assert record.gather(one_rank).metrics() == pytest.approx(EXPECTED)


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
    assert all(type(value) is float for name, value in record.metrics().items() if not name.endswith("_steps"))
    assert record.first_log_ratio == 1.0  # the largest magnitude, though it is negative


def test_a_norm_is_in_reinforce_units_where_there_is_a_scale(one_rank):
    record = StepRecord(reinforce_scale=None)
    record.add([micro_batch(*FIRST)])
    record.add_step(0.5)
    metrics = record.gather(one_rank).metrics()
    assert metrics["grad_norm"] == 0.5 and "grad_norm_reinforce" not in metrics


def test_a_skipped_step_is_counted_and_in_no_mean(one_rank):
    record = two_minibatches()
    record.add([micro_batch(1.0, 1, [-4.0], [-1.0], [0.0])])
    record.add_step(math.inf)
    metrics = record.gather(one_rank).metrics()
    assert metrics["skipped_steps"] == 1 and metrics["grad_norm"] == pytest.approx(0.3)


def test_a_critics_part_of_a_step(one_rank):
    """Over the tokens of all minibatches: 3 in one of two micro-batches, 1 in the other, 4 in the second minibatch."""

    def stats(loss: float, clipped: list[bool]) -> Stats:
        told = averaged("critic/clipped", torch.tensor(clipped))
        return Stats({"loss": torch.tensor(loss), "count": torch.tensor(float(len(clipped))), **told})

    record = two_minibatches()
    record.add_critic([stats(3.0, [True, False, False]), stats(2.0, [True])], 0.6)
    record.add_critic([stats(1.0, [True, True, True, False])], 0.2)
    record.add_critic([stats(2.0, [False])], math.nan)
    found = {name: value for name, value in record.gather(one_rank).metrics().items() if "critic" in name}
    assert found == pytest.approx(
        {"critic/loss": 8 / 9, "critic/grad_norm": 0.4, "critic/skipped_steps": 1, "critic/clipped": 5 / 9}
    )


def test_a_step_of_masked_responses_alone_has_no_loss_and_all_else(one_rank):
    record = StepRecord(reinforce_scale=0.2)
    record.add([micro_batch(0.0, *others, count=0) for _, *others in (FIRST, SECOND)])
    record.add_step(None)
    metrics = record.gather(one_rank).metrics()
    assert metrics["masked_steps"] == 1 and metrics["skipped_steps"] == 0
    assert {name for name, value in metrics.items() if value != value} == {"loss", "grad_norm", "grad_norm_reinforce"}
    first = {name: value for name, value in EXPECTED.items() if name.startswith(("kl/", "mismatch/"))}
    assert {name: metrics[name] for name in first} == pytest.approx(first)


def test_a_nan_is_not_lost_between_micro_batches(one_rank):
    record = StepRecord(reinforce_scale=1.0)
    bad = micro_batch(1.0, 1, [math.nan], [-1.0], [-1.0])
    record.add([micro_batch(1.0, 1, [-1.0], [-1.0], [-1.0]), bad])
    assert math.isnan(record.gather(one_rank).first_log_ratio) and not record.is_finite


@pytest.mark.parametrize("worst", [1e-6, math.nan])
def test_a_first_log_ratio_is_an_error(worst):
    record = StepRecord(reinforce_scale=0.2)
    record._policy.totals = [_Totals({}, {"log_ratio": worst})]
    with pytest.raises(LogRatioError, match="first_log_ratio_tolerance allows 0"):
        record.require_no_log_ratio(0.0)


def test_no_first_log_ratio_passes():
    record = StepRecord(reinforce_scale=0.2)
    record._policy.totals = [_Totals({}, {"log_ratio": 0.0})]
    record.require_no_log_ratio(0.0)
