"""Whether a response's answer is the reference's, by their forms (`forms.py` says which may be equal)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise

from megatron_apo.rewards.answers import values
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
    Quantity,
    Ratio,
    Relation,
    Row,
    Union,
    Value,
    Words,
)
from megatron_apo.rewards.answers.reading import MONTHS, has_letter, read

_PERCENT = (("percent", 1),)
_LEAST = 3  # values that tell a family
_SPAN = 60  # values of a family's parameter, each way


def same(reference: Form, response: Form) -> bool:
    """The first of these rules that is for both says it."""
    if reference == response:
        return True
    for rule in _RULES:
        if (found := rule(reference, response)) is not None:
            return found
    if type(reference) is not type(response):
        return False
    compare: Callable[..., bool] | None = _SAME.get(type(reference))
    return compare(reference, response) if compare else False


# --- of different forms


def _approximate(reference: Form, response: Form) -> bool | None:
    """What it is counts; what it is near to does only for a reference that is rounded itself."""
    if isinstance(reference, Approximate):
        if isinstance(response, Approximate):
            return same(reference.exact, response.exact)
        return same(reference.exact, response) or same(reference.near, response)
    if isinstance(response, Approximate):
        if same(reference, response.exact):
            return True
        exact, near = response.exact, response.near
        agree = isinstance(exact, Value) and isinstance(near, Value) and values.is_near(exact.text, near.text)
        return agree and _is_rounded(reference) and same(reference, near)
    return None


def _is_rounded(form: Form) -> bool:
    number = values.read_number(form.text) if isinstance(form, Value) else None
    return number is not None and number.is_decimal


def _choice(reference: Form, response: Form) -> bool | None:
    if isinstance(reference, Choice) and isinstance(response, Choice):
        if reference.letter != response.letter:
            return False
        texts = reference.text and response.text
        return not texts or same(read(reference.text), read(response.text))
    if isinstance(reference, Choice):
        return bool(reference.text) and same(read(reference.text), response)
    if isinstance(response, Choice):
        if response.text:
            return same(reference, read(response.text))
        return same(reference, Value(response.letter)) if isinstance(reference, Value | Labelled) else False
    return None


def _labelled(reference: Form, response: Form) -> bool | None:
    """A name is dropped where the other has none, and has to be the same where it has one."""
    if isinstance(reference, Labelled) and isinstance(response, Labelled):
        if reference.name == response.name:
            return same(reference.value, response.value)
        if (renamed := _renamed(reference, response)) is not None:
            return same(reference.value, renamed)
        return _same_equation(reference.sides, response.sides)
    if isinstance(reference, Labelled) and isinstance(response, Relation):
        return response.sign == "=" and _same_equation(reference.sides, (response.left, response.right))
    if isinstance(response, Relation) and isinstance(reference, Value) and response.sign == "=":
        # m + n = 17 for 17
        is_sum = re.fullmatch(r"[A-Za-z](?:_\{?\w+\}?)?(?:\s*\+\s*[A-Za-z](?:_\{?\w+\}?)?)+", response.left)
        return bool(is_sum and values.read_number(response.right)) and values.same_value(reference.text, response.right)
    if isinstance(reference, Relation) and isinstance(response, Labelled):
        return reference.sign == "=" and _same_equation((reference.left, reference.right), response.sides)
    if isinstance(reference, Labelled) and not isinstance(response, Items):
        return same(reference.value, response)
    if isinstance(response, Labelled) and not isinstance(reference, Items):
        return same(reference, response.value)
    return None


def _renamed(reference: Labelled, response: Labelled) -> Form | None:
    """The value of f(t) or a_k in the letter of f(x) or a_n."""
    pattern = re.compile(r"(\\?[A-Za-z]+'*(?:\^-1|\^\{-1\})?)(?:\(([a-z])\)|_\{?([a-z])\}?)")
    own, its = pattern.fullmatch(reference.name), pattern.fullmatch(response.name)
    if own is None or its is None or own[1] != its[1] or bool(own[2]) != bool(its[2]):
        return None
    old, new = its[2] or its[3], own[2] or own[3]
    if has_letter(response.sides[1], new):
        return None
    return read(re.sub(rf"(?<![A-Za-z\\]){old}(?![A-Za-z])", new, response.sides[1])) if response.sides[1] else None


def _same_equation(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Of which one is a multiple of the other."""
    if not all((*one, *other)):
        return False
    left, right = (values.parse(f"({sides[0]})-({sides[1]})") for sides in (one, other))
    return left is not None and right is not None and values.are_multiples(left, right)


def _assignments(form: Form) -> dict[str, Form] | None:
    """Of a system that is solved, its names and what they are."""
    if isinstance(form, Items) and form.joint == "and" and all(isinstance(item, Labelled) for item in form.items):
        found = {item.name: item.value for item in form.items if isinstance(item, Labelled)}
        return found if len(found) == len(form.items) else None
    if isinstance(form, Labelled) and form.name.startswith("(") and isinstance(form.value, Row):
        names = form.name.strip("()").split(",")
        return dict(zip(names, form.value.items, strict=True)) if len(names) == len(form.value.items) else None
    return None


def _in_order(assigned: dict[str, Form]) -> list[Form]:
    """As they are written; x, y and z in their own order."""
    names = sorted(assigned) if assigned.keys() <= set("xyz") else list(assigned)
    return [assigned[name] for name in names]


def _system(reference: Form, response: Form) -> bool | None:
    """x = 1, y = 2, (x, y) = (1, 2) and (1, 2) are alike; names are in the order in which they are written, x, y
    and z in their own."""
    own, its = _assignments(reference), _assignments(response)
    if own is not None and its is not None:
        return own.keys() == its.keys() and all(same(value, its[name]) for name, value in own.items())
    if own is not None and isinstance(response, Row | Items):
        if isinstance(response, Items) and response.joint != ",":
            return None
        return _each_same(_in_order(own), response.items)
    is_listed = isinstance(reference, Row) or (isinstance(reference, Items) and reference.joint == ",")
    if its is not None and is_listed and isinstance(reference, Row | Items):
        return _each_same(reference.items, _in_order(its))
    return None


def _solutions(reference: Form, response: Form) -> bool | None:
    """Several solutions of a system: (x, y) = (1, 2), (2, 1)."""
    if isinstance(reference, Labelled) and isinstance(reference.value, Items) and isinstance(response, Items):
        names = reference.name.strip("()").split(",")
        if len(names) > 1:
            its = [_assignments(item) for item in response.items]
            rows = [
                Row(tuple(found[name] for name in names), "()") if found and found.keys() == set(names) else item
                for found, item in zip(its, response.items, strict=True)
            ]
            return _same_items(reference.value, Items(tuple(rows)))
        return same(reference.value, response)
    if isinstance(response, Labelled) and isinstance(response.value, Items) and isinstance(reference, Items):
        return same(reference, response.value)
    return None


def _interval(reference: Form, response: Form) -> bool | None:
    """Open intervals and points are written alike, and an inequality is an interval."""
    own, its = _as_interval(reference, response), _as_interval(response, reference)
    if own is not None and its is not None:
        return _same_interval(own, its)
    if (parts := _as_union(reference)) and (others := _as_union(response)):
        return _matched(parts, others)
    return None


def _as_interval(form: Form, other: Form) -> Interval | None:
    if isinstance(form, Interval):
        return form
    is_wanted = isinstance(other, Interval | Union)
    if is_wanted and isinstance(form, Row) and len(form.items) == 2 and all(isinstance(x, Value) for x in form.items):
        low, high = (item.text for item in form.items if isinstance(item, Value))
        return Interval(low, high, form.brackets)
    if isinstance(form, Labelled) and is_wanted:
        return _as_interval(form.value, other)
    return None


def _as_union(form: Form) -> list[Form] | None:
    if isinstance(form, Labelled):
        return _as_union(form.value)
    parts: Sequence[Form]
    if isinstance(form, Union):
        parts = form.parts
    elif isinstance(form, Items) and form.joint == "or":
        parts = form.items
    else:
        return None
    found = [_as_interval(part, Union(())) or part for part in parts]
    if len({part.name for part in found if isinstance(part, Interval)}) > 1:
        return None
    return list(found) if all(isinstance(part, Interval | Items) for part in found) else None


def _row(reference: Form, response: Form) -> bool | None:
    """A list without brackets is taken for a point in its order; a point for a list of two is not."""
    if isinstance(reference, Row) and isinstance(response, Items) and not response.is_set and response.joint == ",":
        return reference.brackets == "()" and _each_same(reference.items, response.items)
    if isinstance(reference, Items) and isinstance(response, Row) and reference.joint == ",":
        is_plain = not reference.is_set and response.brackets in ("()", "[]")
        return is_plain and _each_same(reference.items, response.items)
    return None


def _quantity(reference: Form, response: Form) -> bool | None:
    if isinstance(reference, Quantity) and isinstance(response, Quantity):
        return _same_quantity(reference, response)
    for one, other, is_response in ((reference, response, False), (response, reference, True)):
        if isinstance(one, Quantity) and isinstance(other, Value):
            return _same_as_bare(one, other, is_response)
        if isinstance(one, Quantity) and isinstance(other, Ratio | Words | Row | Based):
            return False
    return None


def _same_as_bare(quantity: Quantity, value: Value, quantity_is_response: bool) -> bool:
    if len(quantity.amounts) != 1:
        return False
    amount, unit = quantity.amounts[0]

    def compare(text: str) -> bool:
        pair = (value.text, text) if quantity_is_response else (text, value.text)
        return values.same_value(*pair)

    if compare(amount):
        return True
    return unit is not None and unit.dimension == _PERCENT and compare(f"\\frac{{{amount}}}{{100}}")


def _same_quantity(reference: Quantity, response: Quantity) -> bool:
    own, its = _total(reference), _total(response)
    if own is not None and its is not None:
        return own[1] == its[1] and values.same_number(own[0], its[0])
    if len(reference.amounts) != 1 or len(response.amounts) != 1:
        return False
    (amount, unit), (its_amount, its_unit) = reference.amounts[0], response.amounts[0]
    if unit is None and its_unit is None:
        words, others = reference.words, response.words
        return (words <= others or others <= words) and values.same_value(amount, its_amount)
    return unit == its_unit and values.same_value(amount, its_amount)


def _total(quantity: Quantity) -> tuple[values.Number, tuple[tuple[str, int], ...]] | None:
    """In the base units of its dimension."""
    total, dimension, is_decimal, places = Fraction(0), None, False, 0
    for amount, unit in quantity.amounts:
        number = values.read_number(amount)
        if number is None or unit is None or dimension not in (None, unit.dimension):
            return None
        total += number.value * unit.scale
        dimension, is_decimal = unit.dimension, is_decimal or number.is_decimal
        places = number.places if unit.scale == 1 else 0
    return (values.Number(total, is_decimal, places), dimension) if dimension is not None else None


def _based(reference: Form, response: Form) -> bool | None:
    """A base that is not said is the reference's."""
    if isinstance(reference, Based) and isinstance(response, Value):
        return re.sub(r"[\s()]", "", response.text).upper() == reference.digits
    if isinstance(response, Based) and isinstance(reference, Value):
        return response.base == 10 and values.same_value(reference.text, response.digits)
    return None


def _ratio(reference: Form, response: Form) -> bool | None:
    for one, other, is_response in ((reference, response, False), (response, reference, True)):
        if isinstance(one, Ratio) and isinstance(other, Value):
            if len(one.terms) != 2 or one.suffix or re.fullmatch(r"\d\d", one.terms[1]):  # the last is a time of day
                return False
            fraction = f"\\frac{{{one.terms[0]}}}{{{one.terms[1]}}}"
            return values.same_value(other.text, fraction) if is_response else values.same_value(fraction, other.text)
    return None


def _family(reference: Form, response: Form) -> bool | None:
    if isinstance(reference, Family) and isinstance(response, Family):
        return _same_family(reference, response)
    return False if isinstance(reference, Family) or isinstance(response, Family) else None


def _words(reference: Form, response: Form) -> bool | None:
    if isinstance(reference, Words) and isinstance(response, Words):
        return _same_words(reference.words, response.words)
    if isinstance(reference, Words) and isinstance(response, Items):
        first = response.items[0]
        is_answered = reference.words in (("yes",), ("no",)) and isinstance(first, Words)
        return is_answered and isinstance(first, Words) and first.words[:1] == reference.words
    return None


def _same_words(own: tuple[str, ...], its: tuple[str, ...]) -> bool:
    ends = [[word.removesuffix("s") if len(word) > 3 else word for word in words] for words in (own, its)]
    if {month.lower() for month in MONTHS} & set(own):
        return sorted(ends[0]) == sorted(ends[1])
    return ends[0] == ends[1]


def _items_of_one(reference: Form, response: Form) -> bool | None:
    """A set of one is its element."""
    for one, other, is_response in ((reference, response, False), (response, reference, True)):
        if isinstance(one, Items) and not isinstance(other, Items) and len(one.items) == 1:
            return same(other, one.items[0]) if is_response else same(one.items[0], other)
    return None


_RULES = (
    _approximate,
    _choice,
    _family,
    _solutions,
    _system,
    _interval,
    _labelled,
    _items_of_one,
    _words,
    _quantity,
    _based,
    _ratio,
    _row,
)


# --- of one form


def _same_items(reference: Items, response: Items) -> bool:
    """`_matched`; of several relations also whether all hold or one."""
    relations = [item for item in reference.items if isinstance(item, Labelled | Relation | Interval)]
    if relations and {reference.joint, response.joint} == {"and", "or"}:
        return False
    if (reference.joint == "cases") != (response.joint == "cases"):
        return False
    return _matched(reference.items, response.items)


def _each_same(reference: Sequence[Form], response: Sequence[Form]) -> bool:
    """In their order."""
    return len(reference) == len(response) and all(map(same, reference, response))


def _matched(reference: Sequence[Form], response: Sequence[Form]) -> bool:
    """In any order, each once."""
    if len(reference) != len(response):
        return False
    left = list(response)
    for item in reference:
        for index, other in enumerate(left):
            if same(item, other):
                del left[index]
                break
        else:
            return False
    return True


def _same_row(reference: Row, response: Row) -> bool:
    if len(reference.items) == 2 and reference.brackets != response.brackets:
        return False
    return _each_same(reference.items, response.items)


def _same_interval(reference: Interval, response: Interval) -> bool:
    ends = ((reference.low, response.low), (reference.high, response.high))
    if reference.brackets != response.brackets or (
        reference.name and response.name and reference.name != response.name
    ):
        return False
    return all(_same_end(one, other) for one, other in ends)


def _same_end(one: str, other: str) -> bool:
    infinite = [re.sub(r"[\s+]", "", end) for end in (one, other)]
    if any("\\infty" in end for end in infinite):
        return infinite[0] == infinite[1]
    return values.same_value(one, other)


def _same_progression(reference: Progression, response: Progression) -> bool:
    """Which begin alike, as far as both are written, and end alike; what one alone has written is in equal steps."""
    own, its = reference.shown, response.shown
    if len(reference.last) != len(response.last) or (min(len(own), len(its)) < 2 and len(own) != len(its)):
        return False
    pairs = [*zip(own, its, strict=False), *zip(reference.last, response.last, strict=True)]
    if not all(values.same_value(a, b) for a, b in pairs):
        return False
    numbers = [values.read_number(text) for text in max(own, its, key=len)]
    found = [number.value for number in numbers if number]
    if len(own) == len(its) or len(found) < len(numbers):
        return True
    return len({b - a for a, b in pairwise(found)}) == 1


def _same_family(reference: Family, response: Family) -> bool:
    """By the values that each takes first, which the other takes too."""
    own, its = (_values_of(family, _SPAN) for family in (reference, response))
    first, its_first = (_values_of(family, _SPAN // 4) for family in (reference, response))
    if not own or not its or not first or not its_first or min(len(first), len(its_first)) < _LEAST:
        return False
    return first <= its and its_first <= own


def _values_of(family: Family, span: int) -> set[float] | None:
    numbers = range(-span, span + 1) if family.start is None else range(family.start, family.start + span)
    found: set[float] = set()
    for text in family.expressions:
        expression = values.parse(text)
        taken = values.at_integers(expression, family.parameter, numbers) if expression is not None else None
        if taken is None:
            return None
        found |= {float(f"{value:.9g}") for value in taken}
    return found


def _same_relation(reference: Relation, response: Relation) -> bool:
    if reference.sign == response.sign == "=":
        return _same_equation((reference.left, reference.right), (response.left, response.right))
    if reference.sign == response.sign:
        if values.same_value(reference.left, response.left) and values.same_value(reference.right, response.right):
            return True
        left, right = (values.parse(f"{one.left} {one.sign} {one.right}") for one in (reference, response))
        return left is not None and right is not None and values.by_math_verify(left, right)
    return False


_SAME: dict[type, Callable[..., bool]] = {
    Value: lambda one, other: values.same_value(one.text, other.text),
    Relation: _same_relation,
    Items: _same_items,
    Row: _same_row,
    Union: lambda one, other: _matched(one.parts, other.parts),
    Progression: _same_progression,
    Ratio: lambda one, other: (
        one.suffix == other.suffix
        and len(one.terms) == len(other.terms)
        and all(map(values.same_value, one.terms, other.terms))
    ),
}
