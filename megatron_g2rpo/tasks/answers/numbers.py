# SPDX-License-Identifier: Apache-2.0
r"""Numbers: how they are read, and the answer formats that compare them.

Read are signs (the Unicode minus, too), decimals, exponents (``1e3``, ``1.5 x 10^3``, ``10^{3}``), fractions (``3/4``,
``\frac{3}{4}``, ``½``) and mixed ones (``1 1/2``), digits of any script, thousands by comma, blank, apostrophe or full
stop (``1,234``, ``1 234``, ``1'234``, ``1.234.567``) and by the Indian grouping (``1,00,000``), ``million`` and ``5k``,
currencies, units, ``x = 5``, and the number words up to twenty. Not read, because they may mean two things: ``1,23``,
ranges, two numbers, more than one equals sign, and single letters that may be variables (``5x``).

Percent. Where both texts have a percent sign, or neither, their numbers are compared. Where only one has it, the number
beside the sign is taken for itself and for its hundredth, and the better counts: ``50 %`` is right for a reference of
``0.5`` and for one of ``50``, because datasets write both.

Units. Where both texts have one, lengths, masses and times are converted (``5 cm`` is ``50 mm``, and not ``5 m``);
other units, and a unit that only one of them has, are ignored.
"""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_g2rpo import registry
from megatron_g2rpo.tasks.answers.reading import best, unwrap, with_carets

if TYPE_CHECKING:
    from megatron_g2rpo.types import Sample

register = registry.answer_formats.register

_LONGEST = 200  # characters: beyond it a text is no number, and nobody has to look at it

_DIGITS = (
    r"(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d{1,3}(?:[ ']\d{3})+|\d+)(?:\.\d*)?|\.\d+"  # 1,234 1,00,000 1 234
)
_DECIMAL = rf"(?:\d{{1,3}}(?:\.\d{{3}}){{2,}}(?![.\d])|(?:{_DIGITS})(?:[eE][-+]?\d{{1,4}})?)"
_SIGN = r"[-+]?\s*"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})(?:"
    r"(?P<whole>\d{1,15})\s+(?P<part>\d{1,15})\s*/\s*(?P<of>\d{1,15})(?!\d)"
    rf"|(?P<over>{_DECIMAL})\s*/\s*(?P<under>{_SIGN}{_DECIMAL})"
    rf"|(?:(?P<factor>{_DECIMAL})\s*[×x*·]\s*)?10\s*(?:\^|\*\*)\s*[{{(]?(?P<power>[-+]?\d{{1,4}})[)}}]?"
    rf"|(?P<decimal>{_DECIMAL})"
    r")(?P<rest>.*)",
    re.DOTALL,
)
_WORDS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
]
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(_WORDS)}
_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_GLUED_SCALES = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9}
_PERCENT = {"%", "percent", "per cent", "pct"}
_CURRENCY = "$€£¥₹₩"
_VULGAR = re.compile("[¼-¾⅐-⅞]")

_LETTER = "[^\\W\\d_\u0370-\u03bb\u03bd-\u03ff]"  # of any script but Greek, in which constants are written: pi, not µ
_UNIT_WORD = re.compile(
    rf"(?:{_LETTER}|[µμΩ])+\.?(?:\^?\{{?-?[1-9]\}}?)?(?:[/·*-](?:{_LETTER}|[µμΩ])+(?:\^?\{{?-?[1-9]\}}?)?)*"
    rf"|°[CFK]?|['\"%]|[{_CURRENCY}](?:/{_LETTER}+)?|/{_LETTER}+"
)
_VARIABLES = frozenset("abcdefijknopqruvwxyzBDEGHIMOPQRSUXYZ")  # what is left is a unit: m, g, s, h, l, t, A, C, ...
_NO_UNIT = frozenset(
    [
        *("or", "and", "to", "by", "plus", "minus", "times", "over", "out", "of", "mod", "if", "when", "not", "is"),
        *("pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "inf", "infinity", "nan"),
        *("half", "halves", "third", "thirds", "quarter", "quarters", "fourth", "fourths", "fifth", "fifths"),
        *("tenth", "tenths", "hundredth", "hundredths", "dozen", "dozens", *_WORDS),
    ]
)
_LENGTHS = {"nm": 1e-9, "um": 1e-6, "mm": 1e-3, "cm": 1e-2, "dm": 0.1, "m": 1.0, "km": 1e3, "in": 0.0254,
            "ft": 0.3048, "yd": 0.9144, "mi": 1609.344}  # fmt: skip
_MASSES = {"mg": 1e-6, "g": 1e-3, "kg": 1.0, "oz": 0.028349523125, "lb": 0.45359237}
_TIMES = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_KNOWN = {unit: (name, size) for name, table in (("length", _LENGTHS), ("mass", _MASSES), ("time", _TIMES))
          for unit, size in table.items()}  # fmt: skip
_PREFIXES = {"": "", "kilo": "k", "centi": "c", "milli": "m", "deci": "d", "nano": "n"}
_SPELLINGS = {
    "µm": "um", "μm": "um", "inch": "in", "inches": "in", "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi",
    "lbs": "lb", "pound": "lb", "ounce": "oz", "gram": "g", "kilogram": "kg", "milligram": "mg", "kilo": "kg",
    "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h", "millisecond": "ms",
} | {f"{prefix}met{end}": f"{short}m" for prefix, short in _PREFIXES.items() for end in ("er", "re")}  # fmt: skip


@dataclass(frozen=True)
class Number:
    """A number as it was written.

    Attributes:
        value: the number itself, without regard to a percent sign.
        percent: whether a percent sign or ``percent`` follows it.
        unit: the unit that follows it, as written; ``""`` for none.
        decimals: digits after the decimal point, 0 for other notations.
    """

    value: float
    percent: bool = False
    unit: str = ""
    decimals: int = 0


def parse_number(text: str) -> float | None:
    r"""Return the number that a text is, without its unit or percent sign; None if it is none.

    ``-3``, ``0.5``, ``1,234``, ``3/4``, ``\frac{3}{4}``, ``1e3``, ``$5``, ``5 cm``, ``x = 5``; the module says all.
    """
    number = read_number(text)
    return None if number is None else number.value


def read_number(text: str) -> Number | None:
    """Return the number that a text is, with what is written beside it; None if it is none."""
    text = unwrap(text)
    return _read(text) if 0 < len(text) <= _LONGEST else None


@functools.lru_cache(maxsize=4096)
def _read(text: str) -> Number | None:
    """Read a number of an unwrapped text. Cached, because the answers of a group repeat."""
    text = _plain(text)
    first, blank, others = text.partition(" ")
    text = _NUMBER_WORDS.get(first.casefold(), first) + blank + others
    found = _NUMBER.fullmatch(text)
    if found is None:
        return None
    value = _value(found)
    beside = _beside(found["rest"])
    if value is None or beside is None:
        return None
    scale, percent, unit = beside
    value = value * scale if scale != 1.0 else value
    if not math.isfinite(value):
        return None
    decimal = found["decimal"] or ""
    point = decimal.rfind(".") if decimal.count(".") == 1 else -1
    decimals = len(decimal) - point - 1 if point >= 0 and "e" not in decimal.casefold() else 0
    return Number(value=value, percent=percent, unit=unit, decimals=decimals)


def _plain(text: str) -> str:
    """Write a number without LaTeX, symbols of Unicode, and what introduces it."""
    text = _VULGAR.sub(lambda found: " " + unicodedata.normalize("NFKC", found[0]).replace("\u2044", "/"), text)
    text = with_carets(text)
    text = "".join(str(unicodedata.decimal(each, each)) for each in text)
    if "\\" in text or "{" in text:
        text = plain_latex(text)
    text = text.strip().rstrip(".,;:").strip()
    if len(text) > 2 and text[0] in "\"'" and text[-1] == text[0]:
        text = text[1:-1].strip()
    if text.startswith("(") and text.endswith(")") and "(" not in text[1:]:
        text = text[1:-1].strip()
    left, equals, right = re.sub("[≈≃≅]", "=", text).rpartition("=")
    if equals and "=" not in left and re.search(r"\d", right):
        text = right.strip()
    text = re.sub(r"^(?:~|about\b|around\b|approximately\b|approx\.?|roughly\b)\s*", "", text, flags=re.IGNORECASE)
    text = re.sub(r"^(?:minus|negative)\s+", "-", text, flags=re.IGNORECASE)
    return re.sub(rf"^([-+]?)\s*(?:(?:US|USD|EUR|Rs\.?)\s*)?[{_CURRENCY}]?\s*(?=[-+.\d])", r"\1", text)


_LATEX = (
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\frac\s*\{\s*(-?[\d.]+)\s*\}\s*\{\s*(-?[\d.]+)\s*\}"), r" \1/\2"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r" \1/\2"),
    (re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox|operatorname)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\^\s*\{?\s*(?:\\circ|\\degree)\s*\}?|\\degrees?\b"), "°"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:left|right|displaystyle|textstyle|!)(?![A-Za-z])"), ""),
    (re.compile(r"\\[,;: ]|\\q?quad|~"), " "),
    (re.compile(r"\\times(?![A-Za-z])"), "×"),
    (re.compile(r"\\cdot(?![A-Za-z])"), "·"),
    (re.compile(r"\\approx(?![A-Za-z])"), "≈"),
    (re.compile(r"\\([%$&#_])"), r"\1"),
)


def plain_latex(text: str) -> str:
    """Write what LaTeX says of numbers and their units in plain text: fractions of numbers, blanks, signs, texts."""
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text.strip()


def _value(found: re.Match[str]) -> float | None:
    sign = -1.0 if found["sign"].startswith("-") else 1.0
    if found["whole"] is not None:
        under = int(found["of"])
        return sign * (int(found["whole"]) + int(found["part"]) / under) if under else None
    if found["over"] is not None:
        under = _decimal(found["under"])
        return sign * _decimal(found["over"]) / under if under else None
    if found["power"] is not None:
        factor = _decimal(found["factor"]) if found["factor"] is not None else 1.0
        return sign * _times_power(factor, int(found["power"]))
    return sign * _decimal(found["decimal"])


def _decimal(text: str) -> float:
    text = text.replace(",", "").replace("'", "").replace(" ", "")
    return float(text.replace(".", "") if text.count(".") > 1 else text)


def _times_power(factor: float, power: int) -> float:
    # As text, so that 1.5 x 10^3 is the float of 1.5e3.
    return float(f"{factor!r}e{power}") if "e" not in repr(factor) and math.isfinite(factor) else math.inf


def _beside(rest: str) -> tuple[float, bool, str] | None:
    """Return scale, whether in percent, and unit of what follows a number; None where that is neither."""
    if rest.rstrip() in _GLUED_SCALES:
        return _GLUED_SCALES[rest.rstrip()], False, ""
    rest = rest.strip()
    if not rest:
        return 1.0, False, ""
    if rest.casefold() in _PERCENT:
        return 1.0, True, ""
    words = rest.split()
    scale = 1.0
    while words and words[0].casefold() in _SCALES:
        scale *= _SCALES[words.pop(0).casefold()]
    if len(words) > 4 or any(word.casefold() in _NO_UNIT or not _UNIT_WORD.fullmatch(word) for word in words):
        return None
    unit = " ".join(words)
    if len(unit) == 1 and unit in _VARIABLES:
        return None
    return scale, False, unit


def size_of(unit: str) -> tuple[str, float] | None:
    """Return what a unit measures (``length``, ``mass``, ``time``) and its size in SI units; None for other units."""
    unit = unit.rstrip(".")
    for spelling in (unit, unit.casefold(), unit.casefold().removesuffix("s")):
        spelling = _SPELLINGS.get(spelling, spelling)
        if spelling in _KNOWN:
            return _KNOWN[spelling]
    return None


def readings(got: Number, wanted: Number) -> Iterator[tuple[float, float]]:
    """Yield the pairs of numbers that an answer and a reference can mean, in the unit of the reference.

    More than one where only one of them has a percent sign; none where their units measure different things.
    """
    answer = got.value
    if got.unit != wanted.unit:
        mine, yours = size_of(got.unit), size_of(wanted.unit)
        if mine and yours:
            if mine[0] != yours[0]:
                return
            answer = answer if mine == yours else answer * mine[1] / yours[1]
    yield answer, wanted.value
    if got.percent and not wanted.percent:
        yield answer / 100, wanted.value
    if wanted.percent and not got.percent:
        yield answer, wanted.value / 100


def is_same(got: Number, wanted: Number) -> bool:
    """Return whether two numbers are the same in one of their readings, to a relative 1e-6."""
    return any(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in readings(got, wanted))


def _judged(answer: str, sample: Sample, compare: Callable[[float, Number], float]) -> float:
    """Return the best of all readings by a function of the answer's value and of the reference with its value."""

    def of_readings(got: Number, wanted: Number) -> float:
        values = [
            compare(a, Number(value=b, decimals=wanted.decimals, unit=wanted.unit)) for a, b in readings(got, wanted)
        ]
        return max(values, default=0.0)

    return best(answer, sample, read=read_number, compare=of_readings, kind="a number")


@register("numeric")
def numeric(answer: str, sample: Sample) -> float:
    """Return 1 if answer and reference are the same number, to a relative 1e-6 (rounding in print); else 0."""
    return best(
        answer, sample, read=read_number, compare=lambda got, wanted: float(is_same(got, wanted)), kind="a number"
    )


@register("relative")
def relative(answer: str, sample: Sample) -> float:
    """Return ``max(0, 1 - |answer - reference| / |reference|)``; for a reference of 0, 1 if the answer is 0, else 0."""
    return _judged(answer, sample, lambda got, wanted: _relative(got, wanted.value))


def _relative(got: float, wanted: float) -> float:
    if wanted == 0.0:
        return float(got == 0.0)
    return max(0.0, 1.0 - abs(got - wanted) / abs(wanted))


@register("numerical")
def numerical(answer: str, sample: Sample) -> float:
    """Return 1 if answer and reference are the same number when both are rounded to two decimals; else 0.

    A reference below 0.005 in size, which would be rounded to 0, is compared as by ``numeric``.

    Source: the type `numerical` of OneThinker (arXiv 2512.03043) and of OpenVLThinkerV2, whose public code takes any
    small number for a small reference.
    """
    return _judged(answer, sample, lambda got, wanted: float(_rounds_alike(got, wanted.value)))


def _rounds_alike(got: float, wanted: float) -> bool:
    if math.isclose(got, wanted, rel_tol=1e-6, abs_tol=1e-9):
        return True
    return (round(wanted, 2) != 0.0 or wanted == 0.0) and round(got, 2) == round(wanted, 2)


@register("regression")
def regression(answer: str, sample: Sample) -> float:
    """Return the mean relative accuracy: the share of ten thresholds, 0.50 to 0.95, that an answer meets.

    An answer meets the threshold t if its relative error is below 1 - t. The relative error to a reference of 0 is
    undefined: an answer to it is worth 1 if it is rounded to 0 at the decimals that the reference is written with
    (``0.0``: anything below 0.05 in size), else 0.

    Source: Yang et al., Thinking in Space, arXiv 2412.14171, equation 1; the type `regression` of OneThinker and
    OpenVLThinkerV2, whose public code accepts nothing but an exact 0 for a reference of 0.
    """
    return _judged(answer, sample, _mean_relative_accuracy)


def _mean_relative_accuracy(got: float, wanted: Number) -> float:
    if wanted.value == 0.0:
        return float(round(got, wanted.decimals) == 0.0)
    error = abs(got - wanted.value) / abs(wanted.value)
    return sum(error * 20 < step for step in range(1, 11)) / 10
