r"""What an answer can be: its form, and its parts. `reading` finds it, `same` compares.

    3, \frac{1}{2}, x^2+1       Value        by `values`
    5 cm, 1 hour 30 minutes     Quantity     by `units`
    x = 5, f(x) = 2x+1          Labelled     a name and what it stands for; the name is dropped where the other has none
    1, 2 / x = 1 or x = 2       Items        in any order, each once
    (1, 2), vectors, matrices   Row          in order; brackets count where there are two
    [1, 2), x > 3               Interval     ends, and whether they belong to it; unions of them
    \{1, 2\}                    Items
    1, 3, \ldots, 2n-1          Progression  first, step and last
    n = 3k, k \in Z             Family       the values that it takes
    4210_5                      Based        digits and base
    3:4, 5:30                   Ratio        term by term
    (B), B. 12                  Choice       the letter; the text where one has no letter
    yes, no solution            Words        without articles and endings

Two answers of different forms are the same only where this says so. What has more parts never equals what has fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_apo.rewards.answers.units import Unit


@dataclass(frozen=True)
class Value:
    text: str


@dataclass(frozen=True)
class Quantity:
    """Amounts, each with its unit, such as 1 hour and 30 minutes; None: it has `words` in the place of one."""

    amounts: tuple[tuple[str, Unit | None], ...]
    words: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Labelled:
    name: str
    value: Form
    sides: tuple[str, str]


@dataclass(frozen=True)
class Relation:
    """Of two sides that are no name and value: = < > \\le \\ge \\ne \\in."""

    left: str
    sign: str
    right: str


@dataclass(frozen=True)
class Items:
    """joint: "and" where all hold at once, such as a system's equations; else alternatives, or a set."""

    items: tuple[Form, ...]
    is_set: bool = False
    joint: str = ","


@dataclass(frozen=True)
class Row:
    items: tuple[Form, ...]
    brackets: str


@dataclass(frozen=True)
class Interval:
    """Ends in LaTeX; `brackets` such as "(]". name: of the variable, if it was written as an inequality."""

    low: str
    high: str
    brackets: str
    name: str = ""


@dataclass(frozen=True)
class Union:
    parts: tuple[Form, ...]


@dataclass(frozen=True)
class Progression:
    """shown: what is written of it, in order, before the dots; last: what is behind them, if anything."""

    shown: tuple[str, ...]
    last: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """expressions of a parameter, which is any integer from `start` on (None: any at all)."""

    expressions: tuple[str, ...]
    parameter: str
    start: int | None


@dataclass(frozen=True)
class Based:
    digits: str
    base: int


@dataclass(frozen=True)
class Ratio:
    terms: tuple[str, ...]
    suffix: str = ""


@dataclass(frozen=True)
class Choice:
    letter: str
    text: str


@dataclass(frozen=True)
class Words:
    words: tuple[str, ...]


@dataclass(frozen=True)
class Approximate:
    exact: Form
    near: Form


Form = (
    Value
    | Quantity
    | Labelled
    | Relation
    | Items
    | Row
    | Interval
    | Union
    | Progression
    | Family
    | Based
    | Ratio
    | Choice
    | Words
    | Approximate
)
