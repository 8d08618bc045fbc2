"""A prompt's value from its own past: Kernelized Advantage Estimation (arXiv 2604.28005).

Of response g to a prompt in iteration i, with rewards Z_k of its group and Z_j of the prompt's earlier iterations I_j:

           sum_j K((i - I_j) / (i h)) Z_j + K(0) sum_{k != g} Z_k
    V^ =  ---------------------------------------------------------      iterations from 1
           sum_j K((i - I_j) / (i h))     + K(0) (G - 1)

    triangular     K(u) = max(0, 1 - u)
    exponential    K(u) = exp(-u)

The bandwidth h is a share of the training so far: the policy changes less and less, so the past that is still true
grows. An infinite one gives the running mean. Under the triangular kernel with h at 1/2 or below, a prompt that comes
at the same place of every epoch has in its second nothing left of its first.

A prompt's past is looked at only when its turn comes, and then costs the same however long it is:

- Triangular. Weights are linear in I_j within the window i - I_j < i h, whose lower edge i (1 - h) only moves forward.
  So sums of Z and of I Z over a queue are enough. Nothing is subtracted when a visit leaves it (sums would drift): the
  queue is two stacks that hold sums of their suffixes and prefixes, where a visit is added at most once to each. Kept
  are the visits in the window.
- Exponential. Weights change with i as exp(I_j / (i h)), so no single sum can be carried on (it can if h is a number of
  iterations, which would be another estimate). But with x_j = I_j / i and m = 1/h

      exp(-m (1 - x_j)) = sum_k p_k x_j^k,    p_k = exp(-m) m^k / k!    (Poisson's: positive, and 1 in all)

  and each moment sum_j x_j^k Z_j follows i exactly, times (i/i')^k. After the k where p_k is below rounding it ends:
  every weight is right to that relative error, the smallest too, since x_j <= 1. 21 moments for h = 1, 50 for 0.1.

Shapes: B responses of a step, P groups of them, M moments.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_apo.telemetry.units import one_line
from megatron_apo.values.baselines import Baseline, StepRewards, ratio
from megatron_apo.values.samples import Array

KernelName = Literal["triangular", "exponential"]
FORMAT = 1
_METADATA = b"megatron_apo.baseline"
_SCHEMA = pa.schema(
    {
        "prompt_id": pa.string(),
        # Triangular: of each visit in the window. Exponential: the last iteration, and the moments at it.
        "iteration": pa.list_(pa.int64()),
        "total": pa.list_(pa.float64()),
        "weight": pa.list_(pa.float64()),
        "num_turned": pa.int32(),  # see `TriangularPast`
    }
)
_EDGE = 1e-12  # a smaller weight is that of a visit at the window's edge, by rounding
_SMALLEST = {"triangular": 0.0, "exponential": 0.01}  # bandwidths; 100 / h moments are too many below
_NEGLIGIBLE = 1e-18  # share of a weight that further moments would add


class Sums(NamedTuple):
    """Of one visit to a prompt, or of several in a row: sums of rewards and of their number, and `ramp_`: the same with
    each visit times the iterations since the first."""

    first: int
    total: float
    weight: float
    ramp_total: float = 0.0
    ramp_weight: float = 0.0


def _joined(earlier: Sums | None, later: Sums | None) -> Sums:
    """Of visits and of those after them, one side of which may be empty. Of positive numbers it only ever adds."""
    if earlier is None or later is None:
        found = earlier or later
        assert found
        return found
    gap = later.first - earlier.first
    return Sums(
        earlier.first,
        earlier.total + later.total,
        earlier.weight + later.weight,
        earlier.ramp_total + (later.ramp_total + gap * later.total),
        earlier.ramp_weight + (later.ramp_weight + gap * later.weight),
    )


class PastState(NamedTuple):
    """A prompt's past as a row of the file."""

    iteration: list[int]
    total: list[float]
    weight: list[float]
    num_turned: int


class TriangularPast:
    """A prompt's visits in the window.

    The earliest `num_turned` have been turned into sums of each and all that follow of these; of the later ones there
    is one sum. When the turned ones have all left the window, the later ones are turned.
    """

    def __init__(self, bandwidth: float, state: PastState | None = None):
        self._bandwidth = bandwidth
        self._visits: deque[Sums] = deque()
        self._suffixes: list[Sums] = []  # of the turned visits, the earliest last
        self._recent: Sums | None = None
        for place, visit in enumerate(zip(*state[:3], strict=True) if state else ()):
            self.add(*visit)
            if state and place + 1 == state.num_turned:
                self._turn()

    def add(self, iteration: int, total: float, weight: float) -> None:
        visit = Sums(iteration, total, weight)
        self._visits.append(visit)
        self._recent = _joined(self._recent, visit)

    def weighted(self, now: int) -> tuple[float, float]:
        """(sum of weights times rewards, sum of weights) at iteration `now`; what is out of the window is forgotten."""
        width = now * self._bandwidth
        while self._visits and 1 - (now - self._visits[0].first) / width < _EDGE:
            if not self._suffixes:
                self._turn()
            self._suffixes.pop()
            self._visits.popleft()
        if not self._visits:
            return 0.0, 0.0
        past = _joined(self._suffixes[-1] if self._suffixes else None, self._recent)
        least = 1 - (now - past.first) / width  # the earliest visit's weight; each iteration after it adds 1 / width
        return least * past.total + past.ramp_total / width, least * past.weight + past.ramp_weight / width

    def _turn(self) -> None:
        for visit in reversed(self._visits):
            self._suffixes.append(_joined(visit, self._suffixes[-1] if self._suffixes else None))
        self._recent = None

    def state(self) -> PastState:
        columns = zip(*(visit[:3] for visit in self._visits), strict=True) if self._visits else ([], [], [])
        iteration, total, weight = map(list, columns)
        return PastState(iteration, total, weight, len(self._suffixes))


class ExponentialPast:
    """Moments of a prompt's visits, as of the last one."""

    def __init__(self, poisson_M: Array, state: PastState | None = None):
        self._poisson_M, self._order_M = poisson_M, np.arange(len(poisson_M))
        self._last = state.iteration[0] if state else 1
        # of rewards, and of their number
        self._moments_2M = np.array(state[1:3]) if state else np.zeros((2, len(poisson_M)))

    def add(self, iteration: int, total: float, weight: float) -> None:
        self._moments_2M *= self._shrunk(iteration)
        self._moments_2M += np.array([[total], [weight]])  # x = 1
        self._last = iteration

    def weighted(self, now: int) -> tuple[float, float]:
        """(sum of weights times rewards, sum of weights) at iteration `now`."""
        total, weight = (self._moments_2M * (self._poisson_M * self._shrunk(now))).sum(axis=1).tolist()
        return total, weight

    def _shrunk(self, now: int) -> Array:
        return np.asarray((self._last / now) ** self._order_M)

    def state(self) -> PastState:
        total, weight = self._moments_2M.tolist()
        return PastState([self._last], total, weight, 0)


def poisson(mean: float) -> Array:
    """[M] probabilities of 0, 1, .. as long as they are not negligible."""
    terms = [math.exp(-mean)]
    while len(terms) <= mean or terms[-1] > _NEGLIGIBLE:
        terms.append(terms[-1] * mean / len(terms))
    return np.array(terms)


class KernelSmoothed(Baseline):
    """bandwidth: h, above 0 (exponential: at least 0.01), or infinite. Steps come in order: `values` and
    `update` raise `ValueError` for one that has been taken, or that is before one asked for."""

    has_state: ClassVar[bool] = True

    def __init__(self, kernel: KernelName, bandwidth: float):
        super().__init__()
        if not bandwidth > 0 or bandwidth < _SMALLEST[kernel]:
            least = f"at least {_SMALLEST[kernel]:g}" if _SMALLEST[kernel] else "above 0"
            raise ValueError(f"a bandwidth of {bandwidth:g} is not {least}, as the {kernel} kernel needs it")
        self._kernel, self._bandwidth = kernel, float(bandwidth)
        self._poisson_M = poisson(1 / bandwidth if kernel == "exponential" else 0.0)
        self._past: dict[str, TriangularPast | ExponentialPast] = {}
        self._next_step = 0

    def _values(self, batch: StepRewards) -> Array:
        self._proceed(batch.step)
        now, past = batch.step + 1, self._past
        pairs = [past[one].weighted(now) if one in past else (0.0, 0.0) for one in batch.prompts_P]
        total_P, weight_P = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
        others_B, num_others_B = batch.others()
        return ratio(total_P[batch.group_B] + others_B, weight_P[batch.group_B] + num_others_B)

    def _update(self, batch: StepRewards) -> None:
        self._proceed(batch.step)
        sums: dict[str, list[float]] = {}
        for prompt_id, total, num in zip(batch.prompts_P, *(part.tolist() for part in batch.totals), strict=True):
            so_far = sums.setdefault(prompt_id, [0.0, 0.0])  # it may have several groups
            so_far[0], so_far[1] = so_far[0] + total, so_far[1] + num
        for prompt_id, (total, weight) in sums.items():
            if weight:
                past = self._past.get(prompt_id) or self._past.setdefault(prompt_id, self._new_past())
                past.add(batch.step + 1, total, weight)
        self._next_step = batch.step + 1

    def _proceed(self, step: int) -> None:
        if step < self._next_step:
            raise ValueError(f"step {step} of a baseline that is at step {self._next_step}; steps come in order")
        self._next_step = step

    def _new_past(self, state: PastState | None = None) -> TriangularPast | ExponentialPast:
        if self._kernel == "triangular":
            return TriangularPast(self._bandwidth, state)
        return ExponentialPast(self._poisson_M, state)

    # ---- the state as a file, a row a prompt

    def write(self, path: Path) -> None:
        known = {"format": FORMAT, "kernel": self._kernel, "bandwidth": self._bandwidth, "next_step": self._next_step}
        rows = [past.state() for past in self._past.values()]
        columns = {name: [row[place] for row in rows] for place, name in enumerate(PastState._fields)}
        schema = _SCHEMA.with_metadata({_METADATA: json.dumps(known)})
        table = pa.table({"prompt_id": list(self._past), **columns}, schema=schema)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        pq.write_table(table, partial, compression="zstd", use_dictionary=False, write_page_checksum=True)
        os.replace(partial, path)

    def read(self, path: Path, next_step: int) -> None:
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                known = json.loads((file.schema_arrow.metadata or {}).get(_METADATA, b"{}"))
                table = file.read() if known.get("format") == FORMAT and file.schema_arrow.equals(_SCHEMA) else None
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; the kernel baseline's past was not saved with the run") from None
        except (pa.ArrowException, OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: the file is damaged ({one_line(error)})") from None
        if table is None:
            raise ValueError(f"{path}: not a baseline's state of format {FORMAT}")
        ours = {"kernel": self._kernel, "bandwidth": self._bandwidth, "next_step": next_step}
        for name, value in ours.items():
            if known.get(name) != value:
                raise ValueError(f"{path}: {name} {known.get(name)!r}, where this run has {value!r}")
        columns = {name: table[name].to_pylist() for name in table.column_names}
        ids = columns.pop("prompt_id")
        states = [PastState(*row) for row in zip(*columns.values(), strict=True)]
        if len(set(ids)) < len(ids) or None in ids or not all(self._is_sound(state, next_step) for state in states):
            raise ValueError(f"{path}: the file is damaged (what it says of a prompt's past cannot be)")
        self._past = {one: self._new_past(state) for one, state in zip(ids, states, strict=True)}
        self._next_step = next_step

    def _is_sound(self, state: PastState, next_step: int) -> bool:
        if any(part is None for part in state):
            return False
        numbers: Iterable[Any] = [*state.iteration, *state.total, *state.weight]
        if any(number is None or not math.isfinite(number) for number in numbers):
            return False
        iterations, lengths = state.iteration, (len(state.iteration), len(state.total), len(state.weight))
        wanted = (1, *[len(self._poisson_M)] * 2) if self._kernel == "exponential" else (len(iterations),) * 3
        in_order = all(a < b for a, b in zip([0, *iterations], [*iterations, next_step + 1], strict=True))
        return lengths == wanted and in_order and 0 <= state.num_turned <= len(iterations)
