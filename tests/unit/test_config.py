"""The recipe: defaults, overrides, and every mistake named at once."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_apo.config import (
    RECIPES,
    RecipeError,
    build_recipe,
    changed_for_resume,
    describe_fields,
    fields_marked,
    load_recipe,
    recipe_path,
)
from megatron_apo.values.fingerprint import Fingerprint

PATHS = ["model.path=m", "data.train=t.jsonl", "vstar.dir=v"]


def problems_of(tree: Any, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        build_recipe(tree, overrides)
    return caught.value.problems


def test_defaults_are_the_papers() -> None:
    recipe = build_recipe({}, PATHS)
    assert (recipe.vstar.beta1, recipe.objective.beta2, recipe.vstar.samples_per_prompt) == (0.5, 1e-3, 8)
    assert (recipe.train.prompts_per_step, recipe.train.minibatches, recipe.optimizer.lr) == (256, 2, 1e-6)
    assert (recipe.sampling.temperature, recipe.sampling.top_p, recipe.sampling.top_k) == (1, 1, -1)
    assert recipe.model.reference_path == Path("m")


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optimizer.lr=1e-4", "optimizer", "lr", 1e-4),  # YAML 1.1 reads this as a string
        ("data.system=End with #### and the number.", "data", "system", "End with #### and the number."),
        ("data.system=#### comes last", "data", "system", "#### comes last"),
        ("data.system='a # b'", "data", "system", "a # b"),
        ("data.system=two # three", "data", "system", "two # three"),
        ("train.packing=false", "train", "packing", False),
        ("data.eval=null", "data", "eval", None),
        ("rollout.extra_args=[--seed, '3']", "rollout", "extra_args", ["--seed", "3"]),
        ("reward.options.tolerance=0.1", "reward", "options", {"tolerance": 0.1}),
        ("data.train=a=b.jsonl", "data", "train", "a=b.jsonl"),
    ],
)
def test_overrides_are_yaml_values(override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(build_recipe({}, [*PATHS, override]), section), key) == value


def test_a_store_is_in_its_run_where_a_recipe_does_not_say() -> None:
    tree = {"model": {"path": "m"}, "data": {"train": "t"}}
    assert build_recipe(tree).vstar.dir == Path("runs/apo/vstar")
    assert build_recipe(tree | {"run": {"dir": "here"}}).vstar.dir == Path("here/vstar")
    assert build_recipe(tree, ["run.dir=there"]).vstar.dir == Path("there/vstar")
    assert build_recipe(tree, ["run.dir=there", "vstar.dir=elsewhere"]).vstar.dir == Path("elsewhere")
    for wrong in ({"run": {"dir": 3}}, {"run": 3}, {"vstar": []}):
        (name,) = wrong
        assert any(line.startswith(name) for line in problems_of(tree | wrong)), wrong


def test_all_problems_are_said_at_once() -> None:
    problems = problems_of({"trian": {}, "train": {"stps": 3}}, "optimizer.lr=-1", "parallel.tp=two", "nonsense")
    starts = ["override 'nonsense'", "trian:", "train.stps:", "optimizer.lr:", "parallel.tp:"]
    starts += ["model.path:", "data.train:"]
    for start in starts:
        assert sum(problem.startswith(start) for problem in problems) == 1, (start, problems)
    assert len(problems) == len(starts)
    assert all("\n" not in problem for problem in problems)


def test_a_problem_names_key_value_allowed_and_fix() -> None:
    (unknown,) = problems_of({}, *PATHS, "train.stps=3")
    assert unknown == "train.stps: unknown key; did you mean train.steps?"
    (optional,) = problems_of({}, *PATHS, "vstar.adaptive.stdder=0.1")
    assert optional == "vstar.adaptive.stdder: unknown key; did you mean vstar.adaptive.stderr?"
    (choice,) = problems_of({}, *PATHS, "vstar.estimator=median")
    assert (
        choice
        == "vstar.estimator: 'median' is not allowed; use 'log_mean_exp', 'debiased', 'beta_smoothed', 'mean' or 'max'"
    )
    (number,) = problems_of({}, *PATHS, "vstar.beta1=0")
    assert number == "vstar.beta1: 0 is not allowed; use greater than 0"


@pytest.mark.parametrize(
    ("overrides", "key", "fix"),
    [
        (["train.prompts_per_step=6", "train.minibatches=2", "parallel.dp=2"], "train.prompts_per_step", "8"),
        # A group's responses may go to several replicas; a minibatch takes whole groups.
        (
            ["train.prompts_per_step=6", "parallel.dp=8", "objective.name=rloo", "train.minibatches=2"],
            "train.prompts_per_step",
            "4",
        ),
        (["data.max_prompt_tokens=5000"], "train.tokens_per_micro_batch", "6024"),  # 5000 + 1024
        (["rollout.port=65535", "rollout.replicas=3"], "rollout.port", "65533"),
        (
            ["rollout.max_num_seqs=5000", "rollout.max_num_batched_tokens=4000"],
            "rollout.max_num_batched_tokens",
            "5000",
        ),
        # Padded to a multiple of 2 x CP; 65 + 1023 tokens are 1088 without.
        (
            ["parallel.cp=3", "data.max_prompt_tokens=65", "sampling.max_response_tokens=1023"]
            + ["train.tokens_per_micro_batch=1088"],
            "train.tokens_per_micro_batch",
            "1092",
        ),
        (["parallel.pp=3", "parallel.vpp=2", "sync.probe_sequences=9"], "train.prompts_per_step", "252"),
        (["parallel.pp=4", "parallel.vpp=2", "sync.probe_sequences=6"], "sync.probe_sequences", "8"),
        (
            ["parallel.pp=4", "parallel.vpp=2", "warmup.data=x.jsonl", "warmup.sequences_per_step=6"],
            "warmup.sequences_per_step",
            "8",
        ),
        (["parallel.pp=2", "parallel.vpp=2", "train.packing=false"], "train.packing", "true"),
        (["train.target_reward=1", "train.steps=3", "train.target_responses=769"], "train.target_responses", "768"),
        (["eval.overlapped=true", "rollout.sleep_while_training=true"], "eval.overlapped", "false"),
        (["parallel.vpp=2"], "parallel.vpp", "1"),
        (["parallel.ep=4", "parallel.dp=3", "parallel.cp=2", "train.prompts_per_step=12"], "parallel.ep", "3"),
        (["optimizer.lr=1e-6", "optimizer.min_lr=1e-5"], "optimizer.min_lr", "1e-7"),
        (["model.layers=te"], "model.layers", "local"),
        (["model.fp8={}"], "model.fp8", "null"),
        (["model.fp8={}", "model.dtype=bf16", "model.layers=local"], "model.fp8", "null"),
        (["parallel.tp=2", "parallel.sequence_parallel=true"], "parallel.sequence_parallel", "false"),
        (
            ["parallel.tp=2", "parallel.sequence_parallel=true", "model.dtype=bf16", "model.layers=local"],
            "parallel.sequence_parallel",
            "false",
        ),
        (
            ["model.dtype=bf16", "model.fp8.param_gather=true", "optimizer.distributed=false"],
            "model.fp8.param_gather",
            "false",
        ),
        (["vstar.samples_used=9"], "vstar.samples_used", "8"),
        (["vstar.samples_used=65", "vstar.adaptive.stderr=0.1"], "vstar.samples_used", "64"),
        (["vstar.adaptive.most=6", "vstar.adaptive.all_wrong=0"], "vstar.adaptive.most", "8"),
        (["vstar.adaptive.most=12", "vstar.adaptive.all_wrong=13"], "vstar.adaptive.all_wrong", "12"),
    ],
)
def test_combinations_that_cannot_work(overrides: list[str], key: str, fix: str) -> None:
    (problem,) = problems_of({}, *PATHS, *overrides)
    assert problem.startswith(f"{key}: ")
    build_recipe({}, [*PATHS, *overrides, f"{key}={fix}"])  # what the message asks for is enough


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.dtype=bf16", "model.fp8={}", "model.layers=te"],
        ["model.dtype=bf16", "model.fp8={}"],
        ["model.dtype=bf16", "model.layers=te", "parallel.tp=2", "parallel.sequence_parallel=true"],
        ["parallel.ep=4", "parallel.dp=2", "parallel.cp=2"],
        ["parallel.pp=2", "parallel.vpp=2"],
    ],
)
def test_combinations_that_work_are_taken(overrides: list[str]) -> None:
    build_recipe({}, [*PATHS, *overrides])


def test_delayed_scaling_is_refused_with_the_reason() -> None:
    (problem,) = problems_of({}, *PATHS, "model.dtype=bf16", "model.fp8.recipe=delayed")
    assert problem.startswith("model.fp8.recipe: 'delayed' is not allowed; use 'tensorwise', 'blockwise' or 'mxfp8': ")
    assert "the reference has none" in problem
    (typo,) = problems_of({}, *PATHS, "model.dtype=bf16", "model.fp8.recipe=blockwize")
    assert typo == "model.fp8.recipe: 'blockwize' is not allowed; use 'tensorwise', 'blockwise' or 'mxfp8'"


def test_the_callers_tree_is_left_alone() -> None:
    tree: dict[str, Any] = {"train": {"steps": 1}}
    build_recipe(tree, [*PATHS, "train.steps=2"])
    assert tree == {"train": {"steps": 1}}


def test_save_and_load_give_the_same_recipe(tmp_path: Path) -> None:
    recipe = build_recipe({}, [*PATHS, "optimizer.lr=3e-5", "sampling.stop_token_ids=[1, 2]"])
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "top level is a list"),
        ("a: [", "not YAML"),
        ("train: 3", "train: 3"),
        ("a: " + "9" * 5000, "not YAML"),
        ("[" * 5000, "not YAML"),
        ("reward: {options: {a: !!set {b}}}", "not YAML"),
        ("reward: {options: {a: !!binary aGk=}}", "not YAML"),
        ("data: {system: caf\udce9}", "r.yaml is not YAML: 'utf-8' codec can't decode"),
        ("1: 2", "^1: 1 is not allowed; use text as a key$"),
        ("run: {dir: 12}", "^run.dir: 12 is not allowed; use text, which a path is$"),
        ("train: 3", "^train: 3 is not allowed; use keys with their values$"),
        (
            "run: {dir: ~/runs}",
            "^run.dir: '~/runs' is not allowed; use a path with ~ written out, or . for this folder$",
        ),
        ("run: {dir: ''}", "^run.dir: '' is not allowed; use a path with ~ written out, or . for this folder$"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "r.yaml").write_text(text, errors="surrogateescape")
    with pytest.raises(RecipeError, match=says):
        load_recipe(tmp_path / "r.yaml", PATHS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "data:\n  system: End with #### and the number.\n",
            "data.system: 'End with' ends before '#### and the number.'",
        ),
        ("data:\n  system: Use words # like these\n", "data.system: 'Use words' ends before '# like these'"),
        ("data:\n  system: #### first\n", "data.system: '' ends before '#### first'"),
        ("data: {system: a b} \nmodel: {path: m}\ndata: {system: c}\n", "data: twice in the recipe, in lines 1 and 3"),
        ("train:\n  steps: 1\n  lr: 2\n  steps: 3\n", "train.steps: twice in the recipe, in lines 2 and 4; keep one"),
    ],
)
def test_what_yaml_would_read_otherwise_than_it_looks(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.yaml", PATHS)
    assert caught.value.problems[0].startswith(says)


@pytest.mark.parametrize(
    "line", ["system: 'a b # c'", "system: word  # a comment", "system:  # filled in later", "system: |\n    a # b"]
)
def test_comments_that_cut_nothing(tmp_path: Path, line: str) -> None:
    (tmp_path / "r.yaml").write_text(f"data:\n  {line}\n")
    assert load_recipe(tmp_path / "r.yaml", PATHS).data.system in ("a b # c", "word", None, "a # b\n")


def test_a_day_is_the_same_however_it_is_written(tmp_path: Path) -> None:
    """YAML reads it as a date, unless it is in quotes, as what is saved has it."""
    for number, line in enumerate(("date: 2024-07-26", "date: '2024-07-26'")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(f"model: {{path: m}}\ndata:\n  train: t\n  {line}\nvstar: {{dir: v}}\n")
        assert load_recipe(path).data.date == date(2024, 7, 26)
    recipe = build_recipe({}, [*PATHS, "data.date=2024-07-26"])
    recipe.save(tmp_path / "recipe.yaml")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe and changed_for_resume(recipe, again) == []


@pytest.mark.parametrize("value", ["2024-02-30", "26 Jul 2024", "20240726", "2024-W30-5", "2024-07-26 10:00:00", "0"])
def test_what_is_no_day(value: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build_recipe({}, [*PATHS, f"data.date={value}"])
    (problem,) = caught.value.problems
    assert problem.startswith("data.date: ")
    assert problem.endswith(" is not allowed; use a day as YYYY-MM-DD, such as 2024-07-26, or null")


def test_empty_sections_are_defaults(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("train:\n")
    assert load_recipe(tmp_path / "r.yaml", PATHS) == build_recipe({}, PATHS)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    given = [] if "train" in yaml.safe_load(path.read_text()).get("data", {}) else PATHS
    assert load_recipe(path.stem, given) == load_recipe(path, given)


def test_an_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(RecipeError, match="nowhere is not a file nor one of the recipes here: .*quickstart"):
        recipe_path("nowhere")


def test_every_field_is_described() -> None:
    rows = describe_fields()
    assert ("train.steps", "200", "rollout batches") in rows
    assert ("vstar.adaptive.step", "4", "samples of a further round") in rows
    assert "vstar.adaptive" in [key for key, _, _ in rows]
    assert [key for key, _, description in rows if not description] == []


def test_what_fields_are_to_a_store_is_what_a_store_keeps() -> None:
    """Each value that a fingerprint takes from the recipe is marked so at its field, by the name it has there."""
    names = list(fields_marked("fingerprint").values())
    assert len(set(names)) == len(names) and set(names) <= set(Fingerprint.model_fields)
    behind = {name for found in fields_marked("behind_fingerprint").values() for name in found}
    assert set(Fingerprint.model_fields) - set(names) - behind == {"schema_version", "reward_version", "purpose"}
    assert behind <= set(Fingerprint.model_fields) - set(names)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_a_changed_field_is_named_unless_it_may_change() -> None:
    """Every field of every section, one at a time."""
    saved = build_recipe({}, ["model.path=m", "data.train=t", "vstar.dir=v", "optimizer.schedule=constant"])
    free = fields_marked("resume")
    for section_name in type(saved).model_fields:
        section = getattr(saved, section_name)
        for key in type(section).model_fields:
            name = f"{section_name}.{key}"
            changed = saved.model_copy(update={section_name: section.model_copy(update={key: "another value"})})
            named = [found for found, _, _ in changed_for_resume(changed, saved)]
            assert named == ([] if name in free or section_name in free else [name]), name
    decaying = build_recipe({}, ["model.path=m", "data.train=t", "vstar.dir=v", "optimizer.schedule=linear"])
    longer = decaying.model_copy(update={"train": decaying.train.model_copy(update={"steps": 1000})})
    assert changed_for_resume(longer, decaying) == [("train.steps", 1000, 200)]
