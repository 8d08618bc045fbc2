"""Where prompts come from, how their rows are read, and how a prompt is rendered."""

from __future__ import annotations

import datetime
from contextlib import suppress
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from megatron_apo.config.base import MAY_CHANGE, Section, behind_fingerprint, in_fingerprint
from megatron_apo.config.reward import GraderConfig

TASK = "reasoning-gym:"  # before the name of a task, as a source of prompts
_SOURCE = f"a .jsonl or .parquet file, a hub dataset's name, or {TASK}TASK"
_BEHIND_ROWS = behind_fingerprint("dataset_hash") | MAY_CHANGE  # a store, which stays the run's, has their hash


class RowsConfig(Section):
    """How the rows of a source are read and shown."""

    subset: str | None = Field(
        None,
        json_schema_extra=_BEHIND_ROWS,
        description="configuration of a hub dataset, e.g. main; none: its default",
    )
    split: str = Field(
        "train", json_schema_extra=_BEHIND_ROWS, description="split to read when the source is a hub dataset"
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        json_schema_extra=_BEHIND_ROWS,
        description="of a reasoning-gym task: its config's fields there, and seed",
    )
    preset: Literal["gsm8k", "math", "aime", "openr1", "deepscaler", "verl", "trl", "openrlhf"] | None = Field(
        None,
        json_schema_extra=behind_fingerprint("dataset_hash", "template_hash") | MAY_CHANGE,
        description="public dataset whose columns and prompt_format apply (for reward math; gsm8k: for reward gsm8k), "
        "or columns as verl, trl or openrlhf have them; its rows without an answer are counted, listed and left out",
    )
    prompt_column: str | None = Field(
        None,
        json_schema_extra=_BEHIND_ROWS,
        description="column of the prompt's text; none: the preset's, else prompt",
    )
    answer_column: str | None = Field(
        None,
        json_schema_extra=_BEHIND_ROWS,
        description="column of the reference; none: the preset's, else answer",
    )
    prompt_format: str | None = Field(
        None,
        json_schema_extra=behind_fingerprint("template_hash") | MAY_CHANGE,
        description="text around {prompt}, other braces are themselves; none: the preset's, else {prompt} alone",
    )

    @field_validator("prompt_format", mode="before")
    @classmethod
    def _has_one_place(cls, value: object) -> object:
        if value is not None and (not isinstance(value, str) or value.count("{prompt}") != 1):
            raise ValueError("text that has {prompt} in it once, in quotes")
        return value


class SourceConfig(RowsConfig):
    """One of several sources of prompts."""

    name: str = Field(min_length=1, pattern=r"^[\w.+-]+$", description="of the source, in metrics")
    path: str = Field(json_schema_extra=MAY_CHANGE, description=_SOURCE)
    max_prompts: int | None = Field(
        None, ge=1, json_schema_extra=MAY_CHANGE, description="first rows; none: all; reasoning-gym: so many"
    )
    weight: float | None = Field(
        None, gt=0, description="its share of a step's prompts, beside the others'; none, of all: their prompts' number"
    )
    reward: GraderConfig | None = Field(
        None, json_schema_extra=MAY_CHANGE, description="what grades its responses; none: the recipe's reward"
    )


class DataConfig(RowsConfig):
    train_sources: list[SourceConfig] = Field(
        default_factory=list,
        json_schema_extra=behind_fingerprint("dataset_hash", "sources"),
        description="in place of data.train: several, mixed by weight, each with its own columns, preset and reward",
    )
    train: str | None = Field(None, json_schema_extra=_BEHIND_ROWS, description=f"prompts to train on: {_SOURCE}")
    eval_sources: list[SourceConfig] = Field(
        default_factory=list,
        json_schema_extra=MAY_CHANGE,
        description="in place of data.eval: held-out prompts with columns, preset and reward of their own",
    )
    eval: str | None = Field(
        None,
        json_schema_extra=MAY_CHANGE,
        description="held-out prompts, read as data.train is; none: no evaluation",
    )
    max_prompts: int | None = Field(
        None,
        ge=1,
        json_schema_extra=_BEHIND_ROWS,
        description="first rows of data.train; none: all; reasoning-gym: so many",
    )
    template: Literal["raw", "chat"] = Field(
        "chat",
        json_schema_extra=behind_fingerprint("template"),
        description="raw: the text as it is; chat: the chat template",
    )
    system: str | None = Field(
        None,
        json_schema_extra=behind_fingerprint("template_hash"),
        description="system message of the chat template; none: the template's default",
    )
    thinking: bool | None = Field(
        None,
        json_schema_extra=behind_fingerprint("thinking"),
        description="the chat template's thinking switch; none: the template's default",
    )
    date: datetime.date | None = Field(
        None,
        json_schema_extra=behind_fingerprint("template_hash"),
        description="day, as 2024-07-26, for a chat template that else writes today's; none: it writes no day",
    )
    max_prompt_tokens: int = Field(
        1024,
        ge=1,
        json_schema_extra=in_fingerprint("max_prompt_tokens"),
        description="longer prompts are counted, listed and left out",
    )

    @field_validator("train", "eval")
    @classmethod
    def _is_in_one_form(cls, value: str | None, info: ValidationInfo) -> str | None:
        sources = info.data.get(f"{info.field_name}_sources")
        if value is not None and sources:
            raise ValueError(f"null with data.{info.field_name}_sources, or leave these out")
        if value is None and sources == [] and info.field_name == "train":
            raise PydanticCustomError("missing", "missing")
        return value

    @field_validator("train_sources", "eval_sources")
    @classmethod
    def _have_names(cls, value: list[SourceConfig]) -> list[SourceConfig]:
        names = [source.name for source in value]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"names of their own for all sources, {twice[0]} is there twice")
        if 0 < sum(source.weight is None for source in value) < len(value):
            raise ValueError("a weight for each source, or for none")
        return value

    @field_validator("date", mode="before")
    @classmethod
    def _is_a_day(cls, value: object) -> object:
        if value is None or type(value) is datetime.date:
            return value
        with suppress(ValueError):
            if isinstance(value, str) and (day := datetime.date.fromisoformat(value)).isoformat() == value:
                return day
        raise ValueError("a day as YYYY-MM-DD, such as 2024-07-26, or null")

    @field_validator("system")
    @classmethod
    def _has_a_chat(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("template") == "raw":
            raise ValueError("null with data.template: raw, which has no system message, or data.template: chat")
        return value
