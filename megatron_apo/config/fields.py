"""The fields of a recipe as a whole: their keys and descriptions, and what their marks say."""

from __future__ import annotations

from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_apo.config.base import MAY_CHANGE, MAY_CHANGE_AT_CONSTANT_RATE, Section
from megatron_apo.config.data import SourceConfig
from megatron_apo.config.recipe import Recipe


def describe_fields(model: type[BaseModel] = Recipe, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted key, default, description) of every field of a recipe, or of the part of it that is `model`."""
    rows = []
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is None or field.description:
            default = "required" if field.is_required() else str(field.get_default(call_default_factory=True))
            rows.append((prefix + name, default, field.description or ""))
        if section or (section := _section_of_list(field.annotation)):
            index = "" if section is _section(field.annotation) else "0."
            rows += describe_fields(section, f"{prefix}{name}.{index}")
    return rows


def fields_marked(name: str) -> dict[str, Any]:
    """The sections ("parallel") and fields ("train.record") that have the mark `name`, and what each is marked with."""
    found: dict[str, Any] = {}
    for section_name, section in Recipe.model_fields.items():
        kind = _section(section.annotation)
        assert kind is not None
        fields = {section_name: section} | {f"{section_name}.{key}": field for key, field in kind.model_fields.items()}
        found |= {key: mark for key, field in fields.items() if (mark := _mark(field, name)) is not None}
    return found


def values_marked(recipe: Recipe, name: str) -> dict[str, Any]:
    """The recipe's values, as JSON has them, of the fields that have the mark `name`, by key."""
    tree = recipe.model_dump(mode="json")
    return {key: tree[section][leaf] for key in fields_marked(name) for section, _, leaf in [key.partition(".")]}


def changed_for_resume(recipe: Recipe, saved: Recipe) -> list[tuple[str, Any, Any]]:
    """(key, value now, value then) of every field that differs and that a resumed run must have the same."""
    allowed = [MAY_CHANGE["resume"]]
    if recipe.optimizer.schedule == "constant":
        allowed.append(MAY_CHANGE_AT_CONSTANT_RATE["resume"])
    free = {key for key, value in fields_marked("resume").items() if value in allowed}
    free_of_source = {key for key, field in SourceConfig.model_fields.items() if _mark(field, "resume") in allowed}

    def kept(value: Any) -> Any:
        """Of a list of sources what must be the same."""
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            return value
        return [{key: part for key, part in one.items() if key not in free_of_source} for one in value]

    now, then = recipe.model_dump(mode="json"), saved.model_dump(mode="json")
    return [
        (f"{section}.{key}", ours, theirs)
        for section in now
        for key in now[section]
        if section not in free and f"{section}.{key}" not in free
        if (ours := kept(now[section][key])) != (theirs := kept(then[section][key]))
    ]


def known_keys(parents: list[str]) -> list[str]:
    """The keys of the section that `parents` lead to; none where they lead to a value."""
    model: type[Section] = Recipe
    for parent in parents:
        if parent.isdigit():
            continue
        field = model.model_fields.get(parent)
        section = (_section(field.annotation) or _section_of_list(field.annotation)) if field else None
        if section is None:
            return []
        model = section
    return list(model.model_fields)


def _mark(field: FieldInfo, name: str) -> Any:
    return field.json_schema_extra.get(name) if isinstance(field.json_schema_extra, dict) else None


def _section(annotation: Any) -> type[Section] | None:
    """The section that a field is, `Section | None` included."""
    kinds = (annotation, *(() if get_origin(annotation) is list else get_args(annotation)))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _section_of_list(annotation: Any) -> type[Section] | None:
    """The section that each of a field's list is."""
    return _section(get_args(annotation)[0]) if get_origin(annotation) is list else None
