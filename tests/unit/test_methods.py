"""Each method's section of a recipe is the method's own: its keys and their defaults; and what of it is refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml

from megatron_apo import preflight
from megatron_apo.config import BaselineConfig, RecipeError, build_recipe, changed_for_resume, describe_fields
from megatron_apo.learner import learner as learner_module
from megatron_apo.learner.known import by_minibatch
from megatron_apo.learner.learner import Learner
from megatron_apo.objectives import OBJECTIVES, Objective, objective_of
from megatron_apo.rollout import replay
from tests.batches import make_batch
from tests.models import make_model
from tests.specs import model_spec

PATHS = ["model.path=m", "data.train=t", "vstar.dir=v", "sampling.max_response_tokens=77"]
METHODS = sorted(OBJECTIVES.keys() - {"sft"})  # which is the warm start's
DOCS = Path(__file__).parents[2] / "docs" / "methods"
OTHERS = {"name", "baseline", "critic"}  # not the objective's


def built(*overrides: str) -> Objective:
    recipe = build_recipe({}, [*PATHS, *overrides])
    return objective_of(recipe)


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


def test_another_method_by_an_override_has_none_of_the_recipes_own_settings() -> None:
    whole = build_recipe({}, [*PATHS, "objective.beta2=0.02"]).model_dump(mode="json")
    other = build_recipe(whole, ["objective.clip_low=0.1", "objective.name=grpo"]).objective
    assert (other.name, other.clip_low, other.clip_high) == ("grpo", 0.1, 0.2)  # type: ignore[union-attr]
    assert build_recipe(whole, ["objective.name=apo"]).objective.beta2 == 0.02  # type: ignore[union-attr]
    with pytest.raises(RecipeError, match="objective.beta2: unknown key"):
        build_recipe(whole, ["objective.name=grpo", "objective.beta2=0.1"])


def test_people_read_a_methods_name_and_what_it_takes_off_the_rewards() -> None:
    sections = [build_recipe({}, [*PATHS, f"objective.name={name}"]).objective for name in METHODS]
    assert len({section.title for section in sections}) == len(METHODS)
    told = {section.name for section in sections if section.taken_off}
    assert told == {name for name in METHODS if "advantage/mean" in built(f"objective.name={name}").told}
    own = [*PATHS, "objective.samples_per_prompt=2"]
    sources = get_args(BaselineConfig.model_fields["source"].annotation)
    titles = [build_recipe({}, [*own, f"objective.baseline.source={one}"]).objective.taken_off for one in sources]
    assert titles[0] == "V*" and len(set(titles)) == len(sources) and None not in titles


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


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["objective.name=tbrm", "sampling.temperature=0.7"], "sampling.temperature: 0.7, but objective.name=tbrm "),
        (["objective.name=tbrm", "sampling.temperature=1.5"], "sampling.temperature: 1.5, but objective.name=tbrm "),
        (
            ["objective.name=ppo", "model.dtype=bf16", "objective.critic.optimizer.cpu_offload=0.5"],
            "objective.critic.optimizer.cpu_offload: 0.5 was never tried; use 0",
        ),
        (["objective.name=tbrm", "train.importance=token"], "train.importance: token would not reach the raw logit"),
        (
            ["objective.baseline.bandwidth=0.3"],
            "objective.baseline.bandwidth: 0.3 is for objective.baseline.source=kernel, and it is vstar; set that, or ",
        ),
        (
            ["objective.baseline={source: batch_mean, kernel: exponential}"],
            "objective.baseline.kernel: exponential is for objective.baseline.source=kernel, and it is batch_mean; ",
        ),
        (
            ["objective.baseline.source=group_mean"],
            "objective.baseline.source: group_mean of objective.samp",
        ),
        (
            ["objective.baseline={source: kernel, kernel: exponential, bandwidth: 0.001}"],
            "objective.baseline.bandwidth: 0.001 is too small",
        ),
        (
            ["objective.name=ppo", "objective.critic.optimizer.min_lr=1"],
            "objective.critic.optimizer.min_lr: 1.0",
        ),
        (
            ["objective.name=dapo", "objective.overlong_buffer=77"],
            "objective.overlong_buffer: 77 is not below sam",
        ),
        (
            ["objective.name=grpo", "objective.max_draws=5"],
            "objective.max_draws: 5 is for objective.dynamic_sampling=true, and it is false; set that, or leave it out",
        ),
        (
            ["objective.name=dapo", "objective.overlong_buffer=0", "objective.overlong_penalty=2"],
            "objective.overlong_penalty: 2.0 is for an objective.overlong_buffer above 0, and it is 0; set that, or ",
        ),
        (
            ["objective.name=dr_grpo", "objective.kl_estimator=k2"],
            "objective.kl_estimator: k2 is for an objective.kl_coefficient above 0, and it is 0.0; set that, or leave ",
        ),
    ],
)
def test_what_cannot_work_together(overrides: list[str], line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build_recipe({}, [*PATHS, *overrides])
    (problem,) = caught.value.problems
    assert problem.startswith(line)


# ---- before work


def test_a_critic_that_is_another_model_is_refused(tmp_path: Path) -> None:
    policy, deeper = make_model("qwen3-tied", tmp_path / "policy"), make_model("qwen3", tmp_path / "other")

    def check(path: Path | None) -> None:
        recipe = build_recipe({}, [*PATHS, f"model.path={policy}", "objective.name=ppo"])
        recipe.objective.critic.path = path  # type: ignore[union-attr]
        preflight._check_critic(recipe)

    check(None)
    check(policy)
    untied = Path(shutil.copytree(policy, tmp_path / "untied"))  # from its output, which a critic has not
    tied = json.loads((policy / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(tied | {"tie_word_embeddings": False}))
    check(untied)
    config = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(ValueError, match="objective.critic.path: num_layers is 5, but 4 in model.path; "):
        check(deeper)
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ValueError, match=f"^model path {nowhere}: no config.json .*objective.critic.path.$"):
        check(nowhere)
    (unwritten := tmp_path / "unwritten").mkdir()
    (unwritten / "config.json").write_text((policy / "config.json").read_text())
    with pytest.raises(ValueError, match=f"model path {unwritten}: no model.safetensors"):
        check(unwritten)


@pytest.mark.parametrize("path", [None, "c"])
def test_a_critic_has_weights_an_optimizer_and_a_schedule_of_its_own(
    path: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The schedules are over all optimizer steps of the run: 7 of 3 minibatches."""
    settings = ["train.steps=7", "train.minibatches=3", "train.prompts_per_step=3", "model.reference=r"]
    own = ["objective.name=ppo", f"objective.critic.path={path or 'null'}", "objective.critic.optimizer.lr=0.5"]
    recipe = build_recipe({}, [*PATHS, *settings, *own])
    loaded, made = [], []
    sizes = {"num_layers": 1, "hidden_size": 8, "ffn_size": 8, "num_heads": 2, "num_query_groups": 1, "head_dim": 4}
    spec = model_spec(family="llama", vocab_size=10, **sizes)
    monkeypatch.setattr(learner_module, "build_model", lambda *_, **__: "policy")
    monkeypatch.setattr(learner_module, "build_critic", lambda own, *_, **__: f"critic of {own.head}s")
    monkeypatch.setattr(learner_module, "place_reference", lambda mode, policy, build, load: load("reference"))
    monkeypatch.setattr(learner_module, "HFReader", str)
    monkeypatch.setattr(learner_module, "load_weights", lambda chunks, spec, _, reader: loaded.append((chunks, reader)))
    monkeypatch.setattr(
        learner_module,
        "make_trainable",
        lambda chunks, config, total_steps: made.append((chunks, config, total_steps)) or made[-1],
    )
    learner = Learner.build(recipe, None, spec=spec)  # type: ignore[arg-type]
    assert loaded == [("policy", "m"), ("reference", "r"), ("critic of values", path or "m")]
    assert made == [
        ("policy", recipe.optimizer, 21),
        ("critic of values", recipe.objective.critic.optimizer, 21),  # type: ignore[union-attr]
    ]
    assert learner.trainables == {"policy": made[0], "critic": made[1]}


def test_groups_are_kept_together_for_a_loss_that_couples_them() -> None:
    """Of responses that take 6, 3, 4 and 3 positions a micro-batch of 10 holds any two; else they are spread evenly, as
    they are in a first minibatch."""
    made = make_batch([[1]] * 8, [[2] * count for count in (6, 3, 4, 3) * 2])
    made.group_B[:] = [0, 0, 1, 1, 2, 2, 3, 3]

    def planned(method: str) -> list[list[list[int]]]:
        settings = ["train.tokens_per_micro_batch=10", "train.minibatches=2", "data.max_prompt_tokens=2"]
        short = ["sampling.max_response_tokens=7", "objective.samples_per_prompt=2", f"objective.name={method}"]
        learner = Learner.__new__(Learner)
        learner.recipe = build_recipe({}, [*PATHS, *settings, *short])
        learner.objective = objective_of(learner.recipe)
        return [sorted(sorted(members) for members in micro_batches) for (micro_batches,) in learner.plan(made).plans]

    assert planned("rebel") == [[[0, 3], [1, 2]], [[4, 5], [6, 7]]]
    assert planned("rloo") == [[[0, 3], [1, 2]], [[4, 7], [5, 6]]]


def test_a_recorded_batch_must_have_the_methods_groups() -> None:
    def problem(group_B: list[int], samples: int, minibatch: int) -> str | None:
        made = make_batch([[1]] * len(group_B), [[2]] * len(group_B))
        made.group_B[:] = group_B
        return replay._group_problem(made, samples, minibatch)

    assert problem([0, 0, 1, 1], 2, 2) is None and problem([0, 1, 2, 3], 1, 2) is None
    assert problem([0, 1, 2, 3], 2, 4) == (
        "groups of 1 responses, and objective.samples_per_prompt is 2; set that to what was recorded"
    )
    assert problem([0, 0, 1, 1, 2, 2], 2, 3) == "a group lies in two minibatches; use another train.minibatches"


@pytest.mark.parametrize(
    ("overrides", "is_read"),
    [
        ([], True),
        (["objective.name=grpo"], True),
        (["objective.name=dr_grpo"], False),
        (["objective.name=reinforce"], True),  # its V*
        (["objective.name=reinforce", "objective.baseline.source=kernel"], False),
        (["objective.name=dr_grpo", "vstar.filter=both"], True),
    ],
)
def test_who_has_to_do_with_the_reference(overrides: list[str], is_read: bool) -> None:
    models = preflight._training_models(build_recipe({}, [*PATHS, "model.reference=r", *overrides]))
    assert ("model.reference" in models) == is_read and models["model.path"] == Path("m")


def test_the_next_stage_of_a_method_without_a_store_is_training(tmp_path: Path) -> None:
    recipes = {name: build_recipe({}, [*PATHS, f"objective.name={name}"]) for name in ("apo", "grpo")}
    assert {name: preflight.next_stage(recipe) for name, recipe in recipes.items()} == {
        "apo": "estimate-vstar", "grpo": "train"
    }  # fmt: skip


# ---- the pages of docs/methods

PAGES = {name: {"dr_grpo": "grpo", "dapo": "grpo"}.get(name, name) for name in METHODS}
COLUMN = {"grpo": 1, "dr_grpo": 2, "dapo": 3}  # of the defaults; 1 in the other pages


def table(name: str) -> dict[str, str]:
    """Key -> default, of a page's table."""
    found = {}
    for line in (DOCS / f"{PAGES[name]}.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells and cells[0].startswith("`"):
            found |= dict.fromkeys(re.findall(r"`([\w.]+)`", cells[0]), cells[COLUMN.get(name, 1)])
    return found


@pytest.mark.parametrize("name", METHODS)
def test_a_page_has_the_methods_keys_and_defaults(name: str) -> None:
    section, listed = build_recipe({}, [*PATHS, f"objective.name={name}"]).objective, table(name)
    values = {key: value for key, value in section.model_dump().items() if key not in OTHERS}
    assert listed.keys() - {"baseline", "critic.path", "critic.optimizer"} == values.keys()
    assert ("baseline" in listed) == hasattr(section, "baseline") and ("critic.path" in listed) == (name == "ppo")
    for key, value in values.items():
        assert yaml.safe_load(listed[key].strip("`")) == value, key


def test_the_overview_lists_every_method_and_source() -> None:
    text = (DOCS / "README.md").read_text()
    for name in METHODS:
        assert f"[`{name}`]({PAGES[name]}.md)" in text and (DOCS / f"{PAGES[name]}.md").is_file()
    sources = BaselineConfig.model_fields["source"].annotation
    assert all(f"| `{source}` |" in text for source in get_args(sources))


def test_a_critics_schedule_is_kept_in_a_resumed_run() -> None:
    settings = [*PATHS, "objective.name=ppo", "objective.critic.optimizer.schedule=linear"]
    pair = (build_recipe({}, [*settings, f"train.steps={steps}"]) for steps in (300, 200))
    assert changed_for_resume(*pair) == [("train.steps", 300, 200)]


def test_all_of_a_prompts_responses_count_for_the_interleaved_schedule() -> None:
    """Two of each of two prompts are two in each of two minibatches: one group of parallel.pp."""
    settings = ["train.prompts_per_step=2", "train.minibatches=2", "parallel={pp: 2, vpp: 2}"]
    assert build_recipe({}, [*PATHS, *settings, "objective.name=rebel"]).parallel.vpp == 2
    with pytest.raises(RecipeError, match="2 sequences in 2 parts do not divide into groups of parallel.pp=2"):
        build_recipe({}, [*PATHS, *settings])


def test_the_running_mean_is_a_baseline() -> None:
    recipe = build_recipe({}, [*PATHS, "objective.baseline={source: kernel, bandwidth: null}"])
    assert recipe.objective.value_source is not None and recipe.objective.value_source.bandwidth is None


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


def test_log_probs_of_too_few_micro_batches_are_refused() -> None:
    """None at all are those of an earlier pipeline stage."""
    micro: Any = object()
    assert [len(part) for part in by_minibatch([torch.ones(1)] * 3, [[micro], [micro, micro]])] == [1, 2]
    assert by_minibatch([], [[micro, micro]])[0][1].numel() == 0
    for count in (1, 2, 4):
        with pytest.raises(AssertionError, match=f"{count} micro-batches were computed, of 3"):
            by_minibatch([torch.ones(1)] * count, [[micro], [micro, micro]])
