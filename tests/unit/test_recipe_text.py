"""A recipe's text: what a plain word is, and that each value that is accepted is printed as it was written."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_apo.config import RecipeError, describe_fields, load_recipe
from megatron_apo.config.text import read, read_override, write

PATHS = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}, "vstar": {"dir": "v"}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12:30", "12:30"),
        ("1:2:3", "1:2:3"),
        ("010", 10),
        ("0o10", 8),
        ("0x10", 16),
        ("1_000", "1_000"),
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-3.", -3.0),
        ("1.10", 1.1),
        ("12345678901234567890123", 12345678901234567890123),
        (".inf", math.inf),
        ("2024-05-01", "2024-05-01"),
        ("2024-02-30", "2024-02-30"),
        ("no", "no"),
        ("On", "On"),
        ("y", "y"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("nullable", "nullable"),
        ("=", "="),
        ("1.2.3", "1.2.3"),
        ("+5", 5),
        ("'12'", "12"),
        ("[010, no, {a: 1:1}]", [10, "no", {"a": "1:1"}]),
    ],
)
def test_plain_words(text: str, value: Any) -> None:
    found, misread = read_override("a", text)
    assert (found, type(found), misread) == (value, type(value), [])
    assert read(f"a: {text}") == ({"a": value}, [])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "reward: {options: {strict: no}}",
            "reward.options.strict: no is text in a recipe; write true or false",
        ),
        (
            "a:\n  - {options: {x: On}}",
            "a.0.options.x: On is text in a recipe; write true or false",
        ),
        (
            "a: [{b: two words # cut\n}]",
            "a.0.b: 'two words' ends before '# cut', which is a comment; put",
        ),
        ("s: Answer #### and the number.", "s: 'Answer' ends before '#### and the number.', which is a comment"),
        ("s: End with\n  #### and the number.", "s: 'End with' ends before '#### and the number.', which is a comment"),
        ("s: 'quoted' #### rest", "s: 'quoted' ends before '#### rest', which is a comment; put the text in quotes"),
        ("a: [{b: 1, b: 2}]", "a.0.b: twice in the recipe, in lines 1 and 1; keep one"),
    ],
)
def test_what_is_read_otherwise_than_it_looks(text: str, line: str) -> None:
    _, (found,) = read(text)
    assert found.startswith(line)


@pytest.mark.parametrize(
    "text",
    ["a: 5 # five", "a: word # comment", "a: two words\n# comment\nb: 1", "a: # comment\n  b: 1", "a: |\n  x #### y\n"],
)
def test_comments_are_none_of_the_text(text: str) -> None:
    assert read(text)[1] == []


@pytest.mark.parametrize(
    ("text", "value", "lines"),
    [
        ("End with #### and the number.", "End with #### and the number.", []),
        ("#### first", "#### first", []),
        ("'a b' #### end", "'a b' #### end", []),
        ("4 #### x", "4 #### x", []),
        ("[1] # x", "[1] # x", []),
        ("'a # b'", "a # b", []),
        ("no", "no", [": no is text in a recipe; write true or false, or put it in quotes"]),
        (
            "{y: no}",
            {"y": "no"},
            [".y: no is text in a recipe; write true or false, or put it in quotes"],
        ),
        ("{y: 1, y: 2}", {"y": 2}, [".y: twice in the recipe, in lines 1 and 1; keep one"]),
        ("&a [*a]", "&a [*a]", []),
        ("", None, []),
    ],
)
def test_overrides(text: str, value: Any, lines: list[str]) -> None:
    assert read_override("reward.options.x", text) == (value, [f"reward.options.x{line}" for line in lines])


def test_what_holds_itself_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: &a {path: m, reference: *a}")
    with pytest.raises(RecipeError, match="not YAML: an anchor's value holds the anchor itself"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("word", ["no", "off", "N", "false"])
def test_a_switch_takes_the_words_for_one(word: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"telemetry: {{progress: {word}}}")
    paths = ["model.path=m", "data.train=t.jsonl", "vstar.dir=v"]
    assert load_recipe(tmp_path / "r.yaml", paths).telemetry.progress is False


WORDS = ["12:30", "010", "1e-4", "no", "yes", "On", "null", "~", "true", "2024-05-01", "=", "<<", "0x1F", "1_0", ".5"]
WORDS += ["-", "", " a", "a ", "a # b", "#a", "a: b", "- a", "'a", '"', "{prompt}", "[a", "a\nb", "a\\b", "é", "\u2028"]
WORDS += ["\x7f", "%", "@x"]


def values(draw: random.Random) -> Iterator[Any]:
    """What a recipe could hold, of every kind."""
    while True:
        kind = draw.randrange(6)
        if kind == 0:
            yield draw.choice(WORDS)
        elif kind == 1:
            yield draw.choice([0, 1, 2, 8, 16, 10**12, -1, 10**25])
        elif kind == 2:
            yield draw.choice([0.5, 1.0, 1e-6, 1e-300, 1e22, 0.1 + 0.2, 3.0])
        elif kind == 3:
            yield draw.choice([True, False, None])
        elif kind == 4:
            yield [draw.choice(WORDS + [1, 0.5, True]) for _ in range(draw.randrange(3))]
        else:
            yield {draw.choice(WORDS + ["a", "b"]): draw.choice([*WORDS, 1, 0.5, None, [1, "x"]])}


def test_any_tree_is_read_as_it_was_written() -> None:
    source = values(random.Random(3))
    for _ in range(500):
        tree = {"a": next(source), "b": [next(source)]}
        text = write(tree)
        assert read(text) == (tree, []), text


def same(written: Any, printed: Any) -> bool:
    """As a field may read it: a number's type and a folder's are its own."""
    if isinstance(written, bool) or isinstance(printed, bool):
        words = {
            "yes": True,
            "on": True,
            "true": True,
            "no": False,
            "off": False,
            "false": False,
            "y": True,
            "n": False,
        }
        return words.get(str(written).lower()) is printed
    if isinstance(written, int | float) and isinstance(printed, int | float):
        return float(written) == float(printed)
    if isinstance(written, str) and isinstance(printed, int | float):
        return float(written) == printed
    if isinstance(written, list) and isinstance(printed, list):
        return len(written) == len(printed) and all(map(same, written, printed))
    if isinstance(written, dict) and isinstance(printed, dict):
        return all(name in printed and same(value, printed[name]) for name, value in written.items())
    are_paths = isinstance(written, str) and isinstance(printed, str)
    return written == printed or (are_paths and Path(written) == Path(printed))


def accepted(draw: random.Random, folder: Path, num: int) -> Iterator[tuple[str, Any, Path]]:
    """Field, value and file of recipes that are accepted, out of `num` that are tried."""
    source, names = values(draw), [name for name, _, _ in describe_fields() if ".0." not in name]
    defaults = {name: default for name, default, _ in describe_fields()}
    for index in range(num):
        name = draw.choice(names)
        value = next(source) if draw.random() < 0.6 else read_override(name, defaults[name])[0]
        tree: dict[str, Any] = json.loads(json.dumps(PATHS))
        node = tree
        *parents, leaf = name.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
        path = folder / f"{index}.yaml"
        path.write_text(write(tree) if index % 2 else yaml.safe_dump(tree))
        try:
            load_recipe(path)
        except RecipeError:
            continue
        yield name, value, path


def test_each_value_that_is_accepted_is_printed_as_it_was_written(tmp_path: Path) -> None:
    checked = 0
    for name, value, path in accepted(random.Random(5), tmp_path, 300):
        printed, _ = read(load_recipe(path).as_yaml())
        for part in name.split("."):
            printed = printed[part]
        assert same(value, printed), (name, value, printed, path.read_text())
        checked += 1
    assert checked > 70


def test_the_doctor_prints_it(tmp_path: Path, in_process: Callable) -> None:
    text = 'data: {train: "12:30", system: "# first", subset: "010"}\noptimizer: {lr: 1e-4}\n'
    (tmp_path / "r.yaml").write_text(text)
    overrides = ["model.path=m", "vstar.dir=v", "data.split=no", "reward.options={a: 2024-05-01}"]
    result = in_process("doctor", "-r", tmp_path / "r.yaml", "--resolved", *overrides)
    assert result.returncode == 0
    tree, misread = read(result.stdout)
    assert misread == []
    data = {name: tree["data"][name] for name in ("train", "system", "subset", "split")}
    assert data == {"train": "12:30", "system": "# first", "subset": "010", "split": "no"}
    assert tree["optimizer"]["lr"] == 1e-4 and tree["reward"]["options"] == {"a": "2024-05-01"}
    (tmp_path / "again.yaml").write_text(result.stdout)
    assert in_process("doctor", "-r", tmp_path / "again.yaml", "--resolved").stdout == result.stdout
    assert in_process("doctor", "--resolved").returncode == 2
