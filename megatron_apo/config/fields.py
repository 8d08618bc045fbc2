"""The fields of a recipe as a whole: their keys and descriptions, and what their marks say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_apo.config.base import MAY_CHANGE, MAY_CHANGE_AT_CONSTANT_RATE, Section
from megatron_apo.config.data import SourceConfig
from megatron_apo.config.recipe import Recipe


def describe_fields(model: type[BaseModel] = Recipe, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted key, default, description) of every field of a recipe, or of the part of it that is `model`.

    Of a section that has several forms, told apart by their `name`, the fields of each, which then begin their
    descriptions.
    """
    rows = []
    for name, field in model.model_fields.items():
        forms = _sections(field.annotation)
        if not forms or field.description:
            default = str(field.get_default(call_default_factory=True))
            if field.is_required():
                default = _mark(field, "default") or "required"
            rows.append((prefix + name, default, field.description or ""))
        if len(forms) > 1:
            tag = forms[0].model_fields["name"]
            rows.append((f"{prefix}{name}.name", tag.default, f"{tag.description}: {', '.join(map(_form, forms))}"))
            for form in forms:
                own = [row for row in describe_fields(form, f"{prefix}{name}.") if row[0] != f"{prefix}{name}.name"]
                rows += [(key, default, f"{_form(form)}: {text}") for key, default, text in own]
        else:
            for section in forms:
                rows += describe_fields(section, f"{prefix}{name}.")
            for section in _sections_of_list(field.annotation):
                rows += describe_fields(section, f"{prefix}{name}.0.")
    return rows


def fields_marked(name: str) -> dict[str, Any]:
    """The sections ("parallel") and fields ("train.record") that have the mark `name`, and what each is marked with."""
    found: dict[str, Any] = {}
    for section_name, section in Recipe.model_fields.items():
        fields = {section_name: section}
        for form in _sections(section.annotation):
            fields |= {f"{section_name}.{key}": field for key, field in form.model_fields.items()}
        found |= {key: mark for key, field in fields.items() if (mark := _mark(field, name)) is not None}
    return found


def values_marked(recipe: Recipe, name: str) -> dict[str, Any]:
    """The recipe's values, as JSON has them, of the fields that have the mark `name`, by key."""
    tree = recipe.model_dump(mode="json")
    return {key: tree[section][leaf] for key in fields_marked(name) for section, _, leaf in [key.partition(".")]}


def changed_for_resume(recipe: Recipe, saved: Recipe) -> list[tuple[str, Any, Any]]:
    """(key, value now, value then) of every field that differs and that a resumed run must have the same."""
    allowed = [MAY_CHANGE["resume"]]
    if all(optimizer.schedule == "constant" for optimizer in recipe.optimizers.values()):
        allowed.append(MAY_CHANGE_AT_CONSTANT_RATE["resume"])
    free = {key for key, value in fields_marked("resume").items() if value in allowed}
    free_of_source = {key for key, field in SourceConfig.model_fields.items() if _mark(field, "resume") in allowed}

    def kept(value: Any) -> Any:
        """Of a list of sources what must be the same."""
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            return value
        return [{key: part for key, part in one.items() if key not in free_of_source} for one in value]

    now, then = recipe.model_dump(mode="json"), saved.model_dump(mode="json")
    if now["objective"]["name"] != then["objective"]["name"]:  # whose other keys cannot be compared
        now["objective"], then["objective"] = ({"name": tree["objective"]["name"]} for tree in (now, then))
    return [
        (f"{section}.{key}", ours, theirs)
        for section in now
        for key in now[section]
        if section not in free and f"{section}.{key}" not in free
        if (ours := kept(now[section][key])) != (theirs := kept(then[section][key]))
    ]


def as_written(place: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the keys that lead there in a recipe, the keys of the section that it is in; none where that is no section).

    place: by pydantic's names, where the form of a section is one as well.
    """
    keys: list[str] = []
    forms: Sequence[type[Section]] = [Recipe]
    for number, part in enumerate(place):
        if len(forms) > 1 and (chosen := [form for form in forms if _form(form) == part]):
            forms = chosen
            continue
        keys.append(part)
        if number < len(place) - 1 and not part.isdigit():
            field = next((form.model_fields[part] for form in forms if part in form.model_fields), None)
            forms = (_sections(field.annotation) or _sections_of_list(field.annotation)) if field else []
    return keys, [key for form in forms for key in form.model_fields]


def _mark(field: FieldInfo, name: str) -> Any:
    return field.json_schema_extra.get(name) if isinstance(field.json_schema_extra, dict) else None


def _form(section: type[Section]) -> str:
    """The `name` by which a form of a section is told from the others."""
    return str(section.model_fields["name"].default)


def _sections(annotation: Any) -> list[type[Section]]:
    """The section that a field is, `Section | None` included, in each of its forms."""
    if get_origin(annotation) is list:
        return []
    if get_origin(annotation) is Annotated:
        return _sections(get_args(annotation)[0])
    inner = [section for kind in get_args(annotation) for section in _sections(kind)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, Section) else inner


def _sections_of_list(annotation: Any) -> list[type[Section]]:
    """The section that each of a field's list is."""
    return _sections(get_args(annotation)[0]) if get_origin(annotation) is list else []
