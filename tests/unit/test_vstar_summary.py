"""What is said of a V* store, and of two: against brute force over the same samples, and numbers derived by hand."""

from __future__ import annotations

import json
import re
from itertools import combinations
from math import comb, e, exp, log
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_apo import cli
from megatron_apo.values.estimators import ESTIMATORS
from megatron_apo.values.samples import SampledRewards, SamplesPerPrompt
from megatron_apo.values.store import StoreError, StoreRow, StoreWriter, VStarStore
from megatron_apo.values.summary import compare, compare_estimators, pass_at_k, summarize
from tests.stores import FINGERPRINT

ADAPTIVE = {"stderr": 0.1, "beta1": 0.5, "step": 2, "most": 8, "all_wrong": 4, "reward_range": [0.0, 1.0]}


def prompt_id(number: int) -> str:
    return f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}{number:016x}"


def make_store(
    folder: Path,
    rewards: dict[int, list[float]],
    num_shards: int = 1,
    settings: dict[str, str] | None = None,
    every_cut: bool = False,
    **changes,
) -> VStarStore:
    """Rewards by the number of a prompt; lengths count up from 1 through the whole store, every fourth or all cut."""
    changes = {"samples_per_prompt": len(next(iter(rewards.values()), [0])), **changes}
    writer = StoreWriter(folder, FINGERPRINT.model_copy(update=changes), num_shards, settings)
    rows, length = [], 0
    for number, of in rewards.items():
        lengths = list(range(length + 1, length + len(of) + 1))
        reasons = ["length" if every_cut or tokens % 4 == 0 else "stop" for tokens in lengths]
        rows.append(StoreRow(prompt_id(number), "0" * 32, of, lengths, reasons, None, number % 2, number % 3))
        length += len(of)
    size = -(-len(rows) // num_shards)
    for index in range(num_shards):
        writer.write_shard(index, rows[index * size : (index + 1) * size], 1800.0, "CPU" if index else "GPU")
    return writer.finish()


def some_rewards(num: int = 30, counts: tuple[int, ...] = (2, 4, 8), seed: int = 0) -> dict[int, list[float]]:
    rng = np.random.default_rng(seed)
    return {i: rng.integers(0, 2, rng.choice(counts)).astype(float).tolist() for i in range(num)}


def brute_force(rows: list[list[float]], k: int) -> float:
    """Mean over prompts of the share of subsets of k samples that hold a right one."""
    return float(np.mean([np.mean([max(some) >= 1 for some in combinations(row, k)]) for row in rows]))


# ---- Pass@k


def test_pass_at_k_is_the_mean_over_all_subsets() -> None:
    rows = list(some_rewards(counts=(7,)).values())
    found = pass_at_k(SampledRewards.of_rows(rows), 7)
    assert list(found) == [1, 2, 3, 4, 5, 6, 7]
    for k, at in found.items():
        assert at.mean == pytest.approx(brute_force(rows, k), abs=1e-12)
        assert at.num_prompts == 30
    means = [at.mean for at in found.values()]
    assert means == sorted(means)
    assert means[0] == pytest.approx(np.mean(rows))


def test_pass_at_k_of_many_samples_is_exact() -> None:
    row = [1.0] * 3 + [0.0] * 997
    found = pass_at_k(SampledRewards.of_rows([row]), 1000)
    for k in (1, 500, 997, 998, 1000):
        assert found[k].mean == pytest.approx(1 - comb(997, k) / comb(1000, k), rel=1e-12)


def test_pass_at_k_counts_rewards_of_at_least_one() -> None:
    found = pass_at_k(SampledRewards.of_rows([[0.9, 1.0, 2.5], [-1.0, 0.99, 0.0]]), 3)
    assert [at.mean for at in found.values()] == pytest.approx([(2 / 3 + 0) / 2, 0.5, 0.5])


def test_further_rounds_count_only_beyond_the_first() -> None:
    """Two samples are the first round. The third prompt was sampled until it was right, which is not to count."""
    rows = [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    found = pass_at_k(SampledRewards.of_rows(rows), 2)
    assert {k: at.num_prompts for k, at in found.items()} == {1: 4, 2: 4, 3: 2, 4: 1}
    first = [row[:2] for row in rows]
    expected = [brute_force(first, 1), brute_force(first, 2), brute_force(rows[2:], 3), brute_force(rows[2:3], 4)]
    assert [at.mean for at in found.values()] == pytest.approx(expected)


def test_standard_errors_are_over_prompts() -> None:
    rows = list(some_rewards(counts=(4,)).values())
    found = pass_at_k(SampledRewards.of_rows(rows), 4)
    assert found[1].stderr == pytest.approx(np.std(np.mean(rows, axis=1), ddof=1) / 30**0.5)
    assert found[4].stderr == pytest.approx(np.std(np.max(rows, axis=1), ddof=1) / 30**0.5)
    assert pass_at_k(SampledRewards.of_rows(rows[:1]), 4)[2].stderr is None


# ---- one store


def test_summary_of_a_store_by_hand(tmp_path: Path) -> None:
    rewards = {0: [1.0, 1.0], 1: [0.0, 0.0], 2: [0.0, 1.0], 3: [1.0, 1.0], 4: [0.0, 0.0]}
    found = summarize(make_store(tmp_path, rewards, num_shards=2), [0.5, 1e9], "log_mean_exp")
    assert (found.prompts, found.shards, found.samples, found.binary) == (5, 2, SamplesPerPrompt(2, 2, 2), True)
    assert found.reward.mean == pytest.approx(0.5)
    assert found.reward.stderr == pytest.approx((1 / 4 / 5) ** 0.5)  # 4 x 0.25 / (5 - 1) is the variance
    assert found.right.at == [0, 0.5, 1] and found.right.counts == [2, 1, 2]
    at = found.values[0]
    one_of_two = 0.5 * log((1 + e**2) / 2)
    assert at.mean == pytest.approx((2 + one_of_two) / 5)
    assert [at.smallest, at.p10, at.p50, at.p90, at.largest] == pytest.approx([0, 0, one_of_two, 1, 1])
    assert at.bars.at == pytest.approx([0, one_of_two, 1]) and at.bars.counts == [2, 1, 2]
    assert found.values[1].mean == pytest.approx(0.5)  # a large b1: the mean reward
    assert {name: left.prompts for name, left in found.left_out.items()} == {"all_wrong": 2, "all_right": 2, "both": 4}
    assert found.left_out["both"].share == 0.8
    responses = found.responses  # lengths 1 to 10, of which 4 and 8 are cut
    assert (responses.count, responses.mean_tokens, responses.truncated) == (10, 5.5, 0.2)
    assert (responses.p50, responses.p90, responses.p99, responses.longest) == (5, 9, 10, 10)
    assert (responses.num_failures, responses.num_unfinished) == (0 + 1 + 0 + 1 + 0, 0 + 1 + 2 + 0 + 1)
    assert found.hours == {"GPU": 0.5, "CPU": 0.5}
    assert found.fingerprint["dataset_hash"] == "01" * 32


def test_summary_of_an_adaptive_store(tmp_path: Path) -> None:
    rewards = {0: [1.0, 1.0], 1: [0.0, 0.0, 0.0, 1.0], 2: [0.0, 1.0, 0.0]}
    found = summarize(make_store(tmp_path, rewards, samples_per_prompt=2, adaptive=ADAPTIVE), [0.5], "debiased")
    assert found.samples == SamplesPerPrompt(2, 4, 3) and found.first_round == 2
    assert found.reward.mean == pytest.approx((1 + 0 + 0.5) / 3) == pytest.approx(found.pass_at_k[1].mean)
    assert [at.num_prompts for at in found.pass_at_k.values()] == [3, 3, 2, 1]
    assert found.responses.count == 9


def test_rewards_other_than_0_and_1_are_told(tmp_path: Path) -> None:
    store = make_store(tmp_path, {0: [0.5, 1.0], 1: [0.0, 0.0]})
    found = summarize(store, [0.5], "mean")
    assert not found.binary and found.pass_at_k[1].mean == 0.25 and found.reward.mean == 0.375
    with pytest.raises(ValueError, match="beta_smoothed needs rewards of 0 and 1"):
        summarize(store, [0.5], "beta_smoothed")
    assert "beta_smoothed" not in compare_estimators(store, [0.5])[0].curves


def test_histograms_count_everything_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rewards = {i: rng.normal(size=3).tolist() for i in range(300)}
    store = make_store(tmp_path, rewards, num_shards=3)
    found = summarize(store, [0.5], "log_mean_exp")
    values = store.values(0.5, "log_mean_exp").values_P
    bars = found.values[0].bars
    assert bars.counts == np.histogram(values, bins=40)[0].tolist()
    assert bars.at[0] > values.min() and bars.at[-1] < values.max()
    lengths = found.responses.bars  # 1 to 900 in 40 bins of at most 23 lengths
    assert lengths.counts == [23] * 39 + [900 - 23 * 39]
    assert lengths.at[:2] == [12, 35]
    exact = np.quantile(np.arange(1, 901), [0.5, 0.9, 0.99], method="inverted_cdf").tolist()
    assert [found.responses.p50, found.responses.p90, found.responses.p99] == exact


@pytest.mark.parametrize("n", [16, 64])
def test_equal_values_share_a_bar_whatever_the_order_of_their_rewards(tmp_path: Path, n: int) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.permutation([1.0] * k + [0.0] * (n - k)).tolist() for k in range(n + 1) for _ in range(20)]
    store = make_store(tmp_path, dict(enumerate(rows)))
    assert len(np.unique(store.values(0.5, "log_mean_exp").values_P)) > n + 1
    bars = summarize(store, [0.5], "log_mean_exp").values[0].bars
    assert bars.at == pytest.approx([0.5 * log(1 + k / n * (e**2 - 1)) for k in range(n + 1)], abs=1e-8)
    assert bars.counts == [20] * (n + 1)


def test_estimators_beside_each_other(tmp_path: Path) -> None:
    store = make_store(tmp_path, {0: [1.0, 1.0], 1: [0.0, 0.0], 2: [0.0, 1.0], 3: [1.0, 0.0]})
    small, large = compare_estimators(store, [0.25, 1.0])
    assert (small.beta1, small.mean_reward, list(small.curves)) == (0.25, [0, 0.5, 1], list(ESTIMATORS))
    assert small.curves["log_mean_exp"] == pytest.approx([0, 0.25 * log((1 + exp(4)) / 2), 1])
    assert small.curves["max"] == [0, 1, 1] and large.curves["mean"] == [0, 0.5, 1]
    for at in (small, large):
        for name, mean in at.means.items():
            assert mean == pytest.approx(store.values(at.beta1, name).values_P.mean())


def test_a_store_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no prompts"):
        summarize(make_store(tmp_path, {}, samples_per_prompt=2), [0.5], "mean")


# ---- two stores


def test_a_store_equals_itself_whatever_its_order(tmp_path: Path) -> None:
    rewards = some_rewards()
    settings = {"samples_per_prompt": 2, "adaptive": ADAPTIVE}
    one = make_store(tmp_path / "a", rewards, **settings)
    other = make_store(tmp_path / "b", dict(reversed(rewards.items())), num_shards=4, **settings)
    found = compare(one, other, [0.5, 1.0], "log_mean_exp")
    assert found.same_rewards and found.fingerprint == {} and found.most == []
    assert (found.num_common, found.num_only, found.num_changed, found.num_rewards) == (30, (0, 0), 0, 0)
    assert [(at.mean_absolute, at.largest) for at in found.values] == [(0, 0)] * 2
    assert [at.correlation for at in found.values] == pytest.approx([1, 1])
    assert found.reward is not None and found.reward[0].mean == pytest.approx(found.reward[1].mean)


def test_a_changed_reward_and_missing_prompts(tmp_path: Path) -> None:
    rewards = {i: [float(i % 2), 1.0] for i in range(6)}
    one = make_store(tmp_path / "a", rewards)
    other = make_store(
        tmp_path / "b", {i: of for i, of in rewards.items() if i != 5} | {2: [1.0, 0.0], 3: [0.0, 0.0]} | {7: [0, 0]}
    )
    found = compare(one, other, [0.5], "mean")
    assert not found.same_rewards
    assert (found.num_common, found.num_only, found.only) == (5, (1, 1), ([prompt_id(5)], [prompt_id(7)]))
    assert (found.num_changed, found.num_rewards) == (2, 4)
    # Rewards of 2 change places, those of 3 go from 1, 1 to 0, 0.
    assert [(one.prompt_id, one.num_rewards, one.mean_rewards, one.difference) for one in found.most] == [
        (prompt_id(3), 2, (1, 0), 1),
        (prompt_id(2), 2, (0.5, 0.5), 0),
    ]
    assert (found.values[0].mean_absolute, found.values[0].largest) == (0.2, 1)
    assert found.values[0].correlation == pytest.approx(np.corrcoef([0.5, 1, 0.5, 1, 0.5], [0.5, 1, 0.5, 0, 0.5])[0, 1])
    assert found.reward is not None
    assert [mean.mean for mean in found.reward] == pytest.approx([0.7, 0.5])


def test_another_fingerprint_alone_changes_no_rewards(tmp_path: Path) -> None:
    one = make_store(tmp_path / "a", some_rewards(counts=(4,)))
    other = make_store(tmp_path / "b", some_rewards(counts=(4,)), temperature=0.7, model_hash="99" * 32)
    found = compare(one, other, [0.5], "mean")
    assert found.same_rewards
    assert found.fingerprint == {"model_hash": ("ab" * 32, "99" * 32), "temperature": (1.0, 0.7)}


def test_stores_of_different_numbers_of_samples_against_brute_force(tmp_path: Path) -> None:
    settings = {"samples_per_prompt": 2, "adaptive": ADAPTIVE}
    left, right = some_rewards(50, seed=1), {i: of for i, of in some_rewards(60, seed=2).items() if i >= 10}
    one, other = make_store(tmp_path / "a", left, **settings), make_store(tmp_path / "b", right, 3, **settings)
    found = compare(one, other, [0.5, 0.1], "log_mean_exp")
    changed = {
        i: sum(x != y for x, y in zip(left[i], right[i], strict=False)) + abs(len(left[i]) - len(right[i]))
        for i in range(10, 50)
    }
    assert found.num_changed == sum(num > 0 for num in changed.values()) and found.num_rewards == sum(changed.values())
    values = [(one.values(beta1, "log_mean_exp"), other.values(beta1, "log_mean_exp")) for beta1 in (0.5, 0.1)]
    apart = {i: max(abs(a[prompt_id(i)] - b[prompt_id(i)]) for a, b in values) for i in changed}
    expected = sorted(changed, key=lambda i: (-apart[i], -changed[i], i))[:10]
    assert [one.prompt_id for one in found.most] == [prompt_id(i) for i in expected]
    assert [one.difference for one in found.most] == pytest.approx([apart[i] for i in expected])
    assert found.values[0].mean_absolute == pytest.approx(
        np.mean([abs(a[p] - b[p]) for a, b in values[:1] for p in map(prompt_id, changed)])
    )


def test_samples_that_one_store_has_alone_are_other_rewards(tmp_path: Path) -> None:
    one = make_store(tmp_path / "a", {1: [1.0, 0.0], 2: [0.0, 1.0]})
    other = make_store(tmp_path / "b", {1: [1.0, 0.0, 1.0, 0.0], 2: [1.0, 1.0, 1.0, 1.0]})
    for pair in ((one, other), (other, one)):
        found = compare(*pair, [0.5], "mean")
        assert (found.num_changed, found.num_rewards, found.same_rewards) == (2, 2 + 3, False)


def test_ids_that_share_their_first_half_are_told_apart(tmp_path: Path) -> None:
    stores = []
    for name, halves in (("a", "02"), ("b", "21"), ("c", "13")):
        writer = StoreWriter(tmp_path / name, FINGERPRINT, 1)
        ids = [f"{'00' * 8}{half * 16}" for half in halves]
        writer.write_shard(0, [StoreRow(i, "0" * 32, [1.0, 0.0], [1, 1], ["stop"] * 2) for i in ids])
        stores.append(writer.finish())
    assert compare(stores[0], stores[1], [0.5], "mean").only == (["0" * 32], ["0" * 16 + "1" * 16])
    assert compare(stores[0], stores[2], [0.5], "mean").num_only == (2, 2)


def test_stores_with_nothing_in_common(tmp_path: Path) -> None:
    found = compare(
        make_store(tmp_path / "a", {1: [1.0]}), make_store(tmp_path / "b", {2: [1.0]}), [0.5], "log_mean_exp"
    )
    assert (found.num_common, found.values, found.most, found.reward, found.same_rewards) == (0, [], [], None, False)


def test_values_that_do_not_vary_have_no_correlation(tmp_path: Path) -> None:
    one = make_store(tmp_path / "a", {1: [1.0], 2: [1.0]})
    other = make_store(tmp_path / "b", {1: [1.0], 2: [0.0]})
    assert compare(one, other, [0.5], "mean").values[0].correlation is None


# ---- the command


def vstar(*arguments: object) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(cli.app, ["vstar", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_the_command_prints_a_summary_that_fits_a_terminal(tmp_path: Path) -> None:
    make_store(tmp_path, some_rewards(counts=(8,)), num_shards=2)
    code, text = vstar(tmp_path, "--beta1", 0.5, "--beta1", 2)
    assert code == 0
    assert re.search(r"^prompts +30 in 2 shards$", text, re.M)
    assert re.search(r"^samples +8 of each prompt, 240 in all$", text, re.M)
    assert re.search(r"^mean reward .* \(first 8 samples of each\)$", text, re.M)
    assert re.search(r"^0.5 .*\n +2 ", text, re.M) and "of at least 1" not in text
    tables = text[text.index("Pass@k") : text.index("provenance")]
    assert max(map(len, tables.splitlines())) <= 80
    assert text.rindex("provenance") > text.rindex("V* by log_mean_exp")
    assert re.search(rf"^model_hash +{'ab' * 32}$", text, re.M)


def test_the_command_prints_json(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a", some_rewards(), samples_per_prompt=2, adaptive=ADAPTIVE)
    code, text = vstar(tmp_path / "a", "--json", "--estimator", "debiased")
    tree = json.loads(text)
    assert code == 0 and tree["prompts"] == 30 and tree["estimator"] == "debiased"
    assert [at["beta1"] for at in tree["values"]] == [0.25, 0.5, 1]
    assert (tree["samples"]["fewest"], tree["samples"]["most"]) == (2, 8)
    assert tree["values"][1]["mean"] == pytest.approx(store.values(0.5, "debiased").values_P.mean())
    assert list(tree["pass_at_k"]) == [str(k) for k in range(1, 9)]
    assert tree["fingerprint"] == store.fingerprint.model_dump(mode="json")


def test_the_command_compares(tmp_path: Path) -> None:
    make_store(tmp_path / "a", {1: [1.0, 0.0], 2: [1.0, 1.0]})
    make_store(tmp_path / "b", {1: [1.0, 0.0], 2: [1.0, 1.0]}, seed=4)
    make_store(tmp_path / "c", {1: [1.0, 0.0], 2: [1.0, 0.0]})
    make_store(tmp_path / "d", {2: [1.0, 1.0], 1: [1.0, 0.0]}, settings={"rollout.dtype": "bfloat16"}, every_cut=True)
    code, text = vstar(tmp_path / "a", "--diff", tmp_path / "b")
    assert code == 0 and re.search(r"^seed +3 \| 4$", text, re.M)
    code, text = vstar(tmp_path / "a", "--diff", tmp_path / "d")
    assert code == 0 and re.search(r"^rollout.dtype +None \| bfloat16$", text, re.M)
    assert re.search(r"^response tokens +2.5 \| 2.5$", text, re.M)
    assert re.search(r"^truncated +25.00% \| 100.00%$", text, re.M)
    code, text = vstar(tmp_path / "a", "--diff", tmp_path / "c")
    assert code == 1 and prompt_id(2) in text and prompt_id(1) not in text
    code, text = vstar(tmp_path / "a", "--diff", tmp_path / "c", "--json")
    tree = json.loads(text)
    assert code == 1 and tree["num_rewards"] == 1 and tree["same_rewards"] is False


@pytest.mark.parametrize("kind", ["fixed", "adaptive", "graded", "one prompt"])
def test_the_page_is_whole_and_self_contained(tmp_path: Path, kind: str) -> None:
    rewards = some_rewards(counts=(2, 4, 8) if kind == "adaptive" else (8,))
    if kind == "graded":
        rewards = {i: [0.3 * reward for reward in of] for i, of in rewards.items()}
    if kind == "one prompt":
        rewards = {0: rewards[0]}
    settings = {"samples_per_prompt": 2, "adaptive": ADAPTIVE} if kind == "adaptive" else {}
    make_store(tmp_path / "v", rewards, **settings)
    path = tmp_path / "page.html"
    assert vstar(tmp_path / "v", "--page", path, "--beta1", 0.5, "--beta1", 1) == (0, f"{path}\n")
    page = path.read_text()
    assert "http" not in page and not re.search(r"url\((?!#)|@import|<script|src=", page)
    titles = re.findall(r'<svg role="img" aria-label="([^"]*)"', page)
    assert titles == [
        "V* at b1 = 0.5",
        "V* at b1 = 1",
        "Pass@k",
        "share of right samples of a prompt",
        "V* by mean reward of a prompt, b1 = 0.5",
        "V* by mean reward of a prompt, b1 = 1",
        "response lengths of the reference",
    ]
    assert ("of at least 1" in page) == (kind == "graded")
    assert ("biased by the stopping rule" in page) == (kind == "adaptive")
    assert "ab" * 32 in page


def test_hours_of_different_devices_are_not_added_up(tmp_path: Path) -> None:
    make_store(tmp_path, some_rewards(counts=(2,)), num_shards=3)
    assert "0.50 GPU, 1.00 CPU" in vstar(tmp_path)[1]
    vstar(tmp_path, "--page", tmp_path / "page.html")
    cards = re.findall(r"<h3>hours</h3><strong>(.*?)</strong><p>(.*?)</p>", (tmp_path / "page.html").read_text())
    assert cards == [("0.50", "GPU"), ("1.00", "CPU")]


@pytest.mark.parametrize("arguments", [["--beta1", "0"], ["--beta1", "nan"], ["--page", "p.html", "--diff", "x"]])
def test_the_commands_mistakes_name_the_option(tmp_path: Path, arguments: list[str]) -> None:
    code, output = vstar(tmp_path, *arguments)
    assert code == 2 and f"Invalid value for {arguments[0]}" in output
