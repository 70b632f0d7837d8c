# SPDX-License-Identifier: Apache-2.0
r"""Mathematical expressions: equal values, however they are written (``\frac{\sqrt{2}}{3}``, ``sqrt(2)/3``).

Equal texts and numbers are settled without it; the rest is what ``math-verify`` (on SymPy) says. Its time limits are
signals, which only work in a main thread, so that none is set: the expressions that it gets are bounded instead. Those
that are long, or would be evaluated without end (towers of powers, large exponents and factorials, sums, integrals),
are only equal as texts.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from typing import TYPE_CHECKING, Any

from megatron_g2rpo import registry
from megatron_g2rpo.tasks.answers.numbers import is_same, read_number, size_of
from megatron_g2rpo.tasks.answers.reading import best, unwrap, with_carets

if TYPE_CHECKING:
    from megatron_g2rpo.tasks.answers.numbers import Number
    from megatron_g2rpo.types import Sample

register = registry.answer_formats.register

# What is handed to SymPy, so that the worst takes about a second (measured on what has hung it or its parser).
_LONGEST = 200  # characters
_MOST_OPERATIONS = 40
_MOST_COMMAS = 16
_DEEPEST = 8  # brackets in brackets
_MOST_TERMS = 12  # product of the exponents of brackets, which may be expanded
_OPERATION = re.compile(r"[-+*/^=,!|<>]|\\[a-zA-Z]+")
_ENDLESS = re.compile(
    r"\\(?:sum|prod|i{1,3}nt|oint|lim|[dt]?binom|choose|pmod|bmod|uparrow)(?![a-zA-Z])"
    r"|\d{30,}|\d{3,}\s*!|[!)}\]]\s*!|\^[^-+*=,]*!"  # long numbers, large factorials
)
_POWER_OF_BRACKET = re.compile(r"[)\]}]\s*\^\s*\{?\s*[-+]?\s*(\d+)")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_RADICAL = re.compile(r"√\s*(\d+(?:\.\d+)?|[a-zA-Z])")
_RADICAL_IN_BRACKETS = re.compile(r"(?:√|(?<![\\a-zA-Z])sqrt)\s*\(([^()]*)\)")
_POWER_IN_BRACKETS = re.compile(r"\^\s*\(([^()]*)\)")
_TRAILING_UNIT = re.compile(r"(?<=\S)\s+(?:[mck]?m|degrees?|units?)(?:\^?\{?[23]\}?|[²³])?$")
_SYMBOLS = {
    "π": r"\pi ", "∞": r"\infty ", "×": r"\times ", "·": r"\cdot ", "÷": "/", "≤": r"\leq ", "≥": r"\geq ",
    "≠": r"\neq ", "°": r"^{\circ}", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "θ": r"\theta ", "α": r"\alpha ",
    "β": r"\beta ", "**": "^", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "±": r"\pm ",
}  # fmt: skip
_WORD = re.compile(r"(?<![\\a-zA-Z])(pi|infinity|theta|alpha|beta|sin|cos|tan|log|ln)(?![a-zA-Z])")
_UNSEEN = re.compile(r"\\(?:left|right|displaystyle|q?quad)(?![a-zA-Z])|\\[,;:! ]|~")
_BLANKS = re.compile(r"(?<!\w)\s+|\s+(?!\w)")
_ONE_IN_BRACES = re.compile(r"\{\s*(\w|\\[a-zA-Z]+)\s*\}")


@register("math")
def mathematical(answer: str, sample: Sample) -> float:
    r"""Return 1 if answer and reference are the same in mathematics, else 0.

    They are if they are the same text, the same number (``numbers``), or equal by ``math-verify``, which compares
    expressions, equations, intervals, sets, tuples and matrices. ``x = 5`` and ``5`` are the same.

    Source: the type `math` of OneThinker and OpenVLThinkerV2.
    """
    return best(answer, sample, read=_read, compare=_are_equal, kind="an expression")


def _read(text: str) -> str | None:
    text = unwrap(text).rstrip(".。")
    return text if text.strip("$ ") else None


def _are_equal(got: str, wanted: str) -> float:
    if _as_text(got) == _as_text(wanted):
        return 1.0
    mine, yours = read_number(got), read_number(wanted)
    if mine and yours and _are_numbers(mine, yours):
        return float(is_same(mine, yours))
    return float(len(got) <= _LONGEST and len(wanted) <= _LONGEST and _verified(got, wanted))


def _are_numbers(got: Number, wanted: Number) -> bool:
    """Return whether what is written after the numbers is certainly a unit: a single letter may be a variable."""
    if size_of(got.unit) and size_of(wanted.unit):
        return True
    return not any(len(number.unit) == 1 and number.unit.isalpha() for number in (got, wanted))


def _as_text(text: str) -> str:
    """Return a text without what is not seen of LaTeX, for the comparison of texts."""
    text = _UNSEEN.sub("", text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    text = _ONE_IN_BRACES.sub(r"\1", _BLANKS.sub("", text))
    return text.casefold() if len(text) > 1 and text.replace(" ", "").isalpha() else text


@functools.lru_cache(maxsize=8192)
def _verified(got: str, wanted: str) -> bool:
    """Return what math-verify says. Cached, because the answers of a group repeat."""
    target, gold = _parsed(got), _parsed(wanted)
    return bool(target and gold) and _library().verify(gold, target, timeout_seconds=None)


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> Any:
    """Return what math-verify makes of an expression; empty for one that it cannot or must not read."""
    latex = _latex(text)
    if not _is_bounded(latex):
        return []
    return _library().parse(f"${latex}$", parsing_timeout=None, fallback_mode="no_fallback")


def _is_bounded(latex: str) -> bool:
    """Return whether an expression can be read and evaluated in about a second."""
    if len(_OPERATION.findall(latex)) > _MOST_OPERATIONS or latex.count(",") > _MOST_COMMAS or _ENDLESS.search(latex):
        return False
    if math.prod(int(power) for power in _POWER_OF_BRACKET.findall(latex) if power.strip("0")) > _MOST_TERMS:
        return False
    exponents = _exponents(latex)
    return exponents is not None and all(_is_small(exponent) for exponent in exponents)


def _exponents(latex: str) -> list[str] | None:
    """Return the texts of all exponents; None where brackets or powers are nested too deeply, or a power is chained."""
    found: list[str] = []
    unclosed: list[tuple[int, bool]] = []
    after_caret = after_exponent = False
    for place, each in enumerate(latex):
        if each in "([{":
            unclosed.append((place + 1, after_caret or latex.endswith("\\exp", 0, place)))
            if len(unclosed) > _DEEPEST or sum(is_exponent for _, is_exponent in unclosed) > 2:
                return None
            after_caret = after_exponent = False
        elif each in ")]}" and unclosed:
            start, is_exponent = unclosed.pop()
            if is_exponent:
                found.append(latex[start:place])
            after_caret, after_exponent = False, is_exponent
        elif each == "^":
            if after_exponent:
                return None
            after_caret, after_exponent = True, False
        elif not each.isspace():
            if after_caret:
                found.append(each)
            after_caret, after_exponent = False, after_caret
    return found


def _is_small(exponent: str) -> bool:
    """Return whether an exponent leaves a number printable: few digits, and no power of numbers in it."""
    digits = sum(each.isdigit() for each in exponent)
    if any(each.isalpha() for each in _COMMAND.sub("", exponent)):
        return digits <= 6
    return digits <= 3 and (digits <= 2 or "/" in exponent or "frac" in exponent) and "^" not in exponent


def _latex(text: str) -> str:
    """Write an expression in LaTeX that may be in the plain text of a keyboard, or with symbols of Unicode."""
    text = _TRAILING_UNIT.sub("", text.strip("$ "))
    for symbol, command in _SYMBOLS.items():
        text = text.replace(symbol, command)
    text = with_carets(text)
    text = _RADICAL_IN_BRACKETS.sub(r"\\sqrt{\1}", text)
    text = _RADICAL.sub(r"\\sqrt{\1}", text)
    text = _POWER_IN_BRACKETS.sub(r"^{\1}", text)
    text = re.sub(r"\^\s*([-+]?\d{2,})", r"^{\1}", text)
    return _WORD.sub(r"\\\1 ", text.replace("infinity", "infty")).replace("*", r" \cdot ")


@functools.cache
def _library() -> Any:
    import math_verify

    # It warns once that a limit is missing, which is on purpose here.
    for module in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(module).setLevel(logging.ERROR)
    return math_verify
