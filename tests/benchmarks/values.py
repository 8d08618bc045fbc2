"""V* estimators beside the exact V*, adaptive N beside fixed N, and what opening a large store takes.

    python -m tests.benchmarks.values [--prompts 10000000] [--prompts-per-shard 1024] [--dir FOLDER] [--store DIR]

Errors: 0/1 rewards of known success rate p, N samples; bias and RMSE are exact sums over the binomial, beside the first
order in 1/N (`closed form`). beta_smoothed looks at the whole store: its prior is fitted to a simulated one of 200,000
prompts whose success rates come from a profile, U(0,1), Beta(.4,.4) or Beta(.3,1.2). The last table has the RMSE over
the prompts of each profile.

Samples: `more_samples` decides on simulated prompts. Fixed N is interpolated to the RMSE that adaptive N reached; saved
is 1 - mean samples / that N, negative where adaptive N loses. With --store, prompts of a real store (0/1 rewards) are
resampled, their share of right samples taken for their success rate.

Store: random ids, N = 8, written under a temporary folder in FOLDER; opened and estimated by a process of its own, with
the files in the page cache. Peak resident memory is its VmHWM. Targets: 10 s and 2 GiB for 10 million prompts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_apo.config import AdaptiveConfig
from megatron_apo.telemetry.units import data_size
from megatron_apo.values.estimators import ESTIMATORS, binary_value, fit_beta_prior
from megatron_apo.values.fingerprint import Fingerprint
from megatron_apo.values.ids import HASH_BYTES
from megatron_apo.values.samples import SampledRewards
from megatron_apo.values.sampling import more_samples
from megatron_apo.values.shards import SCHEMA, Footer, shard_name, write_table
from megatron_apo.values.store import StoreWriter, VStarStore

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Array]  # success rates of so many prompts

PROFILES: dict[str, Draw] = {
    "U(0,1)": lambda rng, size: rng.random(size),
    "Beta(.4,.4)": lambda rng, size: rng.beta(0.4, 0.4, size),
    "Beta(.3,1.2)": lambda rng, size: rng.beta(0.3, 1.2, size),
}
RATES = (0.02, 0.12, 0.3, 0.5, 0.8, 0.95)
SAMPLES = (4, 8, 16)
BETAS = (0.25, 0.5, 1.0)
STORE_PROMPTS = 200_000
ADAPTIVE_PROMPTS = 100_000
STDERRS = (0.15, 0.1, 0.075)
MOST = 64
OPEN = """
import sys, time
from megatron_apo.values.store import VStarStore
now = lambda: (time.perf_counter(), time.process_time())
start = now()
store = VStarStore.open(sys.argv[1])
opened = now()
values = store.values(0.5, "log_mean_exp")
ended = now()
status = open("/proc/self/status").read()
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(len(values), opened[0] - start[0], ended[0] - opened[0], ended[1] - start[1], peak)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=10_000_000)
    parser.add_argument("--prompts-per-shard", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="where the large store is written for a while")
    parser.add_argument("--store", type=Path, default=None, help="a real V* store to resample")
    parser.add_argument("--only", choices=["errors", "samples", "store"])
    args = parser.parse_args()
    if args.only in (None, "errors"):
        show_errors()
    if args.only in (None, "samples"):
        profiles = PROFILES | ({"resampled store": resampled(args.store)} if args.store else {})
        for name, draw in profiles.items():
            show_samples(name, draw)
    if args.only in (None, "store"):
        with tempfile.TemporaryDirectory(dir=args.dir, prefix="vstar-") as folder:
            show_store(Path(folder), args.prompts, args.prompts_per_shard, args.rounds)


# --- errors of the estimators


def show_errors() -> None:
    names = [name for name in ESTIMATORS if name != "beta_smoothed"] + [f"smoothed {name}" for name in PROFILES]
    right = {(name, n): right_of(name, n) for name in PROFILES for n in SAMPLES}
    for beta1 in BETAS:
        print(f"bias / RMSE of V*, b1 = {beta1:g}")
        print("    p   N  " + "".join(f"{name:>22}" for name in ["closed form", *names]))
        for p in RATES:
            for n in SAMPLES:
                cells = [closed_form(p, n, beta1)]
                cells += [exact_errors(values_of(name, n, beta1, right), p, beta1) for name in names]
                print(f"  {p:.2f} {n:3}  " + "".join(f"{bias:+13.3f} / {rmse:5.3f} " for bias, rmse in cells))
    print("RMSE over the prompts of a profile")
    print(f"{'profile':>14}  b1    N  " + "".join(f"{name:>14}" for name in ESTIMATORS) + "   fitted prior")
    for profile in PROFILES:
        truth_p = rates_of(profile)
        for beta1 in BETAS:
            for n in SAMPLES:
                right_P = right[profile, n]
                cells = []
                for name in ESTIMATORS:
                    own = f"smoothed {profile}" if name == "beta_smoothed" else name
                    errors_P = values_of(own, n, beta1, right)[right_P] - binary_value(truth_p, beta1)
                    cells.append(f"{np.sqrt(np.mean(errors_P**2)):14.3f}")
                a, b = fit_beta_prior(right_P, np.full(len(right_P), n))
                print(f"{profile:>14}  {beta1:<4g}{n:3}  {''.join(cells)}   Beta({a:.2f}, {b:.2f})")


def closed_form(p: float, n: int, beta1: float) -> tuple[float, float]:
    """Bias and RMSE of log_mean_exp to the first order in 1/N."""
    c = np.expm1(1 / beta1)
    spread = c**2 * p * (1 - p) / (n * (1 + p * c) ** 2)
    return -beta1 * spread / 2, float(np.sqrt((beta1 * spread / 2) ** 2 + beta1**2 * spread))


def exact_errors(values: Array, p: float, beta1: float) -> tuple[float, float]:
    """Bias and RMSE of an estimator that says values[k] of k right out of n."""
    errors = values - binary_value(np.array([p]), beta1)
    weights = binomial(len(values) - 1, p)
    return float(weights @ errors), float(np.sqrt(weights @ errors**2))


def binomial(n: int, p: float) -> Array:
    weights = np.ones(1)
    for _ in range(n):
        weights = np.append(weights * (1 - p), 0) + np.append(0, weights * p)
    return weights


def values_of(name: str, n: int, beta1: float, right: dict[tuple[str, int], NDArray[np.int64]]) -> Array:
    """[n + 1] what an estimator says of k right out of n; "smoothed PROFILE" in a store of that profile."""
    if not name.startswith("smoothed "):
        return ESTIMATORS[name](SampledRewards.of_rows(zeros_and_ones(n)), beta1)
    right_P = right[name.removeprefix("smoothed "), n]
    values_P = ESTIMATORS["beta_smoothed"](SampledRewards.of_rows(zeros_and_ones(n)[right_P]), beta1)
    places = np.array([np.flatnonzero(right_P == k)[0] for k in range(n + 1)])
    return values_P[places]


def zeros_and_ones(n: int) -> Array:
    """[n + 1, n] with k ones in row k."""
    return np.tri(n + 1, n, -1)


def rates_of(profile: str) -> Array:
    return PROFILES[profile](np.random.default_rng(0), STORE_PROMPTS)


def right_of(profile: str, n: int) -> NDArray[np.int64]:
    return np.random.default_rng(n).binomial(n, rates_of(profile))


# --- adaptive N


def show_samples(name: str, draw: Draw) -> None:
    """Adaptive N beside fixed N at the same RMSE, b1 = 0.5."""
    rng = np.random.default_rng(1)
    rates_P = draw(rng, ADAPTIVE_PROMPTS)
    truth_P = binary_value(rates_P, 0.5)
    rewards_PM = (rng.random((len(rates_P), MOST)) < rates_P[:, None]).astype(float)
    fixed_n = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, MOST]
    rewards = SampledRewards.of_rows(rewards_PM)
    print(f"samples, {name}: {len(rates_P)} prompts, b1 = 0.5, first round 4, steps of 4, at most {MOST}")
    print("  stderr  all_wrong  mean N   " + "".join(f"{e + ': RMSE, fixed N of it, saved':>46}" for e in SHOWN))
    fixed = {e: [rmse_of(e, rewards.first(n), truth_P) for n in fixed_n] for e in SHOWN}
    for stderr in STDERRS:
        for all_wrong in (0, 16):
            config = AdaptiveConfig(stderr=stderr, beta1=0.5, step=4, most=MOST, all_wrong=all_wrong)
            counts_P = adaptive_counts(rewards_PM, 4, config)
            taken = SampledRewards(rewards_PM[np.arange(MOST) < counts_P[:, None]], counts_P)
            mean = counts_P.mean()
            cells = []
            for estimator in SHOWN:
                rmse = rmse_of(estimator, taken, truth_P)
                # RMSE falls with N, nearly as a power of it.
                equal = np.exp(np.interp(-np.log(rmse), -np.log(fixed[estimator]), np.log(fixed_n)))
                cells.append(f"{rmse:28.4f}{equal:9.2f}{1 - mean / equal:+9.1%}")
            print(f"  {stderr:<8g}{all_wrong:6}{mean:11.2f}   " + "".join(cells))


SHOWN = ("log_mean_exp", "beta_smoothed")


def rmse_of(estimator: str, rewards: SampledRewards, truth_P: Array) -> float:
    return float(np.sqrt(np.mean((ESTIMATORS[estimator](rewards, 0.5) - truth_P) ** 2)))


def adaptive_counts(rewards_PM: Array, first: int, config: AdaptiveConfig) -> NDArray[np.int64]:
    """[P] samples of each prompt, of which `rewards_PM` has as many as may be asked for."""

    @cache  # of 0/1 rewards, only how many are right matters
    def more(right: int, n: int) -> int:
        return more_samples([1.0] * right + [0.0] * (n - right), first, config)

    right_PM = np.concatenate([np.zeros((len(rewards_PM), 1)), rewards_PM.cumsum(axis=1)], axis=1).astype(np.int64)
    counts_P = np.zeros(len(rewards_PM), dtype=np.int64)
    open_ = np.arange(len(rewards_PM))
    while len(open_):
        pairs = zip(right_PM[open_, counts_P[open_]].tolist(), counts_P[open_].tolist(), strict=True)
        asked = np.array([more(right, n) for right, n in pairs])
        counts_P[open_] += asked
        open_ = open_[asked > 0]
    return counts_P


def resampled(folder: Path) -> Draw:
    rewards = VStarStore.open(folder).rewards
    if not rewards.are_binary():
        raise SystemExit(f"--store: {folder} has rewards other than 0 and 1")
    rates_P = rewards.num_right() / rewards.counts_P
    return lambda rng, size: rng.choice(rates_P, size)


# --- a large store


def show_store(folder: Path, num_prompts: int, prompts_per_shard: int, rounds: int) -> None:
    start = time.perf_counter()
    write_large_store(folder, num_prompts, prompts_per_shard)
    written = time.perf_counter()
    size = sum(path.stat().st_size for path in folder.iterdir())
    num_shards = -(-num_prompts // prompts_per_shard)
    print(
        f"store: {num_prompts} prompts x 8 in {num_shards} shards, {data_size(size)}; made in {written - start:.0f} s"
    )
    for _ in range(rounds):
        answer = subprocess.run([sys.executable, "-c", OPEN, str(folder)], check=True, capture_output=True, text=True)
        found, open_s, values_s, cpu_s, peak = answer.stdout.split()
        assert int(found) == num_prompts
        together = float(open_s) + float(values_s)
        print(
            f"  open {float(open_s):.1f} s, log_mean_exp {float(values_s):.1f} s, together {together:.1f} s "
            f"(CPU time {float(cpu_s):.1f} s); peak resident {int(peak) / 2**30:.2f} GiB"
        )


def write_large_store(folder: Path, num_prompts: int, prompts_per_shard: int) -> None:
    """What `StoreWriter` writes, without a Python object for each prompt."""
    fingerprint = Fingerprint(
        model_hash="0" * 64,
        tokenizer_hash="0" * 64,
        template_hash="0" * 64,
        template="chat",
        thinking="none",
        temperature=1.0,
        top_p=1.0,
        top_k=-1,
        max_response_tokens=1024,
        stop_token_ids=[0],
        reward_name="math",
        reward_version="1",
        reward_options={},
        failure_reward=0.0,
        truncated="grade",
        dataset_hash="0" * 64,
        max_prompt_tokens=1024,
        samples_per_prompt=8,
        seed=0,
    )
    rng = np.random.default_rng(0)
    num_shards = -(-num_prompts // prompts_per_shard)
    for index in range(num_shards):
        num_rows = min(prompts_per_shard, num_prompts - index * prompts_per_shard)
        footer = Footer(fingerprint, index, num_shards, 1.0, "none")
        write_table(folder / shard_name(index), random_rows(rng, num_rows, 8), footer)
    StoreWriter(folder, fingerprint, num_shards).finish()


def random_rows(rng: np.random.Generator, num_rows: int, n: int) -> pa.Table:
    """The columns of `StoreRow` for prompts whose success rates are uniform."""
    offsets = pa.array(np.arange(num_rows + 1, dtype=np.int32) * n)
    rewards = (rng.random((num_rows, n)) < rng.random((num_rows, 1))).astype(np.float64)
    reasons = pa.DictionaryArray.from_arrays((rng.random(num_rows * n) < 0.1).astype(np.int32), ["stop", "length"])
    lengths = rng.integers(1, 1025, num_rows * n, dtype=np.int32)

    def hashes() -> pa.Array:
        data = pa.py_buffer(rng.bytes(num_rows * HASH_BYTES))
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(HASH_BYTES), num_rows, [None, data])

    return pa.table(
        {
            "prompt_id": hashes(),
            "text_hash": hashes(),
            "rewards": pa.ListArray.from_arrays(offsets, pa.array(rewards.reshape(-1))),
            "lengths": pa.ListArray.from_arrays(offsets, pa.array(lengths)),
            "finish_reasons": pa.ListArray.from_arrays(offsets, reasons.cast(pa.string())),
            "num_failures": pa.array(np.zeros(num_rows, dtype=np.int32)),
            "num_unfinished": pa.array(np.zeros(num_rows, dtype=np.int32)),
        },
        SCHEMA,
    )


if __name__ == "__main__":
    main()
