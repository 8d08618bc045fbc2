"""The text of recipes: YAML whose plain words are what they look like.

YAML 1.1, which PyYAML reads by itself, takes 12:30 for 750, 010 for 8, no for false, 1_0 for 10, 1e-4 for text and
2024-05-01 for a date. Here they are what YAML 1.2's core schema says (yaml.org/spec/1.2.2, section 10.3.2): text, 10,
text, text, a number, text. What would be cut or lost without a word is refused.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_RESOLVED = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": ("<<", "<"),
}


_SWITCHES = ("yes", "no", "on", "off")  # of YAML 1.1


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind, (_pattern, _first) in _RESOLVED.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), [*_first, *([""] if _kind == "null" else [])]
        )


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    base = {"0o": 8, "0x": 16}.get(node.value[:2].lower(), 10)
    return int(node.value[2:] if base != 10 else node.value, base)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
# Of YAML 1.1 alone: what they make is no value of a recipe, and would be written as another.
for _kind in ("binary", "omap", "pairs", "set", "timestamp"):
    _Loader.yaml_constructors.pop(f"tag:yaml.org,2002:{_kind}")


def read(text: str, name: str = "") -> tuple[Any, list[str]]:
    """The tree of a recipe's text, and what of it is read otherwise than it looks, one line each. name: before keys.

    Raises `yaml.YAMLError`, or `ValueError` for a number of more digits than Python reads and what holds itself.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        misread = _misread(node, text, name)
    except RecursionError:
        raise ValueError("an anchor's value holds the anchor itself, or too much is nested") from None
    return (loader.construct_document(node) if node else None), misread


def read_override(key: str, text: str) -> tuple[Any, list[str]]:
    """The value of KEY=TEXT, and as of `read`. Text that is no YAML is itself, and so is what stands behind a #."""
    try:
        node = _Loader(text).get_single_node()
        if node is None or text[node.end_mark.index :].strip().startswith("#"):
            return (text.strip() or None), []
        value, misread = read(text, key)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text, []
    is_quoted = text.strip()[:1] in ("'", '"')
    return (text.strip() if isinstance(value, str) and not is_quoted else value), misread


def write(tree: Any) -> str:
    """Text that `read` reads as the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _misread(node: yaml.Node | None, text: str, name: str = "") -> list[str]:
    """Of a key that is there twice YAML takes the last, and of text without quotes what stands before a #; and what was
    once a switch is text, which only a field of true and false reads as one."""
    if isinstance(node, yaml.SequenceNode):
        return [line for index, one in enumerate(node.value) for line in _misread(one, text, f"{name}.{index}")]
    if isinstance(node, yaml.ScalarNode):
        return _misread_scalar(node, text, name)
    if not isinstance(node, yaml.MappingNode):
        return []
    found, lines = [], dict[str, int]()
    for key, value in node.value:
        own, line = f"{name}.{key.value}".lstrip("."), key.start_mark.line + 1
        if own in lines:
            found.append(f"{own}: twice in the recipe, in lines {lines[own]} and {line}; keep one")
        lines[own] = line
        found += _misread(value, text, own)
    return found


def _misread_scalar(node: yaml.ScalarNode, text: str, name: str) -> list[str]:
    rest, _, below = text[node.end_mark.index :].partition("\n")
    rest, cut = rest.strip(), ""
    is_plain = node.style is None
    if rest.startswith("#") and is_plain and len(node.value.split()) > 1 or rest.startswith("##"):
        cut = rest
    elif is_plain and not rest and re.match(r"[ \t]+##", below):
        cut = below.partition("\n")[0].strip()  # where text would go on
    if cut and node.style not in ("|", ">"):
        return [
            f"{name}: {node.value!r} ends before {cut!r}, which is a comment; put the text in quotes, or the comment "
            "on a line of its own"
        ]
    if is_plain and node.value.lower() in _SWITCHES and "options" in name.split("."):
        return [f"{name}: {node.value} is text in a recipe; write true or false, or put it in quotes"]
    return []
