r"""From an answer's text to its form. Readers are tried in order; the first that takes all of the text has it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise, product

from megatron_apo.rewards.answers import values
from megatron_apo.rewards.answers.amounts import TEXT, is_harmless, read_quantity
from megatron_apo.rewards.answers.forms import (
    Approximate,
    Based,
    Choice,
    Family,
    Form,
    Interval,
    Items,
    Labelled,
    Progression,
    Ratio,
    Relation,
    Row,
    Union,
    Value,
    Words,
)
from megatron_apo.rewards.answers.writing import FUNCTIONS, split

MAX_ITEMS, MAX_DEPTH = 300, 12

_AND_OR = re.compile(r"\s*,?\s*(?:\\text\{\s*,?\s*(?:and|or)\s*,?\s*\}|(?:\band|\bor)\b(?!\{))\s*")
_COMMA = re.compile(r"\s*[,;]\s*")
_APPROX = re.compile(r"\s*\\approx\s*")
_SETMINUS = re.compile(r"\s*\\(?:setminus|backslash|smallsetminus)(?![A-Za-z])\s*")
_CUP = re.compile(r"\s*\\cup\s*")
_EQUALS = re.compile(r"(?<![<>:\\])\s*=\s*")
_ORDER = re.compile(r"\s*(<|>|\\le(?![A-Za-z])|\\ge(?![A-Za-z]))\s*")
_CLOSING = {"(": ")", "[": "]"}
_OTHER_RELATION = re.compile(r"\s*(\\ne|\\in|\\equiv|\\notin|\\subset|\\parallel|\\perp|\\sim|\\to)(?![A-Za-z])\s*")
_GREEK = (
    r"\\(?:alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|varphi|chi|psi|"
    r"omega|Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega|ell)(?![A-Za-z])"
)
_LETTER = rf"(?:[A-Za-z]|{_GREEK})'*(?:_(?:\{{[^{{}}]*\}}|[A-Za-z0-9]))?'*"
_VARIABLE = re.compile(_LETTER)
# x, f(x), f^{-1}(x), P(A|B), \overline{AB}, AB, \text{Area}, m\angle A, |AB|
_NAME = re.compile(
    rf"{_LETTER}(?:(?:\^\{{?-1\}}?)?\s*\([^()]*\))?|\\(?:max|min|det|angle|triangle|overline|vec|hat|bar|tilde)(?![A-Za-z])"
    r"\s*(?:\{[^{}]*\}|[A-Z]{1,3}|[a-z])?|[A-Z]{2,4}|[A-Z]{1,2}\s*\([^()]*\)|m\s*\\angle\s*[A-Z]{1,3}|\|[A-Z]{2}\|"
    r"|(?:\\text\{[^{}]*\}\s*)+(?:[A-Za-z](?![A-Za-z]))?"
)
_SUBSCRIPTED = re.compile(
    r"\(?\s*([0-9A-Fa-f]*\d[0-9A-Fa-f.]*|[0-9A-F]+)\s*\)?\s*_\s*(?:\{\s*(?:\\text\{)?\s*(\w+)\s*\}?\s*\}|(\d))"
)
_BASE_WORDS = re.compile(r"\(?([0-9A-Fa-f]+)\)?\s*(?:\\text\{)?\s*(?:in )?base[- ](?:\}\s*)?(\w+)\s*\}?")
_BASES = dict(zip("two three four five six seven eight nine ten eleven twelve".split(), range(2, 13), strict=True))
_BASES |= {"sixteen": 16}
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_DOTS = re.compile(r"\\ldots")
_CHOICE = re.compile(r"\(?\s*([A-J])\s*(?:\)|(?<!\()[.:](?=\s))\s*(.*)|([A-J])", re.DOTALL)
_LATEX_WORD = re.compile(r"\\[A-Za-z]+")
# What a domain of integers begins with; none: it has no beginning.
_INTEGERS: dict[str, int | None] = {
    r"\mathbb{Z}": None,
    r"\mathbb{N}": 1,
    r"\mathbb{N}_0": 0,
    r"\mathbb{N}\cup\{0\}": 0,
}
_INTEGERS |= dict.fromkeys((r"\mathbb{Z}^+", r"\mathbb{Z}^{+}", r"\mathbb{Z}_{>0}"), 1)
_INTEGERS |= dict.fromkeys((r"\mathbb{Z}_{\ge 0}", r"\mathbb{Z}_{\ge0}"), 0)
_FIRST = {"positive": 1, None: None}  # the same of integers that are called so
_EMPTY = re.compile(
    r"(?:there (?:is|are) )?(?:no (?:real |integer |such |positive )*(?:solutions?|roots?|values?|integers?)|none|"
    r"(?:the )?empty set|no such)"
)
_REALS = re.compile(r"(?:all|any|every|the)? ?reals?(?: numbers?)?")
_NONE = re.compile(r"dne|does not exist|undefined|not defined")
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


@lru_cache(maxsize=4096)
def read(text: str, depth: int = 0) -> Form:
    """What a text, as `writing.tidy` leaves it, says."""
    text = re.sub(r"^(?:=|\\approx(?![A-Za-z]))\s*", "", text)
    if depth > MAX_DEPTH or len(text) > 4 * values.MAX_LENGTH:
        return Value(text)
    for reader in _READERS:
        if (found := reader(text, depth)) is not None:
            return found
    return Value(text)


def _number(text: str, depth: int) -> Form | None:
    return Value(text) if values.read_number(text) else None


def _exact_with_approximation(text: str, depth: int) -> Form | None:
    r"""5\sqrt3 (\approx 8.66): what it is, and not what it is near to."""
    text = re.sub(r"\s*\(\s*(?:\\text\{[^{}]*\}\s*)?(\\approx[^()]*)\)\s*$", r" \1", text)
    exact, *near = split(text, _APPROX)
    return Approximate(read(exact, depth + 1), read(near[-1], depth + 1)) if near and exact else None


_ANOTHER = re.compile(r"\b[B-J]\b|\bA\b(?!\s[a-z])|\b(?:or|and|not|false|wrong|incorrect)\b|\([A-J]\)")


def _choice(text: str, depth: int) -> Form | None:
    bare = re.sub(r"^(?:option|choice|answer)\s+", "", TEXT.sub(r"\1", text).strip(), flags=re.IGNORECASE)
    match = _CHOICE.fullmatch(bare)
    if match is None or _ANOTHER.search(match[2] or ""):
        return None
    return Choice(match[3] or match[1], (match[2] or "").strip())


def _special(text: str, depth: int) -> Form | None:
    opened = " ".join(TEXT.sub(r"\1", text).lower().strip(" .").split())
    bare = opened if re.fullmatch("[a-z ]*", opened) else ""
    if text in ("\\emptyset", "\\{\\}", "\\{ \\}") or _EMPTY.fullmatch(bare):
        return Words(("no", "solution"))
    if text == "\\mathbb{R}" or _REALS.fullmatch(bare) or text.replace(" ", "") == "x\\in\\mathbb{R}":
        return Interval("-\\infty", "\\infty", "()")
    if _NONE.fullmatch(bare):
        return Words(("none",))
    if re.fullmatch(r"\+?\s*\\infty|infinity|\\text\{(?:infinity|infinitely many)\}", text):
        return Value("\\infty")
    if bare in _NUMBER_WORDS:
        return Value(str(_NUMBER_WORDS.index(bare)))
    return None


MONTHS = "January February March April May June July August September October November December".split()
_MONTH = re.compile(rf"\b(?:{'|'.join(MONTHS)})\b")
_SHORT_LIST = re.compile(r",? and |,? or |, ")


def _whole_text(text: str, depth: int) -> Form | None:
    r"""What is one \text{}, or a date: a short list, a number with its unit."""
    match = TEXT.fullmatch(text)
    inner = match[1].strip() if match else text
    if _MONTH.search(inner):
        return _words(TEXT.sub(r"\1", text), depth)
    if match is None:
        return None
    if found := re.fullmatch(r"(-?[\d.,/]+)(\s.*)", inner):
        return read(rf"{found[1]}\text{{{found[2]}}}", depth + 1)
    if found := re.fullmatch(r"[A-Za-z]\s*=\s*-?[\d./]+", inner):
        return read(inner, depth + 1)
    if found := re.fullmatch(r"(.*[a-z:])\s+(-?[\d.,/]+)\.?", inner):
        return read(rf"\text{{{found[1]} }}{found[2]}", depth + 1) if _opens(found[1]) else None
    parts = _SHORT_LIST.split(inner)
    if len(parts) > 1 and all(len(part.split()) == 1 for part in parts) and parts[0].lower() not in ("yes", "no"):
        return Items(tuple(read(rf"\text{{{part}}}", depth + 1) for part in parts))
    return None


def _environment(text: str, depth: int) -> Form | None:
    """A matrix is rows of rows, cases a list of what holds."""
    match = re.fullmatch(
        r"\(?\[?\s*\\begin\{([a-zA-Z]*matrix|array|cases|aligned|align\*?|gathered)\}(\s*\{[lcr| ]*\})?"
        r"((?:(?!\\end\{\1\}).)*)\\end\{\1\}\s*\)?\]?",
        text,
        re.DOTALL,
    )
    if match is None:
        return None
    lines = [line.strip(" ,") for line in split(match[3], re.compile(r"\\\\(?:\[[^\]]*\])?")) if line.strip(" ,")]
    cells = [[cell.strip(" ,") for cell in split(line, re.compile("&"))] for line in lines]
    if match[1] in ("cases", "aligned", "align", "align*", "gathered"):
        if match[1] == "cases" and all(len(row) == 2 for row in cells):
            pieces = [Row((read(value, depth + 1), read(_condition(when), depth + 1)), "case") for value, when in cells]
            return Items(tuple(pieces), is_set=True, joint="cases")
        return Items(tuple(read("".join(row), depth + 1) for row in cells), joint="and")
    if match[1].lower() == "vmatrix":
        return None  # a determinant
    rows = [Row(tuple(read(cell, depth + 1) for cell in row), "()") for row in cells]
    if len(rows) == 1:
        return rows[0]
    if all(len(row.items) == 1 for row in rows):
        return Row(tuple(row.items[0] for row in rows), "()")
    return Row(tuple(rows), "matrix")


def _condition(text: str) -> str:
    return re.sub(r"^\\text\{\s*(?:if|when|for)?\s*\}\s*", "", text)


_PARAMETER = re.compile(
    r"(?:,|;|\(|\\text\{\s*,?\s*(?:where|for|with|for (?:any|all|some|every))\s*\}|\s)\s*\(?\s*"
    r"([a-zA-Z])\s*(?:\\in\s*(\\mathbb\{[ZN]\}(?:\^\{?\+\}?|_\{[^{}]*\}|_0)?(?:\s*\\cup\s*\\\{0\\\})?)"
    r"|(\\ge|>)\s*(-?\d+)|=\s*(-?\d+)\s*,[^=]*\\ldots"
    r"|\s*(?:\\text\{)?\s*(?:is )?(?:an?|any) ?(non-?negative|positive)? ?integer\s*\}?)\s*\)?\s*$"
)
_PARAMETER_IN_WORDS = re.compile(
    r",?\s*\\text\{\s*,?\s*(?:where|for|with)?\s*(?:an?|any|some|all)? ?(non-?negative|positive)? ?integers?\s*\}"
    r"\s*([a-zA-Z])\s*$"
)


def _family(text: str, depth: int) -> Form | None:
    text = text.strip()
    if match := _PARAMETER.search(text):
        parameter, domain, sign, bound, first, kind = match.groups()
        start: int | None
        if domain:
            key = domain.replace(" ", "")
            if key not in _INTEGERS:
                return None
            start = _INTEGERS[key]
        elif bound:
            start = int(bound) + (sign == ">")
        elif first is not None:
            start = int(first)
        else:
            start = _FIRST.get(kind, 0)
        body = text[: match.start()]
    elif match := _PARAMETER_IN_WORDS.search(text):
        kind, parameter = match.groups()
        start = _FIRST.get(kind, 0)
        body = text[: match.start()]
    else:
        return None
    body = body.strip(" ,;(")
    if split(body, _ORDER) != [body]:
        return None
    parts = [part for piece in split(body, _AND_OR) for part in split(piece, _COMMA) if part]
    expressions, names = [], set()
    for part in parts:
        *left, expression = split(part, _EQUALS)
        if len(left) > 1 or not all(map(_VARIABLE.fullmatch, left)) or any(has_letter(one, parameter) for one in left):
            return None  # a function of the parameter, or an equation
        names |= set(left)
        expressions += _expanded(expression)
    if len(names) > 1:
        return None
    if not expressions or not all(has_letter(one, parameter) for one in expressions):
        return None
    return Family(tuple(expressions), parameter, start)


def _listing(text: str, depth: int) -> Form | None:
    """Parts with commas, semicolons, `and` or `or` between."""
    has_or = bool(re.search(r"\\text\{[^{}]*\bor\b[^{}]*\}|\bor\b", text))
    parts = [part for piece in split(text, _AND_OR) for part in split(piece, _COMMA)]
    parts = [part for part in parts if part]
    if len(parts) < 2 or len(parts) > MAX_ITEMS:
        return None
    if all(TEXT.fullmatch(part) or re.fullmatch(r"[A-Za-z]{3,}[A-Za-z ]*", part) for part in parts):
        first = TEXT.sub(r"\1", parts[0]).strip().lower()
        if first in ("yes", "no", "true", "false") or re.search(r"\d", text):
            return None
    if dotted := _progression(parts):
        return dotted
    if len(split(text, _COMMA)) > 1 and "\\text" in text and _sentence(text, depth):
        return None
    items = tuple(read(part, depth + 1) for part in parts)
    named = [item for item in items if isinstance(item, Labelled)]
    if len(named) == len(items) and len({item.name for item in named}) == 1:
        return Labelled(named[0].name, Items(tuple(item.value for item in named), joint="or"), ("", ""))
    if named and named[0] is items[0] and len(named) == 1 and not any(isinstance(item, Relation) for item in items):
        return Labelled(named[0].name, Items((named[0].value, *items[1:]), joint="or"), ("", ""))
    if not has_or and len(items) == 2 and (between := _between(*items)):
        return between
    holds = (Labelled, Relation, Interval)
    if all(isinstance(item, holds) for item in items):
        return Items(items, joint="or" if has_or else "and")
    return Items(items)


def _between(one: Form, other: Form) -> Interval | None:
    """x > 1 and x < 2, as 1 < x < 2."""
    for low, high in ((one, other), (other, one)):
        if isinstance(low, Interval) and isinstance(high, Interval) and low.name == high.name != "":
            if low.high == "\\infty" and high.low == "-\\infty":
                return Interval(low.low, high.high, low.brackets[0] + high.brackets[1], low.name)
    return None


def _progression(parts: list[str]) -> Form | None:
    places = [index for index, part in enumerate(parts) if _DOTS.fullmatch(part)]
    if len(places) != 1 or places[0] == 0:
        return None
    shown, last = parts[: places[0]], parts[places[0] + 1 :]
    numbers = [values.read_number(part) for part in [*shown, *last]]
    if len(last) == 1 and all(numbers):
        *begun, end = (one.value for one in numbers if one)
        step = begun[1] - begun[0] if len(begun) > 1 else Fraction(1)
        if step and all(b - a == step for a, b in pairwise(begun)):
            count = (end - begun[0]) / step + 1
            if count.denominator == 1 and len(begun) < count <= MAX_ITEMS:
                return Items(tuple(Value(str(begun[0] + step * index)) for index in range(int(count))))
    return Progression(tuple(shown), tuple(last))


def _set(text: str, depth: int) -> Form | None:
    match = re.fullmatch(r"\\\{(.*)\\\}", text, re.DOTALL)
    if match is None or split(text, _COMMA) != [text]:
        return None
    if builder := re.fullmatch(r"\s*([a-z])\s*(?:\||:)\s*(.*)", match[1]):
        told = read(builder[2], depth + 1)
        return told if isinstance(told, Interval | Union) else None
    if re.search(r"(?<!\\)\||:", match[1]):
        return None
    parts = [part for part in split(match[1], _COMMA) if part]
    found = _progression(parts)
    if isinstance(found, Progression):
        return found
    if isinstance(found, Items):
        return Items(found.items, is_set=True)
    return Items(tuple(read(part, depth + 1) for part in parts), is_set=True)


def _union(text: str, depth: int) -> Form | None:
    whole, *points = split(text, _SETMINUS)
    if len(points) == 1:
        return _without(read(whole, depth + 1), read(points[0], depth + 1))
    parts = split(text, _CUP)
    return Union(tuple(read(part, depth + 1) for part in parts)) if len(parts) > 1 else None


def _without(whole: Form, points: Form) -> Form | None:
    """An interval without some points: those between them."""
    if isinstance(whole, Row) and len(whole.items) == 2:
        low, high = (item.text if isinstance(item, Value) else "" for item in whole.items)
        whole = Interval(low, high, whole.brackets)
    left_out = {}
    for item in points.items if isinstance(points, Items) else (points,):
        number = values.read_number(item.text) if isinstance(item, Value) else None
        if number is None or not isinstance(item, Value):
            return None
        left_out[number.value] = item.text
    if not isinstance(whole, Interval) or not whole.low or not whole.high:
        return None
    low_end, high_end = values.read_number(whole.low), values.read_number(whole.high)
    if any((low_end and value <= low_end.value) or (high_end and value >= high_end.value) for value in left_out):
        return None
    ends = [whole.low, *(left_out[value] for value in sorted(left_out)), whole.high]
    opening, closing = whole.brackets[0], whole.brackets[1]
    parts = []
    for place, (low, high) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        brackets = (opening if place == 0 else "(") + (closing if place == len(ends) - 2 else ")")
        parts.append(Interval(low, high, brackets))
    return Union(tuple(parts))


def _bracketed(text: str, depth: int) -> Form | None:
    match = re.fullmatch(r"([(\[])(.*)([)\]])", text, re.DOTALL)
    if match is None or split(text, re.compile(r"(?!)")) != [text] or not _is_one_group(text):
        return None
    parts = split(match[2], _COMMA)
    brackets = match[1] + match[3]
    if len(parts) < 2 or len(parts) > MAX_ITEMS or not all(parts):
        if len(parts) == 1 and parts[0] and brackets in ("()", "[]"):
            return read(parts[0], depth + 1)
        return None
    if (both := _plus_minus(text, depth)) is not None:
        return both
    if len(parts) == 2 and (brackets in ("(]", "[)") or "\\infty" in text):
        return Interval(parts[0], parts[1], brackets)
    return Row(tuple(read(part, depth + 1) for part in parts), brackets)


def _is_one_group(text: str) -> bool:
    depth = 0
    for index, character in enumerate(text):
        depth += 1 if character in "([" else -1 if character in ")]" else 0
        if depth == 0 and index < len(text) - 1:
            return False
    return depth == 0


def _relation(text: str, depth: int) -> Form | None:
    if len(chain := _signed(text, _ORDER)) > 1:
        return _inequality(chain)
    if len(chain := _signed(text, _OTHER_RELATION)) > 1:
        (left, _), (right, sign) = chain[0], chain[1]
        if len(chain) == 2 and sign == "\\ne" and re.fullmatch("[A-Za-z]", left) and not has_letter(right, left):
            return _without(Interval("-\\infty", "\\infty", "()"), read(right)) or Relation(left, sign, right)
        if len(chain) == 2 and sign == "\\in" and _is_name(left):
            return Labelled(left, read(right, depth + 1), (left, right))
        return Relation(left, sign, " ".join([right, *(f"{sign} {part}" for part, sign in chain[2:])]))
    sides = split(text, _EQUALS)
    if len(sides) < 2 or not all(sides):
        return None
    if _is_name(sides[-1]) and not _is_name(sides[0]) and len(sides) == 2:  # 5 = x
        sides.reverse()
    first, last = sides[0], sides[-1]
    numeric = [side for side in sides if not re.search("[A-Za-z]", _LATEX_WORD.sub("", side))]
    if not all(values.same_value(last, side) for side in numeric[:-1]):
        return Relation(first, "=", " = ".join(sides[1:]))
    if _is_name(first):
        middle = sides[1:-1]
        if middle and all(map(_is_name, middle)):  # x = y = z = 4
            names = [first, *middle]
            return Items(
                tuple(Labelled(_plain(name), read(last, depth + 1), (name, last)) for name in names), joint="and"
            )
        return Labelled(_plain(first), read(last, depth + 1), (first, last))
    if _names_of_row(first):
        return Labelled(_plain(first), read(last, depth + 1), (first, last))
    if len(numeric) == len(sides) or len(sides) > 2:
        return read(last, depth + 1)
    return Relation(first, "=", last)


def _is_name(text: str) -> bool:
    if text in ("\\pi", "e", "i") or _negates(text):
        return False
    return bool(_NAME.fullmatch(text.strip()))


def _names_of_row(text: str) -> list[str]:
    match = re.fullmatch(r"\(([^()]*)\)", text.strip())
    names = match[1].split(",") if match else []
    return [name.strip() for name in names] if names and all(_is_name(name.strip()) for name in names) else []


def _plain(name: str) -> str:
    return re.sub(r"[\s{}]", "", TEXT.sub(r"\1", name))


def _signed(text: str, sign: re.Pattern[str]) -> list[tuple[str, str]]:
    """Parts, each with the sign before it."""
    parts = split(text, sign)
    if len(parts) < 2:
        return [(text, "")]
    signs, place = [""], 0
    for part in parts[:-1]:
        place = text.index(part, place) + len(part)
        match = sign.match(text, place)
        assert match
        signs.append(match[1])
        place = match.end()
    return list(zip(parts, signs, strict=True))


def _inequality(chain: list[tuple[str, str]]) -> Form | None:
    parts, signs = [part for part, _ in chain], [sign for _, sign in chain[1:]]
    if len({sign in ("<", "\\le") for sign in signs}) > 1 or not all(parts):
        return None
    if signs[0] in (">", "\\ge"):
        parts.reverse()
        signs.reverse()
        signs = ["<" if sign == ">" else "\\le" for sign in signs]
    ends = ["(" if sign == "<" else "[" for sign in signs]
    if len(parts) == 3 and _VARIABLE.fullmatch(parts[1]):
        return Interval(parts[0], parts[2], ends[0] + _CLOSING[ends[1]], _plain(parts[1]))
    if len(parts) == 2:
        absolute = re.fullmatch(r"\|([A-Za-z])\|", parts[0])
        if absolute and values.read_number(parts[1]):
            return Interval(f"-{parts[1]}", parts[1], {"(": "()", "[": "[]"}[ends[0]], absolute[1])
        if _VARIABLE.fullmatch(parts[0]) and not has_letter(parts[1], parts[0]):
            return Interval("-\\infty", parts[1], "(" + _CLOSING[ends[0]], _plain(parts[0]))
        if _VARIABLE.fullmatch(parts[1]) and not has_letter(parts[0], parts[1]):
            return Interval(parts[0], "\\infty", ends[0] + ")", _plain(parts[1]))
        return Relation(parts[0], signs[0], parts[1])
    return Relation(parts[0], " ".join(signs), " | ".join(parts[1:]))


def has_letter(text: str, name: str) -> bool:
    """Whether an expression has a letter, which is no part of a word."""
    return bool(re.search(rf"(?<![A-Za-z\\]){re.escape(name)}(?![A-Za-z])", text))


def _based(text: str, depth: int) -> Form | None:
    match = _SUBSCRIPTED.fullmatch(text)
    if match:
        digits, base = match[1], match[2] or match[3]
    elif match := _BASE_WORDS.fullmatch(text):
        digits, base = match[1], match[2]
    else:
        return None
    number = int(base) if re.fullmatch("[0-9]+", base) else _BASES.get(base.lower())
    if number is None or not 2 <= number <= 36 or not re.search(r"\d", digits):
        return None
    return Based(digits.upper(), number)


def _ratio(text: str, depth: int) -> Form | None:
    clock = re.fullmatch(r"(\d{1,2}:\d{2})\s*(?:\\text\{)?\s*([ap])\.?\s*m\.?\s*\}?", text, re.IGNORECASE)
    if clock:
        return Ratio(tuple(clock[1].split(":")), clock[2].lower())
    text = re.sub(r"\\text\{\s*to\s*\}|(?<=\d)\s+to\s+(?=\d)", ":", text)
    parts = split(text, re.compile(r"\s*:\s*"))
    return Ratio(tuple(parts)) if len(parts) > 1 and all(parts) else None


def _quantity(text: str, depth: int) -> Form | None:
    return read_quantity(text)


_NEGATIONS = set(
    "not no isn aren except than least most multiples multiple odd even greater less wrong incorrect".split()
)
_OPENS = re.compile(
    r"\b(?:(?:is|are|equals?|be|gives?|there are|there is|solution|answer|value)(?: is| are)?|total of)\s*:?\s*$|:\s*$",
    re.IGNORECASE,
)


def _negates(words: str) -> bool:
    return bool(_NEGATIONS & set(re.findall(r"[a-z]+", words.lower())))


def _opens(words: str) -> bool:
    """Whether words lead to an answer, and say nothing else of it."""
    return bool(_OPENS.search(words)) and not _negates(words)


def _sentence(text: str, depth: int) -> Form | None:
    r"""\text{There are }12\text{ such numbers}: words that end in a verb, what they lead to, and a label."""
    match = re.fullmatch(r"\\text\{([^{}]*)\}(.*?)((?:\\text\{[^{}]*\})?)\s*", text, re.DOTALL)
    if match is None or not match[2].strip(" .,") or not _opens(match[1].strip()):
        return None
    tail = TEXT.sub(r"\1", match[3])
    if not is_harmless(tail):
        return None
    return read(match[2].strip(" .,") + (match[3] if tail.strip(" .") else ""), depth + 1)


def _words(text: str, depth: int) -> Form | None:
    bare = TEXT.sub(r" \1 ", text)
    if _LATEX_WORD.search(bare) or re.search(r"[=<>^_+*/|{}\[\]]", bare):
        return None
    if TEXT.search(text) is None and (not re.search(r"[A-Za-z]{3,}", bare) or _is_product(bare)):
        return None
    if answer := re.match(r"\s*(yes|no|true|false)\s*(?:[,;:.]|since\b|because\b|as\b)", bare, re.IGNORECASE):
        return Words((answer[1].lower(),))
    words = re.findall(r"[A-Za-z]+|-?\d+(?:\.\d+)?", bare.lower())
    kept = [word for word in words if word not in ("a", "an", "the")]
    return Words(tuple(kept)) if kept else None


def _is_product(text: str) -> bool:
    return bool(set(re.findall(r"[a-z]+", text.lower())) & (FUNCTIONS | {"sqrt", "pi"})) or bool(
        re.search(r"\d[A-Za-z]|[A-Za-z]\d", text)
    )


def _plus_minus(text: str, depth: int) -> Form | None:
    alternatives = _expanded(text)
    return Items(tuple(read(one, depth + 1) for one in alternatives)) if len(alternatives) > 1 else None


def _expanded(text: str) -> list[str]:
    r"""Of what has a \pm, all that it can be; a \mp goes with them all."""
    signs = _PLUS_MINUS.findall(text)
    if not signs or len(signs) > 4:
        return [text]
    choices: Iterable[Iterable[str]] = product("+-", repeat=len(signs))
    found = []
    if "mp" in signs:
        choices = [["+" if sign == "pm" else "-" for sign in signs], ["-" if sign == "pm" else "+" for sign in signs]]
    for chosen in choices:
        one = text
        for sign in chosen:
            one = _PLUS_MINUS.sub(sign, one, count=1)
        found.append(re.sub(r"(^|[(,=\[{])\s*\+", r"\1", one).strip())
    return found


_READERS = (
    _exact_with_approximation,
    _number,
    _choice,
    _special,
    _whole_text,
    _environment,
    _family,
    _listing,
    _set,
    _union,
    _bracketed,
    _sentence,
    _relation,
    _based,
    _ratio,
    _quantity,
    _words,
    _plus_minus,
)
