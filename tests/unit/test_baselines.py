"""Baselines against their formulas: by hand, summed up from the whole history, and by what they do to a gradient."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_apo.values import kernel
from megatron_apo.values.baselines import Baseline, BatchMean, GroupMean, LeaveOneOut, Offline
from megatron_apo.values.fingerprint import StoreError
from megatron_apo.values.kernel import KernelName, KernelSmoothed
from megatron_apo.values.shards import StoreRow
from megatron_apo.values.store import StoreWriter
from tests.stores import FINGERPRINT

INFINITE = math.inf
VSTAR = Offline(lambda ids: np.array([{"a": 0.25, "b": 0.5}.get(one, 0.75) for one in ids]))
KERNELS: tuple[KernelName, ...] = ("triangular", "exponential")

Batch = tuple[list[str], list[int], list[float], list[bool]]  # ids, groups, rewards, learned


def batch(**rewards: Sequence[float]) -> Batch:
    """Of some prompts' rewards, all of them learned from."""
    rows = [(one, group, reward) for group, (one, some) in enumerate(rewards.items()) for reward in some]
    ids, groups, flat = (list(column) for column in zip(*rows, strict=True))
    return ids, groups, flat, [True] * len(rows)


def take(source: Baseline, step: int, **rewards: Sequence[float]) -> list[float]:
    """A step's baselines, and the step taken."""
    values = source.values(step, *batch(**rewards))
    source.update(step, *batch(**rewards))
    return values.tolist()


# ---- sources without state


def test_by_hand() -> None:
    rewards = {"a": [1.0, 0.0, 0.5], "b": [-2.0], "c": [3.0, 4.0]}
    assert take(Offline(VSTAR._lookup), 0, **rewards) == [0.25, 0.25, 0.25, 0.5, 0.75, 0.75]
    assert take(BatchMean(), 0, **rewards) == [6.5 / 6] * 6
    assert take(GroupMean(), 0, **rewards) == [0.5, 0.5, 0.5, -2.0, 3.5, 3.5]
    assert take(LeaveOneOut(), 0, **rewards) == [0.25, 0.75, 0.5, 8.5 / 5, 4.0, 3.0]


def test_offline_values_are_the_stores(tmp_path: Path) -> None:
    one, two = f"{1:032x}", f"{2:032x}"
    rows = [StoreRow(one, one, [0.0, 1.0], [3, 3], ["stop"] * 2), StoreRow(two, two, [1.0] * 2, [3, 3], ["stop"] * 2)]
    writer = StoreWriter(tmp_path, FINGERPRINT, 1)
    writer.write_shard(0, rows)
    store = writer.finish()
    for estimator in ("log_mean_exp", "mean"):
        values = store.values(0.5, estimator)
        found = Offline(values.lookup).values(0, [two, one, two], [0, 1, 0], [0.0] * 3, [True] * 3)
        assert found.tolist() == [values[two], values[one], values[two]]
    unknown = ["0" * 32]
    with pytest.raises(StoreError, match="1 of 1 prompts have no V"):
        Offline(values.lookup).values(0, unknown, [0], [0.0], [True])
    assert np.isnan(Offline(values.lookup).values(0, unknown, [0], [0.0], [False])).all()


def test_what_a_group_of_one_falls_back_on() -> None:
    source = LeaveOneOut()
    assert take(source, 0, a=[1.0], b=[2.0], c=[3.0, 5.0]) == [10 / 3, 3.0, 5.0, 3.0] and source.num_fallbacks == 2
    assert take(source, 1, a=[1.0]) == [0.0] and source.num_fallbacks == 1
    assert take(source, 2, a=[1.0, 2.0]) == [2.0, 1.0] and source.num_fallbacks == 0
    for past in (KernelSmoothed(name, 1.0) for name in KERNELS):
        assert take(past, 0, b=[1.0], c=[3.0, 5.0]) == [4.0, 5.0, 3.0] and past.num_fallbacks == 1
        assert take(past, 1, b=[2.0], c=[3.0, 5.0])[0] == 1.0 and past.num_fallbacks == 0


def test_ones_own_reward_is_not_taken_off_again() -> None:
    """It would leave the others rounded by its size."""
    for source in (LeaveOneOut(), KernelSmoothed("triangular", 1.0), KernelSmoothed("exponential", 1.0)):
        assert take(source, 0, a=[1e17, 1.0, 2.0])[0] == 1.5
    assert take(LeaveOneOut(), 0, a=[1e17], b=[1.0], c=[2.0])[0] == 1.5


def sources() -> dict[str, Callable[[], Baseline]]:
    kernels = {f"{name} {h:g}": lambda name=name, h=h: KernelSmoothed(name, h) for name in KERNELS for h in (0.5, 1.0)}
    return {"batch": BatchMean, "group": GroupMean, "others": LeaveOneOut, "vstar": lambda: VSTAR, **kernels}


@pytest.mark.parametrize("name", sources())
@pytest.mark.parametrize("masked", [math.nan, 1e9, -0.5])
def test_what_is_masked_changes_nothing(name: str, masked: float) -> None:
    """Rows between the others, a group that is masked as a whole, and steps of such groups alone."""
    plain, disturbed = sources()[name](), sources()[name]()
    rng = random.Random(0)
    for step in range(12):
        rewards = {one: [rng.gauss(-1, 1) for _ in range(rng.randint(1, 3))] for one in "abc"}
        ids, groups, flat, learned = batch(**rewards)
        rows = [(*row, True) for row in zip(ids, groups, flat, strict=True)]
        mixed = [("d", 9, masked, False), *rows[:1], ("a", 0, masked, math.isnan(masked)), *rows[1:]]
        columns = [list(column) for column in zip(*mixed, strict=True)]
        found_B, known_B = disturbed.values(step, *columns), np.array([False, True, False] + [True] * (len(rows) - 1))
        expected_K = plain.values(step, ids, groups, flat, learned)
        assert found_B[known_B].tobytes() == expected_K.tobytes() and np.isnan(found_B[~known_B]).all()
        assert plain.num_fallbacks == disturbed.num_fallbacks
        plain.update(step, ids, groups, flat, learned)
        disturbed.update(step, *columns)
    nothing = (["a", "a", "b"], [0, 0, 1], [masked] * 3, [False] * 3)
    assert np.isnan(plain.values(12, *nothing)).all() and plain.num_fallbacks == 0
    plain.update(12, *nothing)
    assert plain.values(13, [], [], [], []).tolist() == []


@pytest.mark.parametrize("name", sources())
def test_rows_may_come_in_any_order(name: str) -> None:
    ids, groups, rewards, learned = batch(a=[1.0, 0.0, 4.0], b=[-2.0], c=[3.0, 8.0])
    order = [5, 2, 0, 3, 1, 4]
    source, other = sources()[name](), sources()[name]()
    expected = source.values(0, ids, groups, rewards, learned)[order]
    mixed = ([column[row] for row in order] for column in (ids, groups, rewards, learned))
    assert other.values(0, *mixed).tolist() == expected.tolist()


def test_what_is_no_steps_batch_is_refused() -> None:
    for source in (GroupMean(), KernelSmoothed("triangular", 0.5)):
        for call in (source.values, source.update)[: 1 + source.has_state]:
            with pytest.raises(ValueError, match="step 3: group 7 is of a and of b"):
                call(3, ["a", "b"], [7, 7], [0.0, 1.0], [True, True])
            with pytest.raises(ValueError, match=r"rewards and learned are of \[1, 2\] responses"):
                call(3, ["a", "b"], [0, 1], [0.0, 1.0], [True])


@pytest.mark.parametrize("group", [1, 2, 3])
def test_what_each_does_to_the_expected_gradient(group: int) -> None:
    """Over all groups of a policy with three responses: none turns it, and a mean with one's own makes it shorter."""
    policy_A, reward_A = np.array([0.5, 0.3, 0.2]), np.array([-1.0, 0.25, 2.0])
    score_AA = np.eye(3) - policy_A  # of each response, by logit
    true_A = group * (policy_A * (reward_A - policy_A @ reward_A))
    past = [("triangular", 1.0), ("exponential", 0.3)]
    wanted = {GroupMean(): 1 - 1 / group, BatchMean(): 1 - 1 / group, LeaveOneOut(): 1.0, VSTAR: 1.0}
    for kind in [KernelSmoothed(*each) for each in past]:
        take(kind, 0, a=[0.5, 3.0])
        wanted[kind] = 1.0
    for source, scale in wanted.items():
        found_A = np.zeros(3)
        for arms in product(range(3), repeat=group):
            rewards = reward_A[list(arms)]
            values = source.values(1, *batch(a=rewards.tolist()))
            found_A += np.prod(policy_A[list(arms)]) * ((rewards - values) @ score_AA[list(arms)])
        np.testing.assert_allclose(found_A, scale * true_A, atol=1e-12)


def test_a_kl_is_in_no_mean() -> None:
    """With group_mean of two it weighs twice as much beside the reward, whose gradient is half as long."""
    policy_A, reward_A, kl_A = np.array([0.5, 0.3, 0.2]), np.array([-1.0, 0.25, 2.0]), np.array([0.3, -0.1, 0.7])
    score_AA, found_A = np.eye(3) - policy_A, np.zeros(3)
    for arms in product(range(3), repeat=2):
        own = list(arms)
        advantage_G = reward_A[own] - 0.1 * kl_A[own] - GroupMean().values(0, *batch(a=reward_A[own].tolist()))
        found_A += np.prod(policy_A[own]) * (advantage_G @ score_AA[own]) / 2
    reward_grad_A, kl_grad_A = ((policy_A * value_A) @ score_AA for value_A in (reward_A, kl_A))
    np.testing.assert_allclose(found_A, (reward_grad_A - 0.2 * kl_grad_A) / 2, atol=1e-12)


# ---- the kernel


@dataclass
class Formula:
    """The paper's formula, summed over all that ever was; exactly for the triangular kernel."""

    name: KernelName
    bandwidth: float
    past: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def weight(self, now: int, then: int) -> Fraction | float:
        if math.isinf(self.bandwidth):
            return Fraction(1)
        u = (now - then) / (now * Fraction(repr(self.bandwidth)))
        return max(Fraction(0), 1 - u) if self.name == "triangular" else math.exp(-u)

    def values(self, step: int, ids: list[str], groups: list[int], rewards: list[float], learned: list[bool]):
        """NaN where there is nothing to go by, and where nothing is learned from."""
        known = [ok and not math.isnan(reward) for ok, reward in zip(learned, rewards, strict=True)]
        exact: Callable = Fraction if self.name == "triangular" else float
        found = []
        for row, one in enumerate(ids):
            others = [k for k in range(len(ids)) if k != row and known[k] and groups[k] == groups[row]]
            pairs = [(self.weight(step + 1, then), reward) for then, reward in self.past.get(one, [])]
            pairs += [(exact(1), rewards[k]) for k in others]
            weight = sum(weight for weight, _ in pairs)
            if not known[row] or not weight:
                found.append(math.nan)
            elif self.name == "triangular":
                found.append(float(sum(weight * Fraction(reward) for weight, reward in pairs) / weight))
            else:
                found.append(math.fsum(weight * reward for weight, reward in pairs) / weight)
        return found

    def update(self, step: int, ids: list[str], groups: list[int], rewards: list[float], learned: list[bool]) -> None:
        for one, reward, ok in zip(ids, rewards, learned, strict=True):
            if ok and not math.isnan(reward):
                self.past.setdefault(one, []).append((step + 1, reward))


REWARDS: dict[str, Callable[[random.Random], float]] = {
    "binary": lambda rng: float(rng.random() < 0.3),
    "dense": lambda rng: rng.random(),
    "negative": lambda rng: rng.gauss(-5, 0.1),
    "both signs": lambda rng: 1e3 * rng.gauss(0, 1),
}


def random_batch(rng: random.Random, reward: Callable[[random.Random], float], prompts: str = "abcd") -> Batch:
    """Some of the prompts, in groups of 1 to 4; a fifth of the responses masked, by either sign of it."""
    rows = []
    for group, one in enumerate(rng.sample(prompts, rng.randint(1, len(prompts)))):
        for _ in range(rng.randint(1, 4)):
            drawn = rng.random()
            rows.append((one, group, math.nan if drawn < 0.1 else reward(rng), not 0.1 <= drawn < 0.2))
    rng.shuffle(rows)
    ids, groups, rewards, learned = (list(column) for column in zip(*rows, strict=True))
    return ids, groups, rewards, learned


def assert_by_formula(source: KernelSmoothed, formula: Formula, step: int, rows: Batch, scale: float) -> None:
    found, expected = source.values(step, *rows), np.array(formula.values(step, *rows))
    has_any = ~np.isnan(expected)
    np.testing.assert_allclose(found[has_any], expected[has_any], rtol=0, atol=1e-12 * scale)
    known = np.array(rows[3]) & ~np.isnan(rows[2])
    assert source.num_fallbacks == (known & ~has_any).sum() and not np.isnan(found[known]).any()


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    name=st.sampled_from(KERNELS),
    bandwidth=st.sampled_from([0.01, 0.05, 0.1, 0.3, 0.5, 0.9, 1.0, 1.1, 3.0, 1e6, INFINITE]),
    reward=st.sampled_from(sorted(REWARDS)),
    share=st.sampled_from([1.0, 0.3]),
)
@example(seed=1, name="triangular", bandwidth=0.3, reward="both signs", share=1.0)
@example(seed=1, name="exponential", bandwidth=0.01, reward="both signs", share=0.3)
def test_state_gives_what_the_whole_history_does(
    seed: int, name: KernelName, bandwidth: float, reward: str, share: float
) -> None:
    rng = random.Random(seed)
    source, formula = KernelSmoothed(name, bandwidth), Formula(name, bandwidth)
    for step in range(40):
        if rng.random() < share:  # steps may be left out
            rows = random_batch(rng, REWARDS[reward])
            assert_by_formula(source, formula, step, rows, scale=1e4)
            source.update(step, *rows)
            formula.update(step, *rows)


@pytest.mark.parametrize("reward", ["negative", "both signs"])
@pytest.mark.parametrize(
    ("name", "bandwidth"), [("triangular", 0.3), ("triangular", 2.0), ("exponential", 0.01), ("exponential", 1.0)]
)
def test_thousands_of_visits_do_not_drift(name: KernelName, bandwidth: float, reward: str) -> None:
    rng, num_steps = random.Random(3), 2000
    source, formula = KernelSmoothed(name, bandwidth), Formula(name, bandwidth)
    for step in range(num_steps):
        rows = batch(a=[REWARDS[reward](rng)])
        source.values(step, *rows)
        source.update(step, *rows)
        formula.update(step, *rows)
    rows = batch(a=[0.0, 1.0])
    assert_by_formula(source, formula, num_steps, rows, scale=10 if reward == "negative" else 100)


def test_what_has_left_the_window_leaves_no_trace() -> None:
    source, formula = KernelSmoothed("triangular", 0.5), Formula("triangular", 0.5)
    for step in range(400):
        rows = batch(a=[(1e17 if step < 100 else 0.1) * (1 + step % 3)])
        if step >= 300:
            assert_by_formula(source, formula, step, rows, scale=0.1)
        else:
            source.values(step, *rows)
        source.update(step, *rows)
        formula.update(step, *rows)


def test_kernels_by_hand() -> None:
    """In iteration 4 after rewards 5 and 1 in iterations 2 and 3; half of it back is u = 1."""
    for name, second, third in (("triangular", 0.0, 0.5), ("exponential", math.exp(-1), math.exp(-0.5))):
        source = KernelSmoothed(name, 0.5)
        take(source, 1, a=[5.0])
        take(source, 2, a=[1.0])
        past, weight = 5 * second + third, second + third
        found = take(source, 3, a=[0.25, 0.75, 3.0])
        assert found == pytest.approx(
            [(past + 3.75) / (weight + 2), (past + 3.25) / (weight + 2), (past + 1.0) / (weight + 2)], rel=1e-14
        )


@pytest.mark.parametrize("name", KERNELS)
def test_a_prompt_that_comes_twice_in_a_step_is_two_groups_with_one_past(name: KernelName) -> None:
    """At the end of an epoch, and again at the beginning of the next."""
    twice = (["a", "a", "b", "a"], [0, 0, 1, 2], [1.0, 3.0, 9.0, 5.0], [True] * 4)
    for source in (LeaveOneOut(), KernelSmoothed(name, INFINITE)):
        assert source.values(0, *twice).tolist() == [3.0, 1.0, 3.0, 13 / 3]
    source.update(0, *twice)
    assert source.values(1, *twice).tolist() == [3.0, 10 / 4, 9.0, 3.0]
    whole = KernelSmoothed(name, INFINITE)
    whole.update(0, ["a", "a", "b", "a"], [0, 0, 1, 0], *twice[2:])
    assert source._past["a"].state() == whole._past["a"].state()


@pytest.mark.parametrize("name", KERNELS)
def test_infinite_bandwidth_is_the_running_mean(name: KernelName) -> None:
    rng, source, seen = random.Random(4), KernelSmoothed(name, INFINITE), []
    for step in range(60):
        rewards = [rng.gauss(0, 1) for _ in range(rng.randint(1, 3))]
        found = take(source, step, a=rewards)
        for place, value in enumerate(found if step else ()):
            assert value == pytest.approx(np.mean(seen + rewards[:place] + rewards[place + 1 :]), abs=1e-14)
        seen += rewards


@pytest.mark.parametrize("percent", [7, 10, 28, 50, 56, 70, 100])
def test_the_windows_edge(percent: int) -> None:
    """A visit counts as long as i - I < i h, for h that no float is: 100 x 0.07 is 7.000000000000001."""
    for then in (1, 22, 44, 93):
        source = KernelSmoothed("triangular", percent / 100)
        source.update(then - 1, *batch(c=[9.0]))
        for now in range(then + 1, 111):
            is_in = 100 * (now - then) < now * percent
            (found,) = source.values(now - 1, *batch(c=[1.0]))
            assert found == pytest.approx(9.0 if is_in else 0.0, rel=1e-14), (then, now)


def test_a_step_costs_the_same_however_long_the_past(monkeypatch: pytest.MonkeyPatch) -> None:
    """A visit is added to three sums at most, and what is kept is the window, or the moments."""
    calls = 0
    joined = kernel._joined

    def counted(*parts):
        nonlocal calls
        calls += 1
        return joined(*parts)

    monkeypatch.setattr(kernel, "_joined", counted)
    steps, most, source = 2000, 0, KernelSmoothed("triangular", 0.5)
    for step in range(steps):
        take(source, step, a=[1.0])
        most = max(most, len(source._past["a"].state().iteration) - (step + 1) // 2) if step % 100 == 0 else most
    assert steps < calls <= 3 * steps and most <= 1
    source = KernelSmoothed("exponential", 0.5)
    for step in range(100):
        take(source, step, a=[1.0])
        assert len(source._past["a"].state().total) == 26


def test_steps_come_in_order_and_a_bandwidth_is_positive() -> None:
    source = KernelSmoothed("triangular", 0.5)
    take(source, 4, a=[1.0])
    for call in (source.values, source.update):
        with pytest.raises(ValueError, match="step 4 of a baseline that is at step 5; steps come in order"):
            call(4, *batch(a=[1.0]))
    first, again = (source.values(7, *batch(a=[1.0])).tolist() for _ in range(2))
    assert first == again
    with pytest.raises(ValueError, match="step 6 of a baseline that is at step 7"):
        source.values(6, *batch(a=[1.0]))
    for bandwidth in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="is not above 0, as the triangular kernel needs it"):
            KernelSmoothed("triangular", bandwidth)
    with pytest.raises(
        ValueError, match="a bandwidth of 0.001 is not at least 0.01, as the exponential kernel needs it"
    ):
        KernelSmoothed("exponential", 0.001)


# ---- its file


def after(name: KernelName, bandwidth: float, num_steps: int, seed: int = 5) -> tuple[KernelSmoothed, random.Random]:
    rng, source = random.Random(seed), KernelSmoothed(name, bandwidth)
    for step in range(num_steps):
        rows = random_batch(rng, REWARDS["dense"])
        source.values(step, *rows)
        source.update(step, *rows)
    return source, rng


@pytest.mark.parametrize("num_steps", [0, 1, 37, 60])
@pytest.mark.parametrize("bandwidth", [0.3, 1.0, INFINITE])
@pytest.mark.parametrize("name", KERNELS)
def test_a_file_goes_on_bit_for_bit(name: KernelName, bandwidth: float, num_steps: int, tmp_path: Path) -> None:
    source, rng = after(name, bandwidth, num_steps)
    path, resumed = tmp_path / "new" / "baseline.parquet", KernelSmoothed(name, bandwidth)
    source.write(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    resumed.read(path, num_steps)
    for step in range(num_steps, num_steps + 60):
        rows = random_batch(rng, REWARDS["dense"])
        assert resumed.values(step, *rows).tobytes() == source.values(step, *rows).tobytes(), step
        for one in (source, resumed):
            one.update(step, *rows)
    resumed.write(tmp_path / "again")
    source.write(path)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_the_file_is_for_a_person_too(tmp_path: Path) -> None:
    source = KernelSmoothed("triangular", 0.9)
    take(source, 1, a=[0.5, 1.0], b=[-2.0])
    take(source, 2, a=[0.25])
    source.update(3, ["a", "c"], [0, 1], [1.0, math.nan], [False, True])  # nothing is known of these
    source.write(tmp_path / "file")
    assert pq.read_table(tmp_path / "file").to_pylist() == [
        {"prompt_id": "a", "iteration": [2, 3], "total": [1.5, 0.25], "weight": [2.0, 1.0], "num_turned": 0},
        {"prompt_id": "b", "iteration": [2], "total": [-2.0], "weight": [1.0], "num_turned": 0},
    ]


def test_a_write_that_breaks_off_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, before = tmp_path / "file", after("triangular", 0.5, 5)[0]
    before.write(path)
    data = path.read_bytes()

    def breaks_off(table: pa.Table, where: Path, **options: object) -> None:
        where.write_bytes(data[:20])
        raise OSError("no space")

    monkeypatch.setattr(pq, "write_table", breaks_off)
    with pytest.raises(OSError, match="no space"):
        before.write(path)
    assert path.read_bytes() == data


def test_what_has_no_state_has_no_file(tmp_path: Path) -> None:
    for source in (BatchMean(), GroupMean(), LeaveOneOut(), VSTAR):
        assert not source.has_state
        source.update(0, *batch(a=[1.0]))
        source.write(tmp_path / "file")
        source.read(tmp_path / "file", 1)
    assert not list(tmp_path.iterdir())


def damaged(path: Path, name: KernelName) -> dict[str, str]:
    """{what was done to the file's copy: the line that is wanted}; copies are written beside it, by that name."""
    table = pq.read_table(path)

    def changed(column: str, values: list) -> pa.Table:
        place = table.schema.get_field_index(column)
        return table.set_column(place, table.schema.field(column), pa.array(values, table.schema.field(column).type))

    data, rows = path.read_bytes(), table.to_pylist()
    flipped = bytearray(data)
    flipped[len(data) // 8] ^= 1
    writes = {"cut": data[:-20], "flipped": bytes(flipped), "empty": b"", "text": b"not a state at all"}
    for title, content in writes.items():
        (path.parent / title).write_bytes(content)
    ids, iterations = [row["prompt_id"] for row in rows], [row["iteration"] for row in rows]
    totals, turned = [row["total"] for row in rows], [row["num_turned"] for row in rows]
    unsound = {
        "same ids": changed("prompt_id", ids[:1] * len(rows)),
        "no id": changed("prompt_id", [None, *ids[1:]]),
        "nulls": changed("weight", [None] * len(rows)),
        "a null": changed("total", [[None, *totals[0][1:]], *totals[1:]]),
        "not finite": changed("total", [[math.nan, *totals[0][1:]], *totals[1:]]),
        "fewer totals": changed("total", [totals[0][1:], *totals[1:]]),
        "more": changed("total", [totals[0] + [1.0], *totals[1:]]),
        "before training": changed("iteration", [[0, *iterations[0][1:]], *iterations[1:]]),
        "after training": changed("iteration", [[*iterations[0][:-1], 41], *iterations[1:]]),
        "turned": changed("num_turned", [99, *turned[1:]]),
        "turned back": changed("num_turned", [-1, *turned[1:]]),
    }
    if name == "triangular":
        unsound["out of order"] = changed("iteration", [iterations[0][::-1], *iterations[1:]])
    else:
        unsound["visits"] = changed("iteration", [[1, *iterations[0]], *iterations[1:]])
    others = {
        "other columns": table.select(["prompt_id"]),
        "another file": pa.table({"a": [1]}),
        "other format": table.replace_schema_metadata({b"megatron_apo.baseline": b'{"format": 99}'}),
        "no record": table.replace_schema_metadata({b"megatron_apo.baseline": b"[]"}),
    }
    for title, content in (unsound | others).items():
        pq.write_table(content, path.parent / title)
    return {
        **dict.fromkeys(writes, "the file is damaged"),
        **dict.fromkeys(unsound, "what it says of a prompt's past cannot be"),
        **dict.fromkeys(others, "not a baseline's state of format 1"),
        "no record": "the file is damaged",
        "missing": "no such file; the kernel baseline's past was not saved",
    }


@pytest.mark.parametrize("name", KERNELS)
def test_every_other_file_is_refused_in_one_line(name: KernelName, tmp_path: Path) -> None:
    path = tmp_path / "baseline.parquet"
    after(name, 0.9, 40)[0].write(path)
    other: KernelName = "exponential" if name == "triangular" else "triangular"
    files = [(file, name, 0.9, 40, line) for file, line in damaged(path, name).items()]
    files += [
        (path.name, name, 0.9, 39, "next_step 40, where this run has 39"),
        (path.name, name, 0.8, 40, "bandwidth 0.9, where this run has 0.8"),
        (path.name, other, 0.9, 40, f"kernel '{name}', where this run has '{other}'"),
    ]
    for file, kind, bandwidth, next_step, line in files:
        source = KernelSmoothed(kind, bandwidth)
        with pytest.raises(ValueError, match=line) as caught:
            source.read(tmp_path / file, next_step)
        assert "\n" not in str(caught.value) and str(tmp_path / file) in str(caught.value), file
        assert source.values(0, *batch(a=[1.0, 2.0])).tolist() == [2.0, 1.0]  # it is as it was


@pytest.mark.parametrize("name", KERNELS)
def test_a_flipped_bit_is_refused_or_changes_nothing(name: KernelName, tmp_path: Path) -> None:
    path = tmp_path / "baseline.parquet"
    after(name, 0.9, 40)[0].write(path)
    data = path.read_bytes()
    for position in range(0, len(data), max(1, len(data) // 120)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        (tmp_path / "flipped").write_bytes(flipped)
        source = KernelSmoothed(name, 0.9)
        try:
            source.read(tmp_path / "flipped", 40)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            source.write(tmp_path / "again")
            assert (tmp_path / "again").read_bytes() == data
