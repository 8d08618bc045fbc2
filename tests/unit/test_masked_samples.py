"""Stage 1 with reward.truncated=mask: a sample cut at the length cap is stored and is in nothing that is derived.

Brute force is the same store without these samples, prompt by prompt.
"""

from __future__ import annotations

from dataclasses import replace
from math import isnan, nan
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_apo.cli import app
from megatron_apo.config import AdaptiveConfig, RewardConfig, build_recipe
from megatron_apo.data.prompts import Prompt
from megatron_apo.rewards import GradeRequest
from megatron_apo.rewards.pool import TRUNCATED, UNFINISHED, Grade, InlineRewardPool
from megatron_apo.rollout.training_data import TrainingData
from megatron_apo.values.estimators import ESTIMATORS
from megatron_apo.values.fingerprint import Fingerprint, StoreError
from megatron_apo.values.samples import SampledRewards
from megatron_apo.values.sampling import more_samples
from megatron_apo.values.store import StoreRow, StoreWriter, VStarStore
from megatron_apo.values.summary import compare, compare_estimators, pass_at_k, summarize
from tests.stores import FINGERPRINT

MASKS = FINGERPRINT.model_copy(
    update={"truncated": "mask", "adaptive": {"stderr": 0.1, "step": 1, "most": 5}, "samples_per_prompt": 3}
)
NONE = 2  # the prompt without V*
DRAWN = [[0.0, nan, 1.0], [1.0, 1.0, 0.0], [nan, nan, nan, nan], [nan, 1.0, 1.0, 0.0, 0.0], [0.0, nan, nan, nan, 0.0]]
KNOWN = [[reward for reward in row if not isnan(reward)] for row in DRAWN]


def prompt_id(number: int) -> str:
    return f"{number:032x}"


def rows(drawn: list[list[float]]) -> list[StoreRow]:
    reasons = [["length" if isnan(reward) else "stop" for reward in row] for row in drawn]
    lengths = [[32 if reason == "length" else 5 for reason in row] for row in reasons]
    found = zip(range(len(drawn)), drawn, lengths, reasons, strict=True)
    return [StoreRow(prompt_id(number), "0" * 32, *row) for number, *row in found]


def make_store(folder: Path, drawn: list[list[float]] = DRAWN, fingerprint: Fingerprint = MASKS) -> VStarStore:
    writer = StoreWriter(folder, fingerprint, num_shards=1)
    writer.write_shard(0, rows(drawn))
    return writer.finish()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> VStarStore:
    return make_store(tmp_path_factory.mktemp("masked") / "vstar")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimate_is_that_of_the_samples_that_are_not_masked(name: str, store: VStarStore) -> None:
    with_some = [row for row in KNOWN if row]
    expected = ESTIMATORS[name](SampledRewards.of_rows(with_some), 0.5).tolist()
    expected.insert(NONE, nan)
    assert store.values(0.5, name).values_P.tolist() == pytest.approx(expected, nan_ok=True)


def test_a_prompt_of_masked_samples_alone_has_no_value_and_is_in_no_filter(store: VStarStore) -> None:
    values = store.values(0.5, "log_mean_exp")
    with pytest.raises(StoreError, match=f"prompt {prompt_id(NONE)} has no V\\*: each of its responses was cut"):
        values.lookup([prompt_id(1), prompt_id(NONE)])
    assert values[prompt_id(4)] == 0.0
    assert store.without_value().tolist() == [False, False, True, False, False]
    expected = {"none": [NONE], "all_wrong": [NONE, 4], "all_right": [NONE], "both": [NONE, 4]}
    assert {name: store.filtered_ids(name) for name in expected} == {
        name: {prompt_id(number) for number in numbers} for name, numbers in expected.items()
    }
    # Of those that are not masked half and two thirds are right, of the fourth prompt half.
    assert store.filtered_ids("success_rate", (0.45, 0.6)) == {prompt_id(number) for number in (1, NONE, 4)}


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5])
def test_the_first_samples_are_those_that_were_drawn_first(num: int, store: VStarStore) -> None:
    """What sampling no more than these would have given: masked ones count."""
    found = VStarStore.open(store.folder, samples_used=num)
    expected = [[reward for reward in row[:num] if not isnan(reward)] for row in DRAWN]
    assert found.rewards.counts_P.tolist() == [len(row) for row in expected]
    assert found.rewards.flat.tolist() == [reward for row in expected for reward in row]


def test_a_summary_is_of_the_samples_that_are_not_masked(store: VStarStore) -> None:
    found = summarize(store, [0.5], "mean")
    assert (found.prompts, found.without_value, found.samples.fewest, found.samples.most) == (5, 1, 3, 5)
    assert found.responses.truncated == pytest.approx(9 / 20) and found.responses.count == 20
    first = [[0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0], [0.0]]
    assert found.first_round == 3 and found.reward.mean == pytest.approx(np.mean([np.mean(row) for row in first]))
    assert (found.reward.num_prompts, found.binary) == (4, True)
    assert found.values[0].mean == pytest.approx(np.mean([1 / 2, 2 / 3, 1 / 2, 0]))
    assert sum(found.values[0].bars.counts) == sum(found.right.counts) == 4
    # k of the first round, of the prompts that have k of it; then of all samples: one prompt has 4.
    assert {k: at.num_prompts for k, at in found.pass_at_k.items()} == {1: 4, 2: 3, 3: 1, 4: 1}
    assert found.pass_at_k[2].mean == pytest.approx(1.0)
    assert found.left_out["all_wrong"].prompts == 1
    (at,) = compare_estimators(store, [0.5])
    assert at.means["mean"] == found.values[0].mean and not any(isnan(value) for value in at.means.values())


def test_the_same_pass_at_k_without_masked_samples() -> None:
    """Of one round, masking is leaving the samples out."""
    assert pass_at_k(SampledRewards.of_rows(DRAWN), 5) == pass_at_k(SampledRewards.of_rows([r for r in KNOWN if r]), 5)


def test_two_stores_are_compared_with_what_is_masked(store: VStarStore, tmp_path: Path) -> None:
    assert compare(store, store, [0.5], "mean").same_rewards
    other = [list(row) for row in DRAWN]
    other[0][1], other[NONE][0] = 0.0, 1.0
    found = compare(store, make_store(tmp_path / "other", other), [0.5], "mean")
    assert (found.num_changed, found.num_rewards, found.same_rewards) == (2, 2, False)
    (at,) = found.values
    assert at.largest == pytest.approx(1 / 2 - 1 / 3) and at.mean_absolute == pytest.approx((1 / 2 - 1 / 3) / 4)
    assert {one.prompt_id: one.mean_rewards for one in found.most}[prompt_id(NONE)] == (None, 1.0)


@pytest.mark.parametrize("option", [None, "--json", "--diff", "--page"])
def test_the_command_shows_such_a_store(option: str | None, store: VStarStore, tmp_path: Path) -> None:
    given = {None: [], "--diff": [str(store.folder)], "--page": [str(tmp_path / "page.html")]}
    arguments = [*([option] if option else []), *given.get(option, [])]
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["vstar", str(store.folder), *arguments])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "page.html").read_text() if option == "--page" else result.output
    assert "NaN" not in text and ">nan" not in text
    if option is None:
        assert "without V*           1 prompts" in result.output


def test_a_store_of_masked_samples_alone_is_refused_in_a_line(tmp_path: Path) -> None:
    found = make_store(tmp_path / "vstar", [[nan] * 3] * 4)
    with pytest.raises(StoreError, match="cut at the length cap.*raise sampling.max_response_tokens") as caught:
        summarize(found, [0.5], "mean")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"vstar.dir: 4 of 4 prompts have no V\*.*raise sampling.max_response_tokens"):
        training_data(found)


def training_data(store: VStarStore, *overrides: str) -> TrainingData:
    hashes = [one.hex() for one in store.column("text_hash").to_pylist()]
    prompts = [Prompt(one, "", hashed, (), "", 0) for one, hashed in zip(store.prompt_ids, hashes, strict=True)]
    recipe = build_recipe({}, ["model.path=m", "data.train=t", "vstar.dir=v", *overrides])
    return TrainingData.of(recipe, SimpleNamespace(training=SimpleNamespace(prompts=prompts)), store)


def test_training_leaves_out_a_prompt_without_a_value_and_says_so(store: VStarStore, capsys) -> None:
    data = training_data(store)
    assert [prompt.prompt_id for prompt in data.prompts] == [prompt_id(number) for number in (0, 1, 3, 4)]
    assert "vstar.dir: 1 of 5 prompts have no V*: each of its responses was cut" in capsys.readouterr().out
    assert [prompt.prompt_id for prompt in training_data(store, "vstar.filter=all_wrong").prompts] == [
        prompt_id(number) for number in (0, 1, 3)
    ]


@pytest.mark.parametrize(
    ("of_others", "says"),
    [
        ([NONE], "vstar.dir: no prompt of source others has a V*: each of its responses was cut"),
        ([NONE, 4], "vstar.filter: all_wrong leaves no prompt of source others; choose another filter"),
    ],
)
def test_a_source_that_is_left_out_whole_and_why(of_others: list[int], says: str, store: VStarStore) -> None:
    names = ["others" if number in of_others else "first" for number in range(len(DRAWN))]
    prompts = [Prompt(prompt_id(n), "", "0" * 32, (), "", 0, name) for n, name in enumerate(names)]
    sources = [{"name": name, "path": "t"} for name in ("first", "others")]
    recipe = build_recipe(
        {"model": {"path": "m"}, "data": {"train_sources": sources}, "vstar": {"dir": "v", "filter": "all_wrong"}}
    )
    with pytest.raises(ValueError) as caught:
        TrainingData.of(recipe, SimpleNamespace(training=SimpleNamespace(prompts=prompts)), store)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_sources_of_recorded_prompts_that_the_filter_leaves_out(store: VStarStore) -> None:
    data = training_data(store, "vstar.filter=all_wrong")
    assert 4 not in [int(prompt.prompt_id, 16) for prompt in data.prompts]
    assert data.source_names(SimpleNamespace(prompt_ids=(prompt_id(4), prompt_id(0)))) == ["", ""]


@pytest.mark.parametrize(
    ("fingerprint", "reward", "reason"),
    [
        (MASKS, nan, "stop"),
        (MASKS, 1.0, "length"),
        (MASKS, float("inf"), "length"),
        (FINGERPRINT, nan, "length"),
        (MASKS.model_copy(update={"purpose": "eval"}), nan, "length"),
    ],
)
def test_a_reward_is_nan_where_the_sample_is_masked_and_nowhere_else(fingerprint, reward, reason, tmp_path) -> None:
    num = fingerprint.samples_per_prompt
    writer = StoreWriter(tmp_path, fingerprint, 1)
    good = StoreRow(prompt_id(0), "0" * 32, [1.0] * num, [4] * num, ["stop"] * num)
    with pytest.raises(StoreError, match="reward"):
        bad = replace(good, rewards=[reward, *good.rewards[1:]], finish_reasons=[reason, *good.finish_reasons[1:]])
        writer.write_shard(0, [bad])
    writer.write_shard(0, [good])


# ---- how many samples


def adaptive(**changes) -> AdaptiveConfig:
    return AdaptiveConfig(**({"stderr": 0.1, "step": 4, "most": 24, "all_wrong": 8} | changes))


@pytest.mark.parametrize("known", [[1.0] * 8, [0.0] * 6, [0.0, 1.0, 1.0, 0.0], [0.0] * 8, [1.0]])
@pytest.mark.parametrize("masked", [1, 3])
def test_a_masked_sample_makes_nothing_more_certain(masked: int, known: list[float]) -> None:
    drawn = [nan, *known, *[nan] * (masked - 1)]
    for config in (adaptive(), adaptive(stderr=0.2), adaptive(stderr=0.3, all_wrong=0)):
        assert more_samples(drawn, 4, config) == more_samples(known, 4, config)


@pytest.mark.parametrize("most", [4, 7, 24])
def test_rounds_of_masked_samples_end_at_the_most(most: int) -> None:
    taken: list[float] = []
    while more := more_samples(taken, 4, adaptive(most=most)):
        taken += [nan] * more
    assert len(taken) == most
    assert more_samples([nan] * 4, 4, None) == 0


# ---- grades


@pytest.mark.parametrize(
    ("rule", "masks", "finished", "unfinished"),
    [
        ("mask", True, Grade(nan, TRUNCATED), Grade(nan, TRUNCATED)),
        ("mask", False, Grade(1.0), Grade(-1.0, UNFINISHED)),
        ("fail", True, Grade(-1.0, TRUNCATED), Grade(-1.0, UNFINISHED)),
    ],
)
def test_a_truncated_response_has_no_grade_where_it_is_masked(rule, masks, finished, unfinished) -> None:
    config = RewardConfig(name="gsm8k", truncated=rule, failure_reward=-1.0)
    expected = {
        ("<think>1+1=2</think>#### 2", "length"): finished,
        ("<think>1+1=2", "length"): unfinished,
        ("<think>1+1=2</think>#### 2", "stop"): Grade(1.0),
    }
    with InlineRewardPool(config) as pool:
        grades = [
            pool.submit(GradeRequest("(1+1)", response, "2", reason), masks=masks) for response, reason in expected
        ]
        while not all(grade.done() for grade in grades):
            pool.poll(wait_s=1.0)
    for grade, theirs in zip(grades, expected.values(), strict=True):
        ours = grade.result()
        assert (ours.failure, ours.is_graders_failure) == (theirs.failure, False)
        assert ours.reward == pytest.approx(theirs.reward, nan_ok=True)
