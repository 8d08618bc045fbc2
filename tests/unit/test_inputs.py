"""The ids that end a response: the recipe's, the model's, or none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_apo.config import Recipe, build_recipe
from megatron_apo.data.arithmetic import build_tokenizer, write_model
from megatron_apo.model.tokenizer import eos_token_ids, stop_token_ids
from megatron_apo.preflight import warmup_examples


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """18 token ids."""
    write_model(tmp_path / "model", 0, build_tokenizer())
    return tmp_path / "model"


def recipe(model: Path, chosen: str) -> Recipe:
    paths = [f"model.path={model}", "data.train=t.jsonl", "vstar.dir=v", "data.template=raw"]
    warmup = [f"warmup.start={model}", "warmup.data=pairs.jsonl"]
    return build_recipe({}, [*paths, *warmup, f"sampling.stop_token_ids={chosen}"])


def test_the_recipes_else_the_models(model: Path) -> None:
    assert stop_token_ids(recipe(model, "[3, 17]"), model) == (3, 17)
    assert stop_token_ids(recipe(model, "[]"), model) == ()
    assert stop_token_ids(recipe(model, "null"), model) == eos_token_ids(model)


@pytest.mark.parametrize("chosen", ["[18]", "[2, 18]", "[-1]"])
def test_an_id_that_the_model_does_not_have(chosen: str, model: Path) -> None:
    message = f"sampling.stop_token_ids: {chosen} does not fit {model}, whose ids are 0 to 17"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        stop_token_ids(recipe(model, chosen), model)


def test_demonstrations_need_an_end(model: Path) -> None:
    with pytest.raises(ValueError, match=r"^sampling.stop_token_ids: \[\] gives .*name an id, or null$"):
        warmup_examples(recipe(model, "[]"))
