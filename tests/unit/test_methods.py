"""Each method's section of a recipe is the method's own: its keys and their defaults; and what of it is refused."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import pytest

from megatron_apo.config import RecipeError, build_recipe, changed_for_resume, describe_fields
from megatron_apo.objectives import OBJECTIVES, Objective, build_objective

PATHS = ["model.path=m", "data.train=t", "vstar.dir=v", "sampling.max_response_tokens=77"]
METHODS = sorted(OBJECTIVES.keys() - {"sft"})  # which is the warm start's
OTHERS = {"name", "baseline", "critic"}  # not the objective's


def built(*overrides: str) -> Objective:
    recipe = build_recipe({}, [*PATHS, *overrides])
    return build_objective(recipe.objective, max_response_tokens=recipe.sampling.max_response_tokens)


@pytest.mark.parametrize("name", METHODS)
def test_a_section_has_the_methods_keys_and_defaults(name: str) -> None:
    section = type(build_recipe({}, [*PATHS, f"objective.name={name}"]).objective)
    keys = {key: field.default for key, field in section.model_fields.items() if key not in OTHERS}
    own = {field.name: field.default for field in fields(OBJECTIVES[name])}  # type: ignore[arg-type]
    if own.pop("max_response_tokens", None) is MISSING:
        assert built(f"objective.name={name}").max_response_tokens == 77  # type: ignore[attr-defined]
    assert keys == own
    assert built(f"objective.name={name}") == (
        OBJECTIVES[name](max_response_tokens=77)
        if hasattr(built(f"objective.name={name}"), "max_response_tokens")
        else OBJECTIVES[name]()
    )


def test_every_method_can_be_named() -> None:
    (name,) = [text for key, _, text in describe_fields() if key == "objective.name"]
    assert sorted(name.partition(": ")[2].split(", ")) == METHODS


def test_a_method_gets_what_a_recipe_says() -> None:
    objective = built("objective.name=grpo", "objective.clip_high=0.3", "objective.samples_per_prompt=4")
    assert (objective.clip_high, objective.clip_low, objective.samples_per_prompt) == (0.3, 0.2, 4)  # type: ignore[attr-defined]
    assert built("objective.beta2=0.02", "objective.loss_scale=unit") == OBJECTIVES["apo"](0.02, "unit")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["objective.name=grop"], "objective.name: 'grop' is not allowed; use one of 'apo', 'grpo', "),
        (["objective.name=grpo", "objective.clip_lo=0.1"], "objective.clip_lo: unknown key; did you mean objective.cl"),
        (["objective.clip_low=0.1"], "objective.clip_low: unknown key; known keys: name, beta2, loss_scale, "),
        (["objective.name=dapo", "objective.clip_low=0"], "objective.clip_low: 0 is not allowed; use greater than 0"),
        (["objective.name=rloo", "objective.samples_per_prompt=1"], "objective.samples_per_prompt: 1 is not allowed; "),
        (["objective=3"], "objective: 3 is not allowed; use a section"),
        (["objective.name=3"], "objective.name: '3' is not allowed; use one of "),
        (
            ["objective.baseline.sauce=kernel"],
            "objective.baseline.sauce: unknown key; did you mean objective.b",
        ),
        (["objective.baseline.source=past"], "objective.baseline.source: 'past' is not allowed; use 'vstar', "),
        (["objective.name=ppo", "objective.whiten=1"], "objective.whiten: 1 is not allowed; use true or false"),
    ],
)
def test_a_mistake_is_one_line_with_the_key_as_it_was_written(overrides: list[str], line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build_recipe({}, [*PATHS, *overrides])
    (problem,) = caught.value.problems
    assert problem.startswith(line) and "\n" not in problem


@pytest.mark.parametrize(
    ("overrides", "needs"),
    [
        ([], True),
        (["objective.name=reinforce"], True),
        (["objective.baseline.source=kernel"], False),
        (["objective.name=reinforce", "objective.baseline.source=batch_mean"], False),
        (["objective.name=grpo"], False),
        (["objective.name=ppo", "vstar.filter=both"], True),
    ],
)
def test_who_asks_for_a_store(overrides: list[str], needs: bool) -> None:
    assert build_recipe({}, [*PATHS, *overrides]).needs_store is needs


def test_another_method_is_another_run() -> None:
    def changed(*overrides: str) -> list[tuple[str, Any, Any]]:
        return changed_for_resume(build_recipe({}, [*PATHS, *overrides]), build_recipe({}, PATHS))

    assert changed("objective.name=grpo") == [("objective.name", "grpo", "apo")]
    assert changed("objective.beta2=0.1") == [("objective.beta2", 0.1, 1e-3)]
    assert changed("objective.baseline.source=kernel")[0][0] == "objective.baseline"


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_reads_back_what_it_wrote(name: str) -> None:
    recipe = build_recipe({}, [*PATHS, f"objective.name={name}"])
    assert build_recipe(recipe.model_dump(mode="json")) == recipe
