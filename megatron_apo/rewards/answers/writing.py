"""One way of writing for what can be written in many: LaTeX, markdown, Unicode.

What is dropped around an answer, and what becomes of it:

    $ \\( \\) \\[ \\] \\displaystyle \\left \\right \\big        dropped
    ** __ ` around it, a full stop at its end, \\boxed in it   dropped
    \\, \\! \\; \\: \\  ~ \\quad, thin and other blanks          dropped between groups of three digits, else one blank
    {,} and , between groups of three digits                 dropped, but not inside of brackets, where they list
    \\dfrac \\tfrac \\cfrac, \\frac12, \\sqrt2                   \\frac{1}{2}, \\sqrt{2}
    \\textbf \\textrm \\mathrm \\mathbf \\mbox ...              \\text, or the letter alone if they hold a letter
    signs of Unicode                                         LaTeX's: U+2212 is -
"""

from __future__ import annotations

import re
from collections.abc import Callable

from megatron_apo.rewards.answers.units import LETTER_UNITS
from megatron_apo.rewards.text import closing_brace

_SIGNS = {
    **dict.fromkeys("\u2212\u2013\u2014\ufe63\uff0d", "-"),
    **dict.fromkeys("\u00a0\u2002\u2003\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
    **{"×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "±": r"\pm ", "∓": r"\mp "},
    **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap "},
    **{"∞": r"\infty ", "π": r"\pi ", "θ": r"\theta ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}"},
    **{"ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "…": r"\ldots ", "°": r"^\circ ", "º": r"^\circ "},
    **{"′": "'", "’": "'", "“": '"', "”": '"', "％": r"\%", "，": ", ", "：": ":", "；": ";"},
    **{"（": "(", "）": ")", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"},
}
FUNCTIONS = set(
    "sin cos tan cot sec csc log ln lg exp max min gcd lcm mod det arcsin arccos arctan sinh cosh tanh lim sup inf deg "
    "dim cis".split()
)
_SIGN = re.compile("|".join(map(re.escape, _SIGNS)))
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+|[A-Za-z]))")

_BLANK = r"(?:(?<!\\)\\[,!;: >]|~|\\(?:quad|qquad|thinspace|medspace|enspace)(?![A-Za-z])|\\hspace\*?\{[^{}]*\}|\s)"
_GROUP_BLANK = r"(?:(?<!\\)\\[,!;: ]|~|\s|\\thinspace(?![A-Za-z]))"
_THOUSANDS = re.compile(rf"(?<![\d.,])(\d{{1,3}})((?:{_GROUP_BLANK}+\d{{3}})+)(?!{_GROUP_BLANK}*\d)")
_COMMA_BLANK = re.compile(r"(?<=\d)\s*(?:\{,\}|,)\s*\\!\s*(?=\d{3})")
_BRACED_COMMA = re.compile(r"(?<=\d)\s*\{,\}\s*(?=\d{3}(?!\d))")

_DROPPED = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|(?:[bB]ig{1,2}|[bB]igg)[lrm]?|bigl|bigr|Bigl|Bigr|strut|"
    r"allowbreak|nobreak|mathstrut)(?![A-Za-z])|\\(?:left|right|middle|mleft|mright)(?![A-Za-z])\.?"
)
_ROW_END = re.compile(r"\\cr(?![A-Za-z])")
_DELIMITERS = re.compile(r"(?<!\\)\$|(?<!\\)\\[()\[\]]")
_FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|sc|normal|sl|up|md)?|math(?:rm|bf|it|sf|tt|normal|frak|up)|mbox|hbox|emph|"
    r"boldsymbol|bm|symbf|underline|pmb)\s*(?=\{)"
)
_OPERATOR = re.compile(r"\\operatorname\*?\s*\{\s*([A-Za-z]+)\s*\}")
_COLOR = re.compile(r"\\(?:text)?color\s*\{[^{}]*\}")
_LOG = re.compile(r"\\log_\s*(\w)")
_OLD_FONT = re.compile(r"\{\s*\\(?:rm|bf|it|sf|tt)\s+([^{}]*)\}|\\(?:rm|bf|it)(?![A-Za-z])\s*")
_BOX = re.compile(r"\\f?box(?:ed)?\s*(?=\{)")
_FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_LOOSE_ROOT = re.compile(r"\\sqrt\s*(\d|[A-Za-z])")
_MARKDOWN = re.compile(r"\*\*|__|`")
_ONE_SIGN = re.compile(r"\{([+\-=:<>])\}")
_SYNONYMS = {
    r"\\(?:dots|cdots|dotsc|dotsb|dotsm|hdots|vdots)(?![A-Za-z])|\.\.\.": r"\\ldots ",
    r"\\leq(?:slant|q)?(?![A-Za-z])|<=": r"\\le ",
    r"\\geq(?:slant|q)?(?![A-Za-z])|>=": r"\\ge ",
    r"\\lt(?![A-Za-z])": "<",
    r"\\gt(?![A-Za-z])": ">",
    r"\\neq?(?![A-Za-z])|(?<!\d)(?<!\))!=": r"\\ne ",
    r"\\(?:varnothing|O)(?![A-Za-z])": r"\\emptyset ",
    r"\\(?:langle|lbrack)(?![A-Za-z])": "(",
    r"\\(?:rangle|rbrack)(?![A-Za-z])": ")",
    r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])": "|",
    r"\\lbrace(?![A-Za-z])": r"\\{",
    r"\\rbrace(?![A-Za-z])": r"\\}",
    r"\\colon(?![A-Za-z])": ":",
    r"\^\s*\{?\s*\\(?:circ|degree)(?![A-Za-z])\s*\}?|\\(?:degree|textdegree)(?![A-Za-z])": r"^\\circ ",
    r"\\(?:approxeq|simeq|thickapprox)(?![A-Za-z])|\\doteq": r"\\approx ",
    r"\\mathbb\s+([A-Z])": r"\\mathbb{\1}",
    r"\\(?:Z|ZZ)(?![A-Za-z])": r"\\mathbb{Z}",
    r"\\(?:R|RR|reals|Reals)(?![A-Za-z])": r"\\mathbb{R}",
    r"\\imath(?![A-Za-z])": "i",
    r"\\exp(?![A-Za-z])": r"\\exp ",
}
_SYNONYM = [(re.compile(pattern), replacement) for pattern, replacement in _SYNONYMS.items()]


def tidy(text: str, joins_thousands: bool = True) -> str:
    """An answer in the one way of writing that the other modules read. joins_thousands: 101,102,103 is a number
    and not a list of three."""
    text = _ROOT.sub(lambda match: rf"\sqrt{{{next(filter(None, match.groups()))}}}", text)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub(r"[₀-₉]+", lambda match: f"_{{{match[0].translate(_SUBSCRIPTS)}}}", text)
    text = _SIGN.sub(lambda match: _SIGNS[match[0]], text)
    text = re.sub(r"(?<=[\w)}])\*\*(?=[\w({-])", "^", text)
    text = _MARKDOWN.sub("", text)
    text = _ROW_END.sub(r"\\\\", _DROPPED.sub("", _DELIMITERS.sub(" ", text)))
    text = unwrapped(text, _BOX, lambda inner, before: inner)
    text = _OLD_FONT.sub(lambda match: rf"\text{{{match[1]}}}" if match[1] else "", text)
    text = _OPERATOR.sub(r"\\\1 ", _COLOR.sub("", text))
    text = unwrapped(text, _FONT, _in_font)
    text = _thousands(text, joins_thousands)
    text = re.sub(rf"{_BLANK}+", " ", _ONE_SIGN.sub(r"\1", text))
    for pattern, replacement in _SYNONYM:
        text = pattern.sub(replacement, text)
    text = _fractions(_FRACTION.sub(r"\\frac", text))
    text = _LOG.sub(r"\\log_{\1}", _LOOSE_ROOT.sub(r"\\sqrt{\1}", text))
    text = re.sub(r"\s+", " ", text).strip()
    while (shorter := _without_end(text)) != text:
        text = shorter
    return text


def _without_end(text: str) -> str:
    """Without punctuation at its end, and without braces around all of it."""
    text = text.strip().strip("*_")
    if text.endswith((".", ";", ",", ":")) and not text.endswith("\\,"):
        text = text[:-1].rstrip()
    if text.startswith("{") and closing_brace(text) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def unwrapped(text: str, command: re.Pattern[str], put: Callable[[str, str], str]) -> str:
    """With `put(inner, before)` in place of each `\\command{inner}`; commands within others are done first."""
    for match in reversed(list(command.finditer(text))):
        before, rest = text[: match.start()], text[match.end() :]
        if (end := closing_brace(rest)) > 0:
            text = before + put(rest[1:end], before) + rest[end + 1 :]
    return text


def _in_font(inner: str, before: str) -> str:
    bare = inner.strip()
    if bare in LETTER_UNITS and re.search(r"[\d})]\s*(?:\\[,; ]|~)*\s*$", before):
        return rf"\text{{{inner}}}"
    if bare in FUNCTIONS and not re.search(r"[\d})]\s*$", before):
        return rf"\{bare} "
    if re.fullmatch(r"[A-Za-z]|[A-Z]{2,3}|[\d.,/+\-=\s]*\d[\d.,/+\-=\s]*", bare):
        return f" {bare} " if inner != bare else bare
    return rf"\text{{{inner}}}" if re.search(r"[A-Za-z]", inner) else f" {bare} "


def _thousands(text: str, joins_commas: bool) -> str:
    text = _COMMA_BLANK.sub(",", text)
    text = _BRACED_COMMA.sub("", text)
    text = _THOUSANDS.sub(lambda match: match[1] + re.sub(r"\D", "", match[2]), text)
    if not joins_commas:
        return text
    found, depth, end = [], 0, 0
    for match in re.finditer(r"\\[{}]|[()\[\]]|(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)", text):
        if match[0][0].isdigit():
            found.append(text[end : match.start()] + (match[0] if depth else match[0].replace(",", "")))
            end = match.end()
        else:
            depth += 1 if match[0] in ("\\{", "(", "[") else -1
    return "".join(found) + text[end:]


def _fractions(text: str) -> str:
    r"""\frac12, \frac1{2}, \frac{1}2 as \frac{1}{2}."""
    found, place = [], 0
    for match in re.finditer(r"\\frac(?![A-Za-z])\s*", text):
        if match.start() < place:
            continue
        found.append(text[place : match.start()] + r"\frac")
        place = match.end()
        for _ in range(2):
            while place < len(text) and text[place] == " ":
                place += 1
            if place >= len(text):
                break
            if text[place] == "{":
                if (end := closing_brace(text[place:])) < 0:
                    return text
                found.append(f"{{{_fractions(text[place + 1 : place + end])}}}")
                place += end + 1
            elif one := re.compile(r"\\sqrt\s*(?:\{[^{}]*\}|\d)|\\[A-Za-z]+|[A-Za-z\d]").match(text, place):
                found.append(f"{{{one[0]}}}")
                place = one.end()
            else:
                break
    return "".join(found) + text[place:]


_OPENING, _CLOSING = ("(", "[", "{", "\\{"), (")", "]", "}", "\\}")
_TOKEN = re.compile(r"\\text\{[^{}]*\}|\\(?:begin|end)\{[a-z]+\*?\}|\\[A-Za-z]+|\\.|.", re.DOTALL)


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts of `text` between separators that are in no brackets and in no environment; one part where brackets do
    not match."""
    parts, depth, start, place = [], 0, 0, 0
    while place < len(text):
        if depth == 0 and (found := separator.match(text, place)) and found.end() > place:
            parts.append(text[start:place])
            start = place = found.end()
            continue
        token = _TOKEN.match(text, place)
        assert token
        if token[0] in _OPENING or token[0].startswith("\\begin"):
            depth += 1
        elif token[0] in _CLOSING or token[0].startswith("\\end"):
            depth -= 1
        if depth < 0:
            return [text.strip()]
        place = token.end()
    if depth:
        return [text.strip()]
    return [part.strip() for part in [*parts, text[start:]]]
