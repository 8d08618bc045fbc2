r"""Numbers and expressions: whether two have the same value.

    both exact numbers       compared as fractions, however many digits they have
    both exact, irrational   compared to 40 digits, relatively
    the reference a decimal  the response is right within 1e-4 of it, relatively, and half of its last place; or, if it
                             is exact and no short decimal itself (1/3, \pi), where it is the reference once it is
                             rounded to as many places, unless the reference looks exact (.5, .75, .125)
    with letters             compared at points, after `math-verify`'s parser (latex2sympy) has read both whole
    other (sets, relations)  math-verify's comparison

What the parser does not take to the last character is no expression.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import count, permutations
from math import factorial as factorial_of
from math import isfinite, prod
from typing import Any

TOLERANCE = Fraction(1, 10**4)
MAX_LENGTH = 600  # characters that the parser is given
_MAX_BITS = 100_000  # of a number that is written out
_MOST_BARS, _MOST_BRACKETS = 12, 40  # with more the parser takes long
_TERMS = 3000  # of a sum that is written out
_MOST = 10**5  # of an exponent, and of what a factorial is of
_DIGITS = 40
_FORGET_AFTER = 5000  # texts
_LONGEST = 400  # characters of a number
_PLACES = 12  # a decimal of fewer places is meant as it is

_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)(?:\s*(?=\\frac)|\s+(?=\d+\s*/)))?"
    rf"(?:\\frac\{{\s*(?P<above>-?{_DECIMAL})\s*\}}\{{\s*(?P<below>-?{_DECIMAL})\s*\}}"
    rf"|(?P<over>{_DECIMAL})\s*(?:/|\\div)\s*(?P<under>{_DECIMAL})"
    rf"|(?P<plain>{_DECIMAL})(?P<repeats>\\overline\{{\d+\}}|\\bar\{{\d+\}}|\\dot\{{\d\}})?"
    rf"\s*(?:(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{{\s*(?P<power>[+-]?\d+)\s*\}}|(?P<digit>\d))|[eE](?P<e>[+-]?\d+))?)"
)


@dataclass(frozen=True)
class Number:
    """is_decimal: written with digits behind a point, so that it may stand for what it was rounded from. places: of the
    last digit behind the point."""

    value: Fraction
    is_decimal: bool = False
    places: int = 0

    def as_sympy(self) -> Any:
        from sympy import Rational

        return Rational(self.value.numerator, self.value.denominator)


_BLANK = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # that says nothing


def read_number(text: str) -> Number | None:
    """A number that is written out: digits, a fraction of two, a mixed number, a decimal, a power of ten of one."""
    text = text.strip()
    if len(text) > _LONGEST:
        return None
    while text.startswith("(") and text.endswith(")") and text.count("(") == 1:
        text = text[1:-1].strip()
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign = -1 if match["sign"] == "-" else 1
    if match["plain"] is not None:
        if match["whole"]:
            return None
        return _decimal(match, sign)
    above, below = (match["above"], match["below"]) if match["above"] else (match["over"], match["under"])
    if not Fraction(below):
        return None
    value = Fraction(above) / Fraction(below)
    if match["whole"]:
        if "." in above + below or above.startswith("-") or value >= 1:
            return None
        value += int(match["whole"])
    return Number(sign * value)


def _decimal(match: re.Match[str], sign: int) -> Number | None:
    plain, power = match["plain"], match["power"] or match["digit"] or match["e"]
    if power and len(power) > 4:
        return None
    places = len(plain.partition(".")[2])
    value = Fraction(plain) if plain != "." else Fraction(0)
    if match["repeats"]:
        digits = re.sub(r"\D", "", match["repeats"])
        if "." not in plain:
            return None
        return Number(sign * (value + Fraction(int(digits), (10 ** len(digits) - 1) * 10**places)))
    exponent = int(power) if power else 0
    return Number(sign * value * Fraction(10) ** exponent, places > 0, max(0, places - exponent))


def same_number(reference: Number, response: Number) -> bool:
    if reference.value == response.value:
        return True
    if not reference.is_decimal or not reference.value:
        return False
    if abs(response.value - reference.value) <= _tolerance(reference):
        return True
    return not _is_short_decimal(response.value) and _rounds_to(response.value, reference)


def _is_short_decimal(value: Fraction) -> bool:
    return (value * 10**_PLACES).denominator == 1


def _tolerance(reference: Number) -> Fraction:
    """No more than half of the last place that is written."""
    return min(TOLERANCE * abs(reference.value), Fraction(1, 2 * 10**reference.places))


def _rounds_to(value: Fraction, reference: Number) -> bool:
    """An exact value, to a decimal of two figures or more that is likely to be rounded: not .5, .75 or .125."""
    near = abs(value - reference.value) * 2 * 10**reference.places <= 1
    has_figures = abs(reference.value) * 10**reference.places >= 10
    return near and reference.places > 0 and has_figures and (reference.value * 40).denominator != 1


def same_value(reference: str, response: str) -> bool:
    """Of two expressions in LaTeX, as `writing.tidy` leaves them."""
    if _BLANK.sub("", reference) == _BLANK.sub("", response):
        return True
    one, other = read_number(reference), read_number(response)
    if one and other:
        return same_number(one, other)
    left, right = one.as_sympy() if one else parse(reference), other.as_sympy() if other else parse(response)
    if left is None or right is None:
        return False
    return _same(left, right, one)


@lru_cache(maxsize=4096)
def parse(text: str) -> Any:
    """sympy's object; None where the parser does not take all of it."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    if not text or len(text) > MAX_LENGTH or not _may_parse(text):
        return None
    _forget_now_and_then()
    try:
        found = latex2sympy(
            _for_parser(text),
            is_real=True,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
        return _exactly(found)
    except Exception:  # its parser raises what it likes, and text may be too deep for it
        return None


_parsed = count(1)


def _forget_now_and_then() -> None:
    """ANTLR keeps what it has learned of every text that it was ever given."""
    if next(_parsed) % _FORGET_AFTER:
        return
    with suppress(ImportError, AttributeError):  # of another version
        from antlr4.dfa.DFA import DFA
        from latex2sympy2_extended.antlr_parser import PSLexer, PSParser

        for kind in (PSLexer, PSParser):
            kind.decisionsToDFA[:] = [DFA(state, index) for index, state in enumerate(kind.atn.decisionToState)]
        PSParser.sharedContextCache.cache.clear()


def _exactly(found: Any) -> Any:
    """With fractions for decimals, and the imaginary unit for the letter i."""
    from sympy import Float, I, Rational

    exact = {decimal: Rational(str(decimal)) for decimal in found.atoms(Float)}
    return found.xreplace(exact | {symbol: I for symbol in found.free_symbols if str(symbol) == "i"})


_MISREAD = re.compile(
    r"\d\s+\d|\d\s*_|\)\s*_|\d\.\d+\.\d|\\ldots|\\text|\\mid|\\pmod|\\equiv|\\begin\{cases|[?\";']|!\s*!|[A-Z]{2,}"
    r"|(?<![A-Za-z\\])[fghFGPQ]\s*\(|\\(?:partial|lim|gcd|lcm|prime)(?![A-Za-z])|\\binom\{\d{5,}"
    r"|\\(?:sum|prod)(?![A-Za-z]).*[a-z]_\{?[a-z]"
)


def _may_parse(text: str) -> bool:
    r"""Not with what it would drop or misread: a subscript of a number, a list's dots, primes, unknown functions,
    products of capitals, gcds of letters, `!!`; nor with what it would take too long to write out."""
    return not _MISREAD.search(text) and text.count("|") <= _MOST_BARS and text.count("(") <= _MOST_BRACKETS


def _for_parser(text: str) -> str:
    text = re.sub(r"(\d+(?:\.\d+)?)\s*\^\\circ", r"(\1\\cdot\\pi/180)", text).replace("^\\circ", "")
    text = re.sub(r"(?<=\d)\s*\\%", "/100", text)
    return re.sub(r"(?<![A-Za-z\\])(\d+)\s*(\\frac\{\d+\}\{\d+\})", r"(\1+\2)", text)


def _same(left: Any, right: Any, reference: Number | None) -> bool:
    from sympy import Expr, MatrixBase

    if not isinstance(left, Expr) or not isinstance(right, Expr) or isinstance(left, MatrixBase):
        return by_math_verify(left, right)
    if left == right:
        return True
    letters, others = _letters(left), _letters(right)
    if not letters and not others:
        return _same_constant(left, right, reference)
    return any(_same_at_points(left, one) for one in _renamed(left, right, letters, others))


def by_math_verify(left: Any, right: Any) -> bool:
    # No time limit of its own: it is an alarm signal, and the pool kills what takes too long.
    return bool(math_verify().verify(left, right, timeout_seconds=None))


@lru_cache(maxsize=1)
def math_verify() -> Any:
    import math_verify as module  # sympy: 0.3 s, for those who grade with it

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limit is off
    return module


def _letters(expression: Any) -> list[str]:
    return sorted(str(symbol) for symbol in expression.free_symbols)


_ANY = re.compile(r"[Cc](?:_\{?\d\}?)?")  # as the reference writes a constant that may be any
_CONSTANT = re.compile(r"[CcKkABD](?:_\{?\d\}?)?")


def _renamed(left: Any, right: Any, letters: list[str], others: list[str]) -> list[Any]:
    """The response's expression, with the reference's names for constants that may have any, as those of integrals."""
    own, its = [x for x in letters if x not in others], [x for x in others if x not in letters]
    if not own and not its:
        own = its = [letter for letter in letters if re.fullmatch(r"[Cc]_\{?\d\}?", letter)]
    if not own or len(own) == len(letters) or not len(own) == len(its) <= 2:
        return [right]
    if not all(map(_ANY.fullmatch, own)) or not all(map(_CONSTANT.fullmatch, its)):
        return [right]
    symbols = {str(symbol): symbol for symbol in left.free_symbols | right.free_symbols}
    return [
        right.subs({symbols[old]: symbols[new] for old, new in zip(order, own, strict=True)}, simultaneous=True)
        for order in permutations(its)
    ]


def _same_constant(left: Any, right: Any, reference: Number | None) -> bool:
    from sympy import Integral

    exact, other = _exact(left), _exact(right)
    if exact is not None and other is not None:
        if reference is not None:
            return same_number(reference, Number(other))
        return exact == other
    if not (_is_tame(left) and _is_tame(right)):
        return False  # they are not written alike
    a, b = _evaluated(left), _evaluated(right)
    if a is None or b is None:
        return by_math_verify(left, right)
    if reference is not None and reference.is_decimal:
        value = Fraction(str(b)) if b.is_real else None
        near = value is not None and abs(value - reference.value) <= _tolerance(reference)
        return near or (value is not None and _rounds_to(value, reference))
    digits = _DIGITS // 2 if left.has(Integral) or right.has(Integral) else _DIGITS
    return bool(abs(a - b) <= 10 ** (digits // 4 - digits) * max(abs(a), abs(b)))


def _exact(expression: Any) -> Fraction | None:
    """The value of what is made of integers by + - * / ^ and !, if it is not too long to be written."""
    from sympy import Add, Integer, Mul, Pow, Rational, UnevaluatedExpr, factorial

    if isinstance(expression, (Integer, Rational)):
        return Fraction(int(expression.p), int(expression.q))
    if isinstance(expression, UnevaluatedExpr):
        return _exact(expression.args[0])
    if not isinstance(expression, (Add, Mul, Pow, factorial)):
        return None
    found = [value for argument in expression.args if (value := _exact(argument)) is not None]
    if len(found) < len(expression.args):
        return None
    if isinstance(expression, Add):
        return sum(found, Fraction(0))
    if isinstance(expression, Mul):
        value = prod(found, start=Fraction(1))
        return value if _bits(value) <= _MAX_BITS else None
    if isinstance(expression, Pow):
        base, power = found
        if power.denominator != 1 or (base == 0 and power <= 0) or abs(power) * _bits(base) > _MAX_BITS:
            return None
        return base ** int(power)
    (number,) = found
    if number.denominator != 1 or not 0 <= number <= 5000:
        return None
    return Fraction(factorial_of(int(number)))


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _is_tame(expression: Any) -> bool:
    """Whether it can be evaluated: no tower of powers, no factorial of millions, no long sum."""
    from sympy import Pow, Product, Sum, binomial, factorial

    for part in expression.atoms(Pow, factorial, binomial, Sum, Product):
        if isinstance(part, Sum | Product):
            lengths = [_exact(limit[2] - limit[1]) for limit in part.limits if len(limit) == 3 and limit[2].is_finite]
            if any(length is not None and length > _TERMS for length in lengths):
                return False
            continue
        argument = part.args[0] if isinstance(part, binomial) else part.args[-1]
        value = _exact(argument)
        if value is not None and abs(value) > _MOST:
            return False
        whole = (one for one in argument.atoms(Pow, factorial) if one.is_integer and not one.free_symbols)
        if any(_exact(one) is None for one in whole):
            return False
    return True


def _evaluated(expression: Any) -> Any:
    """To `_DIGITS` digits, with real roots of negative numbers where there are any; None where there is no number."""
    from sympy import I, Integral

    try:
        if not expression.has(I):
            expression = _with_real_roots(_written_out(expression))
        value = expression.evalf(_DIGITS // 2 if expression.has(Integral) else _DIGITS)
    except Exception:
        return None
    return value if value is not None and value.is_number and value.is_finite else None


def _written_out(expression: Any) -> Any:
    """With the terms of sums and products of few terms."""
    from sympy import Add, Mul, Product, Sum

    def write(part: Any) -> Any:
        ((letter, first, last),) = part.limits
        if not (first.is_Integer and last.is_Integer and last - first <= _TERMS):
            return part
        terms = [part.function.subs(letter, number) for number in range(int(first), int(last) + 1)]
        return Add(*terms) if isinstance(part, Sum) else Mul(*terms)

    return expression.replace(lambda part: isinstance(part, Sum | Product) and len(part.limits) == 1, write)


def _with_real_roots(expression: Any) -> Any:
    """Raises ValueError where an even root, or a logarithm, of a negative number is taken."""
    from sympy import Pow, Rational, log

    def root(part: Any) -> Any:
        base, power = part.args
        if not base.is_negative or power.is_integer:
            return part
        if isinstance(power, Rational) and power.q % 2:
            return (-1) ** power.p * Pow(-base, power)
        raise ValueError("no real number")

    for part in expression.atoms(log):
        if part.args[0].is_negative:
            raise ValueError("no real number")
    return expression.replace(lambda part: isinstance(part, Pow), root)


_POINTS = (
    (Fraction(7, 5), Fraction(13, 11), Fraction(3, 7), Fraction(19, 13), Fraction(5, 3), Fraction(11, 17)),
    (Fraction(-9, 7), Fraction(-4, 11), Fraction(-16, 9), Fraction(-5, 8), Fraction(-13, 6), Fraction(-2, 3)),
    (Fraction(37, 3), Fraction(17, 7), Fraction(123, 19), Fraction(41, 2), Fraction(9, 70), Fraction(85, 4)),
    (Fraction(-1009, 7), Fraction(-204, 11), Fraction(-67, 9), Fraction(-305, 8), Fraction(-90, 7), Fraction(-88, 5)),
    (Fraction(1013, 9), Fraction(505, 13), Fraction(712, 7), Fraction(321, 8), Fraction(404, 9), Fraction(815, 11)),
    (Fraction(-3, 5), Fraction(12, 7), Fraction(-7, 3), Fraction(9, 5), Fraction(-1, 7), Fraction(5, 2)),
    (Fraction(3, 11), Fraction(5, 13), Fraction(23, 19), Fraction(2, 13), Fraction(9, 7), Fraction(8, 5)),
)
_INTEGERS = tuple(tuple(1 + (number * (5 + 2 * place) + place) % 17 for place in range(6)) for number in range(17))
_LARGE = ((100, 257, 301, 120, 199, 150), (257, 100, 142, 333, 211, 128))


def _same_at_points(left: Any, right: Any) -> bool:
    """Wherever both are real numbers, or both are complex, which must be at two points or more. Sums to n and n! want
    integers."""
    from sympy import Integral, Product, Sum, binomial, ceiling, factorial, floor

    symbols = left.free_symbols | right.free_symbols
    if len(symbols) > len(_POINTS[0]):
        return by_math_verify(left, right)
    wants_integers = (Sum, Product, Integral, factorial, binomial)
    steps = (floor, ceiling)
    points: list[tuple] = list(_POINTS)
    if left.has(*wants_integers) or right.has(*wants_integers):
        points = [*_INTEGERS[1:9]]
    elif left.has(*steps) or right.has(*steps):
        are_integers = all(re.match("[ijkmnpqMN]", str(symbol)) for symbol in symbols)
        points = [*_INTEGERS[1:], *_LARGE, *(() if are_integers else _POINTS)]
    seen = 0
    for a, b in _at_points(left, right, points):
        if abs(a - b) > 10 ** (12 - _DIGITS) * max(abs(a), abs(b), 10 ** (5 - _DIGITS)):
            return False
        seen += 1
    return seen > 1


def _at_points(left: Any, right: Any, points: Iterable[Sequence[Any]]) -> Iterator[tuple[Any, Any]]:
    """Both values wherever both expressions have one, their letters in the order of the alphabet."""
    from sympy import Rational

    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    for point in points:
        values = {symbol: Rational(value) for symbol, value in zip(symbols, point, strict=False)}
        a, b = (_at(expression, values) for expression in (left, right))
        if a is not None and b is not None:
            yield a, b


def _at(expression: Any, values: dict) -> Any:
    """The value at a point; None where there is none, or one that is real by way of roots that are not."""
    from sympy import I, Pow, Rational, binomial, factorial, log

    is_complex = expression.has(I)
    try:
        # From the inside out: sympy writes powers out as soon as it can.
        for part in sorted(expression.atoms(Pow, log, factorial, binomial), key=lambda part: part.count_ops()):
            first, last = (argument.xreplace(values) for argument in (part.args[0], part.args[-1]))
            if isinstance(part, factorial | binomial) and not first.free_symbols and abs(first) > _TERMS:
                return None
            if isinstance(part, Pow) and not last.free_symbols and abs(last) > _MOST:
                return None
            power = last if isinstance(part, Pow) else Rational(1, 2)
            is_even = not power.is_integer and not (power.is_Rational and power.q % 2)
            if not is_complex and isinstance(part, Pow | log) and is_even and first.is_negative:
                return None
        value = expression.xreplace(values)
        return _evaluated(value) if _is_tame(value) else None
    except Exception:
        return None


def are_multiples(left: Any, right: Any) -> bool:
    """Of two expressions in the same letters, one of which is a number times the other, as sides of equations are."""
    from sympy import Expr

    if not isinstance(left, Expr) or not isinstance(right, Expr) or _letters(left) != _letters(right):
        return False
    if len(left.free_symbols) > len(_POINTS[0]):
        return False
    ratios: list[Any] = []
    for a, b in _at_points(left, right, _POINTS):
        if min(abs(a), abs(b)) < 10 ** (8 - _DIGITS):
            if max(abs(a), abs(b)) < 10 ** (8 - _DIGITS):
                continue
            return False
        ratios.append(a / b)
    return len(ratios) > 1 and all(abs(ratio - ratios[0]) <= 10 ** (12 - _DIGITS) * abs(ratios[0]) for ratio in ratios)


def at_integers(expression: Any, parameter: str, span: range) -> list[float] | None:
    """The finite real values of an expression of one parameter; None if it has other letters."""
    from sympy import Expr, Integer

    if not isinstance(expression, Expr) or _letters(expression) not in ([parameter], []):
        return None
    (symbol,) = expression.free_symbols or (None,)
    found = []
    for number in span:
        value = _at(expression, {symbol: Integer(number)} if symbol is not None else {})
        if value is not None and value.is_real and isfinite(float(value)):
            found.append(float(value))
    return found


def is_near(exact: str, near: str) -> bool:
    """Whether a number is about what is said to be near to it."""
    left, right = (_evaluated(found) if (found := parse(text)) is not None else None for text in (exact, near))
    return left is not None and right is not None and bool(abs(left - right) <= 0.01 * abs(left))
