"""What a V* store holds, and in what two stores differ, as numbers; `telemetry/vstar_*.py` shows them.

Shapes: P prompts of a store, C prompts that two stores have in common, R of a block. No Python object per prompt is
made, and what is not rewards or ids is read shard by shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from megatron_apo.values.estimators import ESTIMATORS
from megatron_apo.values.fingerprint import Fingerprint, StoreError
from megatron_apo.values.ids import BLOCK_ROWS, RowsById, hex_of_ids
from megatron_apo.values.samples import Array, SampledRewards, SamplesPerPrompt
from megatron_apo.values.shards import open_shard, shard_name
from megatron_apo.values.store import NO_VALUE, VStarStore

FILTERS = ("all_wrong", "all_right", "both")
_MOST_VALUES = 65  # bars where no more values occur: all of 64 samples of 0 or 1
_NUM_BINS = 40  # else
_NUM_LISTED = 10  # prompts named in a comparison


@dataclass(frozen=True)
class Mean:
    """A mean over prompts. stderr: its standard error; None of a single prompt."""

    mean: float
    stderr: float | None
    num_prompts: int


@dataclass(frozen=True)
class Bars:
    """A histogram: `counts` of what lies around each of `at`, which ascend."""

    at: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Values:
    """V* of the prompts at one b1; p10 to p90 are values that occur."""

    beta1: float
    mean: float
    smallest: float
    p10: float
    p50: float
    p90: float
    largest: float
    bars: Bars


@dataclass(frozen=True)
class LeftOut:
    """What a filter of `vstar.filter` leaves out. share: of the prompts."""

    prompts: int
    share: float


@dataclass(frozen=True)
class Responses:
    """Response lengths, in tokens, of all samples stored, and how responses ended.

    truncated: share that was cut at the length cap. num_unfinished: never closed their thinking. num_failures: given
    the failure reward because the grader failed.
    """

    count: int
    mean_tokens: float
    p50: int
    p90: int
    p99: int
    longest: int
    bars: Bars
    truncated: float
    num_unfinished: int
    num_failures: int


@dataclass(frozen=True)
class Summary:
    """What a store holds.

    samples: drawn. first_round: samples that each prompt has whatever they were (the most of them that are not masked),
    which `reward` and Pass@k up to it are of. binary: every reward is 0 or 1. right: share of right samples of each
    prompt. pass_at_k: by k. without_value: prompts without V*, all of whose samples are masked; what is of prompts is
    of the others. hours: of devices.
    """

    folder: str
    prompts: int
    shards: int
    samples: SamplesPerPrompt
    first_round: int
    reward: Mean
    binary: bool
    pass_at_k: dict[int, Mean]
    right: Bars
    estimator: str
    values: list[Values]
    left_out: dict[str, LeftOut]
    without_value: int
    responses: Responses
    hours: dict[str, float]
    fingerprint: dict[str, Any]


@dataclass(frozen=True)
class EstimatorsAt:
    """The estimators beside each other at one b1.

    mean_reward: of prompts grouped by it. curves: for each estimator, the groups' mean V*. means: of all prompts.
    """

    beta1: float
    mean_reward: list[float]
    curves: dict[str, list[float]]
    means: dict[str, float]


@dataclass(frozen=True)
class ValueDifference:
    """V* of the prompts in common at one b1. correlation: None where a store has the same V* everywhere."""

    beta1: float
    mean_absolute: float
    largest: float
    correlation: float | None


@dataclass(frozen=True)
class PromptDifference:
    """One prompt in two stores. num_rewards: samples that differ. mean_rewards: None where all samples are masked.
    difference: of V*, the largest over the b1s."""

    prompt_id: str
    num_rewards: int
    mean_rewards: tuple[float | None, float | None]
    difference: float


@dataclass(frozen=True)
class Comparison:
    """In what two stores differ; pairs are (one, other).

    same_rewards: both hold the same rewards for the same prompts.
    fingerprint: fields that differ, and settings that the stores were made with, with both values. num_only, only:
    prompts of one store alone, and the first ids.
    num_common: prompts of both, which all that follows is of. num_changed: prompts of which any sample has another
    reward, or is in one store alone; num_rewards: how many such samples. responses: all of each store's. most: the
    prompts whose V* differs most.
    """

    folders: tuple[str, str]
    same_rewards: bool
    fingerprint: dict[str, tuple[Any, Any]]
    num_common: int
    num_only: tuple[int, int]
    only: tuple[list[str], list[str]]
    num_changed: int
    num_rewards: int
    reward: tuple[Mean, Mean] | None
    responses: tuple[Responses, Responses] | None
    estimator: str
    values: list[ValueDifference]
    most: list[PromptDifference]


def summarize(store: VStarStore, beta1s: Sequence[float], estimator: str) -> Summary:
    """What `store` holds, its V* by `estimator` at each of `beta1s`. Raises `StoreError` if there are no prompts, or
    none with a V*."""
    if not len(store):
        raise StoreError(f"{store.folder}: holds no prompts; run estimate-vstar with data.train that has some")
    rewards, first, has_value_P = store.rewards, _first_samples(store), ~store.without_value()
    if not first.counts_P.any():
        raise StoreError(
            f"{store.folder}: nothing is known of any prompt's first samples: {NO_VALUE}; raise "
            "sampling.max_response_tokens, with another vstar.dir"
        )
    left_out = {name: int(store.left_out(name).sum()) for name in FILTERS}
    return Summary(
        folder=str(store.folder),
        prompts=len(store),
        shards=store.num_shards,
        samples=store.drawn.samples,
        first_round=int(first.counts_P.max()),
        reward=_mean(_known(_means(first))),
        binary=rewards.are_binary(),
        pass_at_k=pass_at_k(store.drawn, store.fingerprint.samples_per_prompt),
        right=_bars(rewards.num_right()[has_value_P] / rewards.counts_P[has_value_P]),
        estimator=estimator,
        values=[_values(beta1, _known(ESTIMATORS[estimator](rewards, beta1))) for beta1 in beta1s],
        left_out={name: LeftOut(count, count / len(store)) for name, count in left_out.items()},
        without_value=int(store.without_value().sum()),
        responses=_responses(store),
        hours={device or "unknown device": hours for device, hours in store.hours().items()},
        fingerprint=_provenance(store),
    )


def pass_at_k(drawn: SampledRewards, first_round: int) -> dict[int, Mean]:
    """By k: the mean over prompts of 1 - C(n-c, k) / C(n, k), for c of n samples right (2107.03374, equation 1).

    Right: a reward of at least 1. Further rounds stop by what they found, and with that n the estimator would not be
    unbiased. So up to `first_round` it is of that many samples of every prompt (that has k which are not masked), and
    from there on of all samples of the prompts that have k: those that were uncertain, not a sample of the prompts.
    """
    found, rewards = _pass_at_k(drawn.first(first_round).known()), drawn.known()
    if rewards.counts_P.max() > max(found):
        found = _pass_at_k(rewards) | found
    return dict(sorted(found.items()))


def _pass_at_k(rewards: SampledRewards) -> dict[int, Mean]:
    base = int(rewards.counts_P.max()) + 1
    pairs, weights = np.unique(rewards.counts_P * base + rewards.num_right(), return_counts=True)
    n, c = np.divmod(pairs, base)
    found = {}
    wrong = np.ones(len(n))  # C(n-c, k) / C(n, k) is the product over i < k of (n-c-i) / (n-i)
    for k in range(1, base):
        enough = n >= k
        n, c, wrong, weights = n[enough], c[enough], wrong[enough], weights[enough]
        wrong = wrong * np.maximum(n - c - k + 1, 0) / (n - k + 1)
        found[k] = _mean(1 - wrong, weights)
    return found


def compare_estimators(store: VStarStore, beta1s: Sequence[float]) -> list[EstimatorsAt]:
    """Every estimator at each of `beta1s`; without beta_smoothed where rewards are not 0 and 1."""
    rewards = store.rewards
    has_value_P = ~store.without_value()
    names = [name for name in ESTIMATORS if name != "beta_smoothed" or rewards.are_binary()]
    at, group_P = _groups(_means(rewards)[has_value_P])
    sizes = np.bincount(group_P, minlength=len(at))
    filled = sizes > 0
    found = []
    for beta1 in beta1s:
        curves, means = {}, {}
        for name in names:
            values_P = ESTIMATORS[name](rewards, beta1)[has_value_P]
            curves[name] = (np.bincount(group_P, values_P, len(at))[filled] / sizes[filled]).tolist()
            means[name] = float(values_P.mean())
        found.append(EstimatorsAt(beta1, at[filled].tolist(), curves, means))
    return found


def compare(one: VStarStore, other: VStarStore, beta1s: Sequence[float], estimator: str) -> Comparison:
    """In what `other` differs from `one`, V* by `estimator` at each of `beta1s`."""
    row_in_other_P = RowsById(other.ids).find(one.ids)
    rows_C = np.flatnonzero(row_in_other_P >= 0)
    other_rows_C = row_in_other_P[rows_C]
    only = np.flatnonzero(row_in_other_P < 0), np.setdiff1d(np.arange(len(other)), other_rows_C, assume_unique=True)
    changed_C = _num_changed(one.drawn, rows_C, other.drawn, other_rows_C)
    values, difference_C = [], np.zeros(len(rows_C))
    in_both_C = ~(one.without_value()[rows_C] | other.without_value()[other_rows_C])
    if in_both_C.any():
        for beta1 in beta1s:
            pair = (
                ESTIMATORS[estimator](one.rewards, beta1)[rows_C][in_both_C],
                ESTIMATORS[estimator](other.rewards, beta1)[other_rows_C][in_both_C],
            )
            absolute_C = np.abs(pair[0] - pair[1])
            difference_C[in_both_C] = np.maximum(difference_C[in_both_C], absolute_C)
            both_vary = all(float(np.ptp(values_C)) > 0 for values_C in pair)
            correlation = float(np.corrcoef(*pair)[0, 1]) if both_vary else None
            values.append(ValueDifference(beta1, float(absolute_C.mean()), float(absolute_C.max()), correlation))
    means = (_means(one.rewards), _means(other.rewards))
    largest = _largest(difference_C, changed_C)
    most = [
        PromptDifference(
            prompt_id=prompt_id,
            num_rewards=int(changed_C[place]),
            mean_rewards=(_or_none(means[0][rows_C[place]]), _or_none(means[1][other_rows_C[place]])),
            difference=float(difference_C[place]),
        )
        for prompt_id, place in zip(hex_of_ids(one.ids[rows_C[largest]]), largest, strict=True)
    ]
    return Comparison(
        folders=(str(one.folder), str(other.folder)),
        same_rewards=not (changed_C.any() or len(only[0]) or len(only[1])),
        fingerprint={
            name: (mine, theirs)
            for name in [*Fingerprint.model_fields, *sorted(one.settings.keys() | other.settings.keys())]
            if (mine := _provenance(one).get(name)) != (theirs := _provenance(other).get(name))
        },
        num_common=len(rows_C),
        num_only=(len(only[0]), len(only[1])),
        only=(hex_of_ids(one.ids[only[0][:_NUM_LISTED]]), hex_of_ids(other.ids[only[1][:_NUM_LISTED]])),
        num_changed=int((changed_C > 0).sum()),
        num_rewards=int(changed_C.sum()),
        reward=(_first_round(one, rows_C), _first_round(other, other_rows_C)) if in_both_C.any() else None,
        responses=(_responses(one), _responses(other)) if len(one) and len(other) else None,
        estimator=estimator,
        values=values,
        most=most,
    )


# ---- one store


def _provenance(store: VStarStore) -> dict[str, Any]:
    return store.fingerprint.model_dump(mode="json") | store.settings


def _means(rewards: SampledRewards) -> Array:
    """[P] mean reward of each prompt; NaN where all samples are masked."""
    return rewards.per_prompt(lambda rewards_RN: rewards_RN.mean(axis=1))


def _first_samples(store: VStarStore) -> SampledRewards:
    """The first round's: what was drawn of every prompt, whatever it was."""
    return store.drawn.first(store.fingerprint.samples_per_prompt).known()


def _first_round(store: VStarStore, rows: NDArray[np.intp]) -> Mean:
    return _mean(_known(_means(_first_samples(store))[rows]))


def _known(values: Array) -> Array:
    """Without those of prompts that have none."""
    return values[~np.isnan(values)]


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _mean(values: Array, weights: NDArray[np.int64] | None = None) -> Mean:
    """Of `values`, each of which occurs `weights` times (once)."""
    num = len(values) if weights is None else int(weights.sum())
    mean = float(np.average(values, weights=weights))
    if num < 2:
        return Mean(mean, None, num)
    variance = float(np.average(np.square(values - mean), weights=weights)) * num / (num - 1)
    return Mean(mean, (variance / num) ** 0.5, num)


def _values(beta1: float, values_P: Array) -> Values:
    levels = [0, 0.1, 0.5, 0.9, 1]
    smallest, p10, p50, p90, largest = np.quantile(values_P, levels, method="inverted_cdf").tolist()
    return Values(beta1, float(values_P.mean()), smallest, p10, p50, p90, largest, _bars(values_P))


def _responses(store: VStarStore) -> Responses:
    counts = np.zeros(1, dtype=np.int64)  # of responses, by length
    per_prompt = ("num_unfinished", "num_failures")
    totals = dict.fromkeys(("length", *per_prompt), 0)
    for index in range(store.num_shards):
        table = open_shard(store.folder / shard_name(index)).read(["lengths", "finish_reasons", *per_prompt])
        lengths = _flat(table["lengths"]).to_numpy()
        found = np.bincount(lengths, minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
        totals["length"] += pc.sum(pc.equal(_flat(table["finish_reasons"]), "length")).as_py() or 0
        for name in per_prompt:
            totals[name] += pc.sum(table[name]).as_py() or 0
    tokens = np.flatnonzero(counts)
    reached = np.cumsum(counts[tokens])
    num = int(reached[-1])
    p50, p90, p99 = (int(tokens[np.searchsorted(reached, level * num)]) for level in (0.5, 0.9, 0.99))
    return Responses(
        count=num,
        mean_tokens=float(np.average(tokens, weights=counts[tokens])),
        p50=p50,
        p90=p90,
        p99=p99,
        longest=int(tokens[-1]),
        bars=_length_bars(tokens, counts[tokens]),
        truncated=totals["length"] / num,
        num_unfinished=totals["num_unfinished"],
        num_failures=totals["num_failures"],
    )


def _flat(column: pa.ChunkedArray) -> pa.Array:
    """All samples of a column of lists."""
    return column.combine_chunks().flatten()


def _bars(values: Array) -> Bars:
    at, group = _groups(values)
    return Bars(at.tolist(), np.bincount(group, minlength=len(at)).tolist())


def _groups(values: Array) -> tuple[Array, NDArray[np.intp]]:
    """(centres, [len(values)] which of them): each value that occurs where they are few, else equal bins."""
    step = float(np.abs(values).max()) * 2**-30 or 1.0  # equal values differ by rounding errors: their rewards' order
    values = np.rint(values / step) * step
    if len(np.unique(values[:BLOCK_ROWS])) <= _MOST_VALUES and len(distinct := np.unique(values)) <= _MOST_VALUES:
        return distinct, np.searchsorted(distinct, values)
    edges = np.linspace(values.min(), values.max(), _NUM_BINS + 1)
    return (edges[:-1] + edges[1:]) / 2, np.searchsorted(edges[1:-1], values, side="right")


def _length_bars(tokens: NDArray[np.int64], counts: NDArray[np.int64]) -> Bars:
    """Bins of equally many lengths each, so that none stands out because it holds one more."""
    first = int(tokens[0])
    width = -(-(int(tokens[-1]) - first + 1) // _NUM_BINS)
    found = np.bincount((tokens - first) // width, weights=counts)
    at = first + (width - 1) / 2 + width * np.arange(len(found))
    return Bars(at.tolist(), found.astype(np.int64).tolist())


# ---- two stores


def _num_changed(
    rewards: SampledRewards, rows_C: NDArray[np.intp], other: SampledRewards, other_rows_C: NDArray[np.intp]
) -> NDArray[np.int64]:
    """[C] samples whose rewards differ, or that one of the two has alone."""
    changed_C = np.zeros(len(rows_C), dtype=np.int64)
    starts_P, other_starts_P = (np.cumsum(side.counts_P) - side.counts_P for side in (rewards, other))
    for start in range(0, len(rows_C), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        rows, other_rows = rows_C[block], other_rows_C[block]
        width = max(rewards.counts_P[rows].max(), other.counts_P[other_rows].max())
        mine_RN = _padded(rewards.flat, starts_P[rows], rewards.counts_P[rows], width)
        theirs_RN = _padded(other.flat, other_starts_P[other_rows], other.counts_P[other_rows], width)
        neither_RN = np.isnan(mine_RN) & np.isnan(theirs_RN)
        changed_C[block] = ((mine_RN != theirs_RN) & ~neither_RN).sum(axis=1)
    return changed_C


def _padded(flat: Array, starts_R: NDArray[np.int64], counts_R: NDArray[np.int64], width: int) -> Array:
    """[R, width] samples of some prompts, NaN where a prompt has no more."""
    sample = np.arange(width)
    place_RN = np.minimum(starts_R[:, None] + sample, len(flat) - 1)
    return np.where(sample < counts_R[:, None], flat[place_RN], np.nan)


def _largest(difference_C: Array, changed_C: NDArray[np.int64]) -> NDArray[np.intp]:
    """Places of the prompts that differ most: by V*, then by how many rewards differ, then in stored order."""
    differ = np.flatnonzero((difference_C > 0) | (changed_C > 0))
    if len(differ) > _NUM_LISTED:
        least = np.partition(difference_C[differ], -_NUM_LISTED)[-_NUM_LISTED]
        differ = differ[difference_C[differ] >= least]
    return differ[np.lexsort((differ, -changed_C[differ], -difference_C[differ]))][:_NUM_LISTED]
