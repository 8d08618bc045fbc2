"""What every section of a recipe is made of, the marks of its fields, and the error that names what is wrong with one.

A field's mark says what it is to a resumed run and to a V* store (`fields.py` reads them). Without a mark a resumed run
must have the same value, and a store does not depend on it.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic.config import JsonDict

# A resumed run may have another value: the same numbers, elsewhere or in another order, or what only looks on.
MAY_CHANGE: JsonDict = {"resume": "may change"}
# The same, unless the learning rate decays over train.steps.
MAY_CHANGE_AT_CONSTANT_RATE: JsonDict = {"resume": "may change at a constant learning rate"}
# Alike in all shards of a store, though not in the run that reads it: what vLLM computes in is an approximation of the
# reference either way, but one that a store must not mix.
SAME_IN_ALL_SHARDS: JsonDict = {"shards": "same"}


def in_fingerprint(name: str) -> JsonDict:
    """The samples of a V* store depend on it: it is the field `name` of the store's fingerprint
    (values/fingerprint.py)."""
    return {"fingerprint": name}


def behind_fingerprint(*names: str) -> JsonDict:
    """As `in_fingerprint`, by way of these fields: a hash of what it names, say."""
    return {"behind_fingerprint": list(names)}


class RecipeError(ValueError):
    """One or more mistakes in a recipe. `problems` holds one line each."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__(problems)  # as `args`, so that it can be pickled to other ranks

    def __str__(self) -> str:
        return "\n".join(self.problems)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_other_kind(cls, value: object, info: ValidationInfo) -> object:
        """Numbers are no switches, nor switches numbers, though pydantic takes either for the other."""
        assert info.field_name is not None
        kinds = _kinds(cast(Hashable, cls.model_fields[info.field_name].annotation))
        values = value if isinstance(value, list) else [value]
        if Any not in kinds and bool not in kinds and any(isinstance(one, bool) for one in values):
            raise ValueError("a number or text, which true and false are not")
        if bool in kinds and type(value) in (int, float):
            raise ValueError("true or false")
        if Path in kinds and isinstance(value, str) and (not value or value.startswith("~")):
            raise ValueError("a path with ~ written out, or . for this folder")
        return value

    def idle(self, place: str, key: str, wanted: str, found: object) -> list[str]:
        """That a key of this section, which is at `place` in a recipe, is set for a way of working that is not chosen:
        it is for `wanted`, and that is `found`. Nothing where the key has its default."""
        value = getattr(self, key)
        if value == type(self).model_fields[key].default:
            return []
        return [f"{place}.{key}: {value} is for {wanted}, and it is {found}; set that, or leave it out"]


@cache
def _kinds(annotation: Any) -> frozenset[Any]:
    """The types that a field's values, and those within them, may have."""
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        return frozenset(type(one) for one in inner)
    return frozenset({annotation}).union(*map(_kinds, inner))
