r"""Numbers with what stands behind them: units, money, per cent, degrees, and what was counted."""

from __future__ import annotations

import re

from megatron_apo.rewards.answers import values
from megatron_apo.rewards.answers.forms import Quantity
from megatron_apo.rewards.answers.units import MONEY_SIGNS, Unit, label_words, money, read_unit

TEXT = re.compile(r"\\text\{([^{}]*)\}")
_AMOUNT = r"[+-]?(?:\\frac\{[^{}]*\}\{[^{}]*\}|\d[\d.,]*(?:\s*\\frac\{\d+\}\{\d+\})?(?:\s*/\s*\d+)?|\.\d+)"
_UNIT_TEXT = (
    r"(?:\s*(?:\\text\{[^{}]*\}(?:\s*\^\s*\{?-?\d\}?)?|/|\\cdot|(?<![A-Za-z\\])[A-Za-z]+\.?(?:\s*\^\s*\{?-?\d\}?)?))+"
)
_MONEY_SIGN = "|".join(map(re.escape, sorted(MONEY_SIGNS, key=len, reverse=True)))


def read_quantity(text: str) -> Quantity | None:
    """What is an amount with its unit, or several, to the last character."""
    if match := re.fullmatch(rf"([+-]?)\s*({_MONEY_SIGN})\s*(.*)", text, re.DOTALL):
        amount = match[1] + match[3]
        return Quantity(((amount, money(match[2])),)) if values.read_number(amount) else None
    if match := re.fullmatch(rf"(.*?)\s*({_MONEY_SIGN})", text, re.DOTALL):
        return Quantity(((match[1], money(match[2])),)) if values.read_number(match[1]) else None
    if match := re.fullmatch(r"(.*?)\s*(\\%|%|\\text\{\s*(?:percent|per cent|%)\s*\}|percent)", text, re.DOTALL):
        return Quantity(((match[1], Unit((("percent", 1),))),)) if match[1] else None
    if match := re.fullmatch(r"(.*?)\s*\^\\circ\s*(?:\\text\{\s*([CF])\s*\}|([CF]))?", text, re.DOTALL):
        if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", match[1]):
            return None
        letter = match[2] or match[3]
        kind = {"C": "temperature", "F": "fahrenheit", None: "angle"}[letter]
        return Quantity(((match[1], Unit(((kind, 1),))),)) if match[1] else None
    amounts, place = [], 0
    pattern = re.compile(rf"\s*(?:\\text\{{\s*(?:and)?\s*\}}|,|and)?\s*({_AMOUNT})({_UNIT_TEXT})")
    while match := pattern.match(text, place):
        unit = _unit_of(match[2])
        if unit is None:
            break
        amounts.append((match[1], unit))
        place = match.end()
    if amounts and not text[place:].strip():
        return Quantity(tuple(amounts))
    return _labelled_amount(text)


def _unit_of(text: str) -> Unit | None:
    in_text = "\\text" in text
    return read_unit(TEXT.sub(r"\1", text), in_text)


def _labelled_amount(text: str) -> Quantity | None:
    """A value, and behind it words: a unit, or what was counted."""
    match = re.fullmatch(
        r"(.*?)((?:\s*\\text\{[^{}]*\}(?:\s*\^\s*\{?-?\d\}?)?(?:\s*/\s*(?=\\text))?)+)", text, re.DOTALL
    )
    if match is None:
        match = re.fullmatch(r"([^A-Za-z\\]*\d|.*?\})(\s+[A-Za-z]{3,}(?:[ -][A-Za-z]+)*)", text, re.DOTALL)
    if match is None or not match[1].strip() or "\\text" in match[1]:
        return None
    amount, words = match[1].strip(), match[2]
    if amount[-1] in "=<>,+-" or re.search(r"\\(?:in|le|ge|ne|to|pm)$", amount):
        return None
    unit = _unit_of(words)
    if unit is not None:
        return Quantity(((amount, unit),))
    plain = TEXT.sub(r"\1", words)
    if not is_harmless(plain):
        return None
    return Quantity(((amount, None),), label_words(plain))


_STRONG = set(
    "not no except than least most greater less fewer more multiple multiples odd even every all or and nor only if "
    "when where for times plus minus divided squared cubed mod modulo hundred thousand million billion percent base "
    "pi half dozen trillion third quarter fifth tenth hundredth thousandth binary out choose remainder twice double "
    "triple factorial root sqrt negative positive infinity between from to up down larger smaller smallest "
    "largest".split()
)


def is_harmless(words: str) -> bool:
    """Whether what stands behind a number says what was counted, and nothing of the number."""
    found = re.findall(r"[a-z]+", words.lower())
    return not re.search(r"\d", words) and not _STRONG & {
        one for word in found for one in (word, word.removesuffix("s"))
    }
