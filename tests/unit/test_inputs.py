"""The ids that end a response: the recipe's, the model's, its chat template's, or none."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_apo.config import Recipe, build_recipe
from megatron_apo.data.arithmetic import build_tokenizer, write_model
from megatron_apo.data.rendering import PromptRenderer
from megatron_apo.model.tokenizer import StopIds, eos_token_ids, load_tokenizer
from megatron_apo.preflight import open_sampling, warmup_examples
from megatron_apo.rollout.inputs import load_inputs
from tests.chat import CHATML, build_chatml_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """18 token ids."""
    write_model(tmp_path / "model", 0, build_tokenizer())
    return tmp_path / "model"


def recipe(model: Path, chosen: str, *overrides: str) -> Recipe:
    paths = [f"model.path={model}", "data.train=t.jsonl", "vstar.dir=v", "data.template=raw"]
    warmup = [f"warmup.start={model}", "warmup.data=pairs.jsonl"]
    return build_recipe({}, [*paths, *warmup, f"sampling.stop_token_ids={chosen}", *overrides])


def stop_ids(recipe: Recipe, model: Path) -> StopIds:
    return StopIds.of(recipe, model, PromptRenderer(load_tokenizer(model, "model.path"), recipe.data))


def test_the_recipes_else_the_models(model: Path) -> None:
    assert stop_ids(recipe(model, "[3, 17]"), model) == StopIds((3, 17))
    assert stop_ids(recipe(model, "[]"), model) == StopIds(())
    assert stop_ids(recipe(model, "null"), model) == StopIds(eos_token_ids(model))


@pytest.mark.parametrize("chosen", ["[18]", "[2, 18]", "[-1]"])
def test_an_id_that_the_model_does_not_have(chosen: str, model: Path) -> None:
    message = f"sampling.stop_token_ids: {chosen} does not fit {model}, whose ids are 0 to 17"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        stop_ids(recipe(model, chosen), model)


def test_demonstrations_need_an_end(model: Path) -> None:
    with pytest.raises(ValueError, match=r"^sampling.stop_token_ids: \[\] gives .*name an id, or null$"):
        warmup_examples(recipe(model, "[]"))


# --- a base model whose EOS is <|endoftext|> (18), under a chat template that ends turns with <|im_end|> (20)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_model(tmp_path / "base", 0, build_chatml_tokenizer(CHATML))
    for name, rows in (("t", [{"prompt": "1+2", "answer": "3"}]), ("pairs", [{"prompt": "1+2", "response": "3"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "base"


def of_base(base: Path, chosen: str, *overrides: str) -> Recipe:
    files = [f"data.train={base.parent / 't.jsonl'}", f"warmup.data={base.parent / 'pairs.jsonl'}"]
    folders = [f"run.dir={base.parent / 'run'}", f"vstar.dir={base.parent / 'vstar'}", "reward.name=arithmetic"]
    return recipe(base, chosen, *files, *folders, "data.template=chat", *overrides)


@pytest.mark.parametrize(
    ("chosen", "overrides", "ids", "note"),
    [
        (
            "null",
            [],
            (18, 20),
            "sampling.stop_token_ids: null, so that a response ends with an EOS of BASE, 18 (<|endoftext|>), or with "
            "20 (<|im_end|>), by which its chat template ends turns",
        ),
        (
            "[18]",
            [],
            (18,),
            "warning: sampling.stop_token_ids: [18] lacks 20 (<|im_end|>), by which the chat template of BASE ends "
            "turns: responses go on behind it; add it, or use null",
        ),
        ("[20]", [], (20,), None),
        ("[]", [], (), None),
        ("null", ["data.template=raw"], (18,), None),
    ],
)
def test_a_base_model_stops_where_its_chat_template_ends_a_turn(
    base: Path, chosen: str, overrides: list[str], ids: tuple[int, ...], note: str | None
) -> None:
    inputs = load_inputs(of_base(base, chosen, *overrides))
    assert (inputs.stop_token_ids, inputs.stop_note) == (ids, note and note.replace("BASE", str(base)))


def test_a_chat_models_own_ids_stay(base: Path) -> None:
    path = base / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [20, 18]}))
    assert stop_ids(of_base(base, "null"), base) == StopIds((20, 18))


def test_a_turns_end_that_the_model_does_not_have(base: Path) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 20}))
    with pytest.raises(
        ValueError, match=r"^sampling.stop_token_ids: \[18, 20\] does not fit .*, whose ids are 0 to 19$"
    ):
        stop_ids(of_base(base, "null"), base)


def test_a_turns_end_is_no_part_of_what_is_graded_and_ends_a_demonstration(base: Path) -> None:
    inputs = load_inputs(of_base(base, "null"))
    three = inputs.tokenizer("3", add_special_tokens=False)["input_ids"]
    for end in (18, 20):
        assert inputs.grade_request(inputs.training.prompts[0], [*three, end], "stop").response == "3"
    assert warmup_examples(of_base(base, "null")).responses == [[*three, 20]]
    assert warmup_examples(of_base(base, "[18]")).responses == [[*three, 18]]


def test_what_is_told_of_them_is_told_once(base: Path, capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    """Also by the processes that a command starts."""
    monkeypatch.delenv("MEGATRON_APO_TOLD", raising=False)
    for _ in range(2):
        open_sampling(of_base(base, "null"))
        warmup_examples(of_base(base, "null"))
    assert capfd.readouterr().out.count("20 (<|im_end|>)") == 1
    note = load_inputs(of_base(base, "null")).stop_note
    code = f"from megatron_apo.runtime.telling import tell_once as tell; tell({note!r}); tell('another'); tell(None)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"another\n"


@pytest.mark.parametrize(
    "value", ["1", True, -1, 1.5, 10**12, [], [None], ["a"], [1, True], {"id": 1}], ids=lambda value: json.dumps(value)
)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_an_end_that_is_no_id(value: object, name: str, model: Path) -> None:
    (model / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((model / "config.json").read_text())
    (model / name).write_text(json.dumps(config | {"eos_token_id": value}))
    message = (
        f"{model / name}: eos_token_id is {json.dumps(value)}, no id nor a list of ids; set sampling.stop_token_ids"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        eos_token_ids(model)


def test_ends_of_a_list_and_of_the_second_file(model: Path) -> None:
    (model / "generation_config.json").write_text('{"eos_token_id": null}')
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": [0, 17]}))
    assert eos_token_ids(model) == (0, 17)


@pytest.mark.parametrize("data", [b"[]", b"3", b"\xff", b"[" * 10**5, b"{"])
def test_a_generation_config_that_is_no_object(data: bytes, model: Path) -> None:
    path = model / "generation_config.json"
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        eos_token_ids(model)
    assert str(error.value).startswith(f"{path}: ") and len(str(error.value).splitlines()) == 1


def test_a_tokenizers_own_code_is_neither_run_nor_asked_for(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    config = json.loads((model / "config.json").read_text())
    own = {"model_type": "unheard", "auto_map": {"AutoConfig": "code.Own", "AutoTokenizer": ["code.Own", None]}}
    (model / "config.json").write_text(json.dumps(config | own))
    (model / "code.py").write_text(f"open({str(model / 'ran')!r}, 'w')\nclass Own: pass\n")
    (model / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="^model.path: no tokenizer can be read from "):
        load_tokenizer(model, "model.path")
    assert asked == [] and not (model / "ran").exists()
