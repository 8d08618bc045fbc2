"""What stands behind a number: units of measure, currency, per cent, degrees, and words for what was counted.

both have units of one dimension     the amounts are compared in it: 1 m = 100 cm, 1 hour 30 minutes = 90 minutes
both, of different dimensions        different
one of them alone                    it is dropped: 5 cm = 5; of several (1 hour 30 minutes) nothing is dropped
words                                dropped, unless both have some and neither's are among the other's
degrees                              dropped; radians are a unit of their own
%                                    50 % = 50, and 50 % = 1/2, but 50 is not 1/2
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_LENGTH = {"mm": "1/1000", "cm": "1/100", "dm": "1/10", "m": "1", "km": "1000", "in": "127/5000", "ft": "381/1250"}
_LENGTH |= {"yd": "1143/1250", "mi": "201168/125", "nm": "1/1000000000"}
_KINDS = {
    "length": _LENGTH,
    "time": {"ms": "1/1000", "s": "1", "min": "60", "h": "3600", "day": "86400", "week": "604800"},
    "months": {"month": "1", "year": "12", "decade": "120", "century": "1200"},
    "mass": {
        "mg": "1/1000000",
        "g": "1/1000",
        "kg": "1",
        "t": "1000",
        "lb": "45359237/100000000",
        "oz": "45359237/1600000000",
    },
    "volume": {
        "ml": "1/1000",
        "cl": "1/100",
        "l": "1",
        "gal": "473176473/125000000",
        "qt": "473176473/500000000",
        "pt": "473176473/1000000000",
    },
    "dollars": {"dollar": "1", "cent": "1/100"},
    "euros": {"euro": "1"},
    "pounds": {"gbp": "1"},
    "yen": {"yen": "1"},
    "rupees": {"rupee": "1"},
    "angle": {"deg": "1"},
    "radians": {"rad": "1"},
    "temperature": {"celsius": "1"},
    "fahrenheit": {"fahrenheit": "1"},
    "kelvin": {"kelvin": "1"},
    "energy": {"joule": "1", "kj": "1000", "kwh": "3600000", "calorie": "4184/1000"},
    "power": {"watt": "1", "kw": "1000"},
    "force": {"newton": "1"},
    "charge": {"coulomb": "1"},
    "voltage": {"volt": "1"},
    "frequency": {"hz": "1"},
}
_NAMES = {
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre",
    "dm": "decimeter decimetre",
    "m": "meter metre",
    "km": "kilometer kilometre",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "nm": "nanometer nanometre",
    "ms": "millisecond",
    "s": "second sec",
    "min": "minute mins",
    "h": "hour hr",
    "day": "",
    "week": "wk",
    "month": "",
    "year": "yr",
    "mg": "milligram",
    "g": "gram gm",
    "kg": "kilogram kgs",
    "t": "tonne ton",
    "lb": "pound lbs",
    "oz": "ounce",
    "ml": "mL milliliter millilitre",
    "cl": "",
    "l": "L liter litre",
    "gal": "gallon",
    "qt": "quart",
    "pt": "pint",
    "kwh": "kWh",
    "decade": "",
    "century": "centuries",
    "dollar": "USD usd bucks",
    "cent": "¢",
    "euro": "EUR",
    "gbp": "GBP",
    "deg": "degree",
    "rad": "radian",
    "celsius": "",
    "fahrenheit": "",
    "kelvin": "K",
    "joule": "J",
    "kj": "kJ kilojoule",
    "watt": "W",
    "kw": "kW kilowatt",
    "newton": "N",
    "coulomb": "C",
    "volt": "V",
    "hz": "Hz hertz",
}
_MONEY = {
    "\\$": "dollar",
    "$": "dollar",
    "€": "euro",
    "\\euro": "euro",
    "£": "gbp",
    "\\pounds": "gbp",
    "¥": "yen",
    "₹": "rupee",
}
_SCALE = {unit: (kind, Fraction(scale)) for kind, units in _KINDS.items() for unit, scale in units.items()}
_UNIT = {unit: unit for unit in _SCALE} | {name: unit for unit, names in _NAMES.items() for name in names.split()}
LETTER_UNITS = {"m", "s", "h", "g", "l", "t", "L", "K", "J", "W", "N", "C", "V", "in"}  # units only where text says so
_SMALL = {"a", "an", "the", "of", "per", "each", "in", "total", "only", "exactly", "such"}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


@dataclass(frozen=True)
class Unit:
    """dimension: of what, to which power, such as (("length", 1), ("time", -1)). scale: in the base units of it."""

    dimension: tuple[tuple[str, int], ...] = ()
    scale: Fraction = Fraction(1)


def read_unit(words: str, in_text: bool = True) -> Unit | None:
    """The unit that is written so, `km/h`, `cm^2` or `square feet`; None if that is none. in_text: within \\text{}."""
    text = words.strip().rstrip(".").replace("\\cdot", " ").replace("\\%", "%")
    text = re.sub(r"\bmph\b", "mi/h", re.sub(r"\bk(?:m|p)h\b", "km/h", text))
    if not text:
        return None
    above, _, below = re.sub(r"\s+per\s+", "/", text).partition("/")
    if "/" in below:
        return None
    powers: dict[str, int] = {}
    scale = Fraction(1)
    for part, sign in ((above, 1), (below, -1)):
        power_ahead = 1
        for word in re.findall(r"[^\s^]+(?:\s*\^\s*\{?-?\d\}?)?", part):
            name, _, power_text = re.sub(r"[\s{}]", "", word).partition("^")
            if name in _POWERS and not power_text:
                power_ahead = _POWERS[name]
                continue
            unit = _unit(name, in_text)
            if unit is None:
                return None
            power = sign * (int(power_text) if power_text else power_ahead)
            kind, one = _SCALE[unit]
            powers[kind] = powers.get(kind, 0) + power
            scale *= one**power
            power_ahead = 1
        if power_ahead != 1:
            return None
    if not powers:
        return None
    return Unit(tuple(sorted((kind, power) for kind, power in powers.items() if power)), scale)


def _unit(name: str, in_text: bool) -> str | None:
    """Outside of \\text{} letters are no units, since they may be products."""
    names = [name, name.removesuffix("s")]
    if len(name) > 2:
        names += [one.lower() for one in names]
    found = next((one for one in names if one in _UNIT), None)
    if found is None or (not in_text and len(found) < 3 and found != "cm"):
        return None
    return _UNIT[found]


def money(sign: str) -> Unit:
    return Unit(((_SCALE[_MONEY[sign]][0], 1),), _SCALE[_MONEY[sign]][1])


MONEY_SIGNS = tuple(_MONEY)


def label_words(text: str) -> frozenset[str]:
    """The words of a label without endings and small words."""
    words = re.findall(r"[A-Za-z]+", text.lower())
    return frozenset(word.removesuffix("s") if len(word) > 3 else word for word in words if word not in _SMALL)
