"""A recipe from its file and overrides, or one error that has a line for each mistake."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_apo.config.base import RecipeError
from megatron_apo.config.fields import as_written
from megatron_apo.config.recipe import Recipe
from megatron_apo.config.run import RunConfig
from megatron_apo.config.shipped import recipe_path
from megatron_apo.config.text import read, read_override

_METHOD = "objective.name="
_RUN = RunConfig.model_fields["dir"].default


def load_recipe(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a YAML recipe (a path, or a name for `recipe_path`) and apply `section.key=value` overrides (YAML values).

    Raises `RecipeError` with every problem, one line each.
    """
    path = Path(path)
    if not path.is_file():
        path = recipe_path(str(path))
    try:
        tree, misread = read(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError([f"recipe: {path} is not YAML: {' '.join(str(error).split())}"]) from None
    if misread:
        raise RecipeError(misread)
    return build_recipe(tree or {}, overrides)


def build_recipe(tree: Any, overrides: Iterable[str] = ()) -> Recipe:
    """Make a validated `Recipe` of a nested dict and overrides. Raises `RecipeError`.

    An override that names another method than the dict leaves that method's settings out, which are none of its own.
    """
    if not isinstance(tree, dict):
        raise RecipeError([f"recipe: the top level is a {type(tree).__name__}; it must map sections to their keys"])
    # An absent section counts as an empty one, so that what is missing is named by its full key.
    tree = {name: {} for name in Recipe.model_fields} | {
        name: {} if section is None else section for name, section in copy.deepcopy(tree).items()
    }
    problems = []
    for override in sorted(overrides, key=lambda text: not text.startswith(_METHOD)):  # before its settings
        key, equals, text = override.partition("=")
        if not equals or not key:
            problems.append(f"override {override!r}: not of the form section.key=value")
            continue
        value, misread = read_override(key.strip(), text)
        problems += misread
        own = tree["objective"]
        if override.startswith(_METHOD) and isinstance(own, dict) and value != own.get("name", "apo"):
            own.clear()
        problem = _set_dotted(tree, key.strip(), value)
        if problem:
            problems.append(problem)
    run, vstar = tree["run"], tree["vstar"]
    if isinstance(run, dict) and isinstance(vstar, dict) and isinstance(where := run.get("dir", _RUN), str | Path):
        vstar.setdefault("dir", Path(where) / "vstar")
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(problems + [_explain(item) for item in error.errors()]) from None
    problems += recipe.problems()
    if problems:
        raise RecipeError(problems)
    return recipe


def _set_dotted(tree: dict[str, Any], key: str, value: Any) -> str | None:
    *parents, leaf = key.split(".")
    node: Any = tree
    for parent in parents:
        if isinstance(node, list):
            if not (parent.isdigit() and int(parent) < len(node)):
                return f"override {key}: {parent} is none of the {len(node)} there; use 0 to {len(node) - 1}"
            node = node[int(parent)]
        else:
            node = node.setdefault(parent, {})
        if not isinstance(node, dict | list):
            return f"override {key}: {parent} is a value, not a section"
    if isinstance(node, list):
        return f"override {key}: names a whole entry of a list; name a field of it, or give the list"
    node[leaf] = value
    return None


# What pydantic says in the words of Python.
_OF_YAML = {
    "path_type": "text, which a path is",
    "invalid_key": "text as a key",
    "model_type": "keys with their values",
    "dict_type": "keys with their values",
}


def _explain(item: Any) -> str:
    """One line for one pydantic error: key, value, allowed, fix."""
    parts, known = as_written([str(part) for part in item["loc"]])
    kind = item["type"]
    if kind == "union_tag_invalid":
        allowed = item["ctx"]["expected_tags"]
        return f"{'.'.join(parts)}.name: {item['ctx']['tag']!r} is not allowed; use one of {allowed}"
    if kind == "union_tag_not_found":
        return f"{'.'.join(parts)}: {item['input']!r} is not allowed; use a section with a name and its settings"
    key = ".".join(parts)
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(parts[-1], known, n=1)
        hint = f"did you mean {'.'.join(parts[:-1] + near)}?" if near else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if kind == "missing":
        return f"{key}: missing and has no default; set it in the recipe or with {key}=..."
    if kind in _OF_YAML:
        return f"{key}: {item['input']!r} is not allowed; use {_OF_YAML[kind]}"
    allowed = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{key}: {item['input']!r} is not allowed; use {allowed}"
