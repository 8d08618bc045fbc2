"""Several sources of prompts: each has its share of every step, its own rows, format, reward and numbers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_apo.config import RecipeError, build_recipe, changed_for_resume
from megatron_apo.data.order import PromptWalk, step_prompts
from megatron_apo.learner.rollout_metrics import source_metrics
from megatron_apo.rewards.pool import RewardPool
from megatron_apo.rollout.evaluation import _evaluation
from megatron_apo.rollout.inputs import evaluation_fingerprint, load_inputs, store_fingerprint
from tests.batches import make_batch
from tests.chat import build_chat_tokenizer
from tests.models import make_model


def test_sources_of_one_size_are_shuffled_apart() -> None:
    drawn = PromptWalk([50, 50], [1, 1], seed=0).draw(100)
    one, other = ([index for source, index in drawn if source == own] for own in range(2))
    assert sorted(one) == sorted(other) == list(range(50)) and one != other


def test_one_source_is_walked_through_as_ever() -> None:
    walk = PromptWalk([7], [3.0], seed=2)
    for step in range(4):
        assert walk.draw(5) == [(0, index) for index in step_prompts(step, num_prompts=7, prompts_per_step=5, seed=2)]


@pytest.mark.parametrize("weights", [[1, 1], [1, 3], [0.2, 0.7, 0.1], [5, 1, 1, 1]])
def test_each_source_has_its_share_of_any_number_of_prompts(weights: list[float]) -> None:
    sizes, seen = [11, 5, 3, 2][: len(weights)], Counter[int]()
    orders: list[list[int]] = [[] for _ in sizes]
    walk = PromptWalk(sizes, weights, seed=1)
    for step in range(30):
        for source, index in walk.draw(6):
            seen[source] += 1
            orders[source].append(index)
            total = sum(seen.values())
            for one, weight in enumerate(weights):
                assert abs(seen[one] - total * weight / sum(weights)) < len(weights), (step, seen)
    for size, order in zip(sizes, orders, strict=True):
        for start in range(0, len(order) - size + 1, size):
            assert sorted(order[start : start + size]) == list(range(size)), "none repeats before all were there"


def in_order_of_time(count: int, weights: list[float]) -> list[tuple[int, int]]:
    """(source, place in its walk) of the first prompts: all of them, sorted."""
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    times = [((place + 0.5) / share, source, place) for source, share in enumerate(shares) for place in range(count)]
    return [(source, place) for _, source, place in sorted(times)[:count]]


@pytest.mark.parametrize(
    "weights",
    [[3], [1, 1], [1, 3], [0.2, 0.7, 0.1], [5, 1, 1, 1], [1000, 1], [0.001, 7, 0.3], [10] + [1] * 10],
    ids=str,
)
def test_a_step_has_its_part_of_all_prompts_in_order_of_time(weights: list[float], monkeypatch) -> None:
    monkeypatch.setattr("megatron_apo.data.order._shuffled", lambda place, size, seed, source=0: place)
    for size in (1, 6, 64):
        expected = in_order_of_time(40 * size, weights)
        walk = PromptWalk([9] * len(weights), weights, seed=1)
        assert [pair for _ in range(40) for pair in walk.draw(size)] == expected


def test_a_late_step_costs_no_more_than_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_at_once = []
    lexsort = np.lexsort
    monkeypatch.setattr(np, "lexsort", lambda keys: sorted_at_once.append(len(keys[0])) or lexsort(keys))
    for weights in ([1.0], [1.0, 3.0, 2.0]):
        for step in (0, 10**6):
            PromptWalk([7] * len(weights), weights, seed=1, drawn=256 * step).draw(256)
    assert max(sorted_at_once) < 300


# --- a recipe of two


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sources")
    model = make_model("qwen3", folder)
    build_chat_tokenizer().save_pretrained(model)
    words = write(folder / "words.jsonl", [{"question": f"{n}+1", "answer": f"so #### {n + 1}"} for n in range(6)])
    boxes = write(folder / "boxes.jsonl", [{"ask": f"{n}+2", "deep": {"truth": n + 2}} for n in range(3)])
    math = {"prompt_column": "ask", "answer_column": "deep.truth", "reward": {"name": "math"}}
    return {
        "model": {"path": model},
        "run": {"dir": folder / "run"},
        "vstar": {"dir": folder / "vstar"},
        "reward": {"name": "gsm8k"},
        "data": {
            "template": "raw",
            "train_sources": [
                {"name": "words", "path": words, "preset": "gsm8k", "prompt_format": "{prompt}=", "weight": 2},
                {"name": "boxes", "path": boxes, "weight": 1} | math,
            ],
            "eval_sources": [{"name": "held", "path": boxes, "max_prompts": 2} | math],
        },
    }


def test_held_out_sources_have_a_most_of_prompts_in_common_and_graders_of_their_own(tree: dict[str, Any]) -> None:
    """Unless a source says how many; training's sources have none."""
    train, held = tree["data"]["train_sources"][0], tree["data"]["eval_sources"][0]
    two = [held | {"max_prompts": None}, held | {"name": "one", "max_prompts": 1}]
    data = tree["data"] | {"train_sources": [train], "eval_sources": two}
    recipe = build_recipe(tree | {"data": data, "eval": {"max_prompts": 2}})
    assert [source.max_prompts for source in recipe.sources("eval")] == [2, 1]
    assert [source.max_prompts for source in recipe.sources("train")] == [None]
    assert [grader.name for grader in recipe.graders] == ["gsm8k", "math"]
    inputs = load_inputs(recipe)
    assert [prompt.source for prompt in inputs.evaluation.prompts] == ["held", "held", "one"]
    assert len(inputs.training.prompts) == 6


def test_rows_formats_and_rewards_are_a_sources_own(tree: dict[str, Any]) -> None:
    recipe = build_recipe(tree)
    inputs = load_inputs(recipe)
    told = [(prompt.source, prompt.text, prompt.answer) for prompt in inputs.training.prompts]
    assert told == [("words", f"{n}+1=", f"{n + 1}") for n in range(6)] + [
        ("boxes", f"{n}+2", f"{n + 2}") for n in range(3)
    ]
    assert [prompt.source for prompt in inputs.evaluation.prompts] == ["held"] * 2
    assert len({prompt.prompt_id for prompt in inputs.training.prompts + inputs.evaluation.prompts}) == 11
    responses = ["#### {}", "\\boxed{{{}}}"]
    rewards = []
    with RewardPool(recipe.reward, recipe.graders) as pool:
        for prompt in inputs.training.prompts:
            for response in responses:
                request = inputs.grade_request(prompt, [], "stop")
                answered = type(request)(**vars(request) | {"response": response.format(prompt.answer)})
                rewards.append(pool.grade([answered])[0].reward)
    assert rewards == [1, 0] * 6 + [0, 1] * 3


def test_a_store_knows_the_sources_formats_and_rewards(tree: dict[str, Any]) -> None:
    recipe = build_recipe(tree)
    inputs = load_inputs(recipe)
    fingerprint = store_fingerprint(recipe, inputs)
    assert [(one["name"], one["reward_name"], one["prompt_format"]) for one in fingerprint.sources or []] == [
        ("words", "gsm8k", "{prompt}="),
        ("boxes", "math", "{prompt}"),
    ]
    held = evaluation_fingerprint(recipe, inputs, recipe.run.dir / "memo.json", greedy=True)
    assert [one["name"] for one in held.sources or []] == ["held"]

    def differences(change: dict[str, Any], index: int = 0) -> list[str]:
        sources = [dict(one) for one in tree["data"]["train_sources"]]
        sources[index] |= change
        other = build_recipe(tree | {"data": tree["data"] | {"train_sources": sources}})
        return [
            line.partition(":")[0] for line in fingerprint.differences(store_fingerprint(other, load_inputs(other)))
        ]

    assert differences({}) == differences({"weight": 5}) == []
    assert differences({"reward": {"name": "gsm8k", "options": {"strict": False}}}) == ["sources"]
    assert differences({"prompt_format": "{prompt}+"}) == ["sources"]
    assert differences({"name": "others"}) == ["dataset_hash", "sources"]
    assert differences({"max_prompts": 2}, 1) == ["dataset_hash"]


def test_a_resumed_run_may_have_its_rows_elsewhere_but_no_other_weights(tree: dict[str, Any], tmp_path: Path) -> None:
    saved = build_recipe(tree)

    def changed(*overrides: str) -> list[str]:
        return [key for key, _, _ in changed_for_resume(build_recipe(tree, overrides), saved)]

    assert changed("data.train_sources.0.path=elsewhere.jsonl", "data.train_sources.1.answer_column=a") == []
    assert changed("data.train_sources.0.weight=3") == ["data.train_sources"]
    alone = build_recipe({}, ["model.path=m", "vstar.dir=v", "data.train=one.jsonl"])
    moved = build_recipe({}, ["model.path=m", "vstar.dir=v", "data.train=hub/name", "data.subset=main"])
    assert changed_for_resume(moved, alone) == []


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (
            "data.train=t.jsonl",
            "data.train: 't.jsonl' is not allowed; use null with data.train_sources, or leave these",
        ),
        (
            "data.eval=t.jsonl",
            "data.eval: 't.jsonl' is not allowed; use null with data.eval_sources, or leave these out",
        ),
        (
            "data.train_sources.1.name=words",
            "is not allowed; use names of their own for all sources, words is there tw",
        ),
        ("data.train_sources.1.weight=null", "is not allowed; use a weight for each source, or for none"),
        ("data.train_sources.1.name=a/b", "data.train_sources.1.name: 'a/b' is not allowed"),
        (
            "data.train_sources.1.subsett=x",
            "data.train_sources.1.subsett: unknown key; did you mean data.train_sources",
        ),
        ("data.train_sources.2.weight=1", "override data.train_sources.2.weight: 2 is none of the 2 there; use 0 to 1"),
        ("data.train_sources.0=1", "override data.train_sources.0: names a whole entry of a list; name a field of it"),
        (
            "data.preset=gsm8k",
            "data.preset: 'gsm8k' is of data.train, and data.train_sources are read by their own; set it there",
        ),
        ("data.max_prompts=9", "data.max_prompts: 9 is of data.train, and data.train_sources are read by their own"),
        ("data.train_sources=[]", "data.train: missing and has no default; set it in the recipe or with data.train="),
        (
            "data.train_sources.0.reward={name: math}",
            "data.train_sources.0.reward.name: math looks for \\boxed{}, and data.train_sources.0.preset=gsm8k asks "
            "for a number after ####; use data.train_sources.0.reward.name=gsm8k, or a data.train_sources.0.prompt_f",
        ),
    ],
)
def test_mistakes(tree: dict[str, Any], override: str, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        given = json.loads(json.dumps(tree, default=str))
        if "reward=" in override:
            del given["data"]["train_sources"][0]["prompt_format"]
        build_recipe(given, [override])
    (line,) = caught.value.problems
    assert problem in line, line


# --- numbers


def test_metrics_by_source() -> None:
    batch = make_batch([[1]] * 3, [[1, 2], [1, 2, 3], [4]], rewards=[1.0, 0.0, 0.5])
    assert source_metrics(batch, ["", "", ""]) == {}
    found = source_metrics(batch, ["a", "b", "a"])
    assert found["source/a/reward"] == 0.75 and found["source/b/reward"] == 0.0
    assert found["source/a/share"] == pytest.approx(2 / 3) and found["source/b/mean_tokens"] == 3.0


def test_an_evaluation_by_source() -> None:
    reward_PK, greedy_P = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]), np.array([1.0, 1.0, 0.0])
    is_cut_PK = np.array([[True, False], [False, False], [False, False]])
    whole = _evaluation(reward_PK, greedy_P, is_cut_PK, ["a", "b", "a"])
    assert whole.mean == pytest.approx(0.5) and whole.num_prompts == 3
    assert (whole.sources["a"].mean, whole.sources["a"].greedy, whole.sources["a"].truncated) == (0.25, 0.5, 0.25)
    assert (whole.sources["b"].mean, whole.sources["b"].num_prompts) == (1.0, 1)
    assert _evaluation(reward_PK, greedy_P, is_cut_PK, ["", "", ""]).sources == {}
