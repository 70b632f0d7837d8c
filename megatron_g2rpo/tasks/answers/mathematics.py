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
import re
from typing import TYPE_CHECKING, Any

from megatron_g2rpo import registry
from megatron_g2rpo.tasks.answers.numbers import is_same, read_number
from megatron_g2rpo.tasks.answers.reading import best, unwrap

if TYPE_CHECKING:
    from megatron_g2rpo.tasks.answers.numbers import Number
    from megatron_g2rpo.types import Sample

register = registry.answer_formats.register

_LONGEST = 200  # characters that are handed to SymPy
_MOST_OPERATIONS = 40
_OPERATION = re.compile(r"[-+*/^=,!|<>]|\\[a-zA-Z]+")
_ENDLESS = re.compile(
    r"\\(?:sum|prod|i{1,3}nt|oint|lim|binom|dbinom|tbinom|choose|pmod|bmod|uparrow)\b"
    r"|\^\s*\{?\s*[-+]?\s*\d{3,}"  # a large exponent
    r"|\d{2,}\s*[)}\]]*\s*!|!\s*[)}\]]*\s*!|\^[^+*=,]*!|[)}\]]\s*!"  # a large factorial
    r"|\d{30,}"
    r"|\^[^a-zA-Z=,]{0,60}\^"  # a tower of numbers
    r"|\d\s*\}?\s*\^[^=,]*\^"
)
_RADICAL = re.compile(r"√\s*(\d+(?:\.\d+)?|[a-zA-Z])")
_RADICAL_IN_BRACKETS = re.compile(r"(?:√|(?<![\\a-zA-Z])sqrt)\s*\(([^()]*)\)")
_POWER_IN_BRACKETS = re.compile(r"\^\s*\(([^()]*)\)")
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
_PLAIN_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_TRAILING_UNIT = re.compile(r"(?<=\S)\s+(?:[mck]?m|degrees?|units?)(?:\^?\{?[23]\}?|[²³])?$")
_SYMBOLS = {
    **{"π": r"\pi ", "∞": r"\infty ", "×": r"\times ", "·": r"\cdot ", "÷": "/", "≤": r"\leq ", "≥": r"\geq "},
    **{"≠": r"\neq ", "°": r"^{\circ}", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "θ": r"\theta ", "α": r"\alpha "},
    **{"β": r"\beta ", "**": "^", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "±": r"\pm "},
}
_WORD = re.compile(r"(?<![\\a-zA-Z])(pi|infinity|theta|alpha|beta|sin|cos|tan|log|ln)(?![a-zA-Z])")
_SAID_OF_TEXT = re.compile(r"\\(?:left|right|displaystyle|[,;:!]|q?quad)(?![a-zA-Z])|\\ |~|[\s{}]")


@register("math")
def mathematical(answer: str, sample: Sample) -> float:
    r"""Return 1 if answer and reference are the same in mathematics, else 0.

    They are if they are the same text, the same number (``numbers``), or equal by ``math-verify``, which compares
    expressions, equations, intervals, sets, tuples and matrices. ``x = 5`` and ``5`` are the same.

    Source: the type `math` of OneThinker and OpenVLThinkerV2.
    """
    return best(answer, sample, read=_read, compare=_are_equal, kind="an expression")


def _read(text: str) -> str | None:
    return unwrap(text).rstrip(".。") or None


def _are_equal(got: str, wanted: str) -> float:
    if _as_text(got) == _as_text(wanted):
        return 1.0
    mine, yours = read_number(got), read_number(wanted)
    if mine and yours and _is_plain(mine) and _is_plain(yours):
        return float(is_same(mine, yours))
    return float(_verified(got, wanted))


def _is_plain(number: Number) -> bool:
    """Return whether what is written after a number is certainly its unit, and no variable."""
    return len(number.unit) != 1 or not number.unit.isalpha()


def _as_text(text: str) -> str:
    """Return a text without what is not seen of LaTeX, for the comparison of texts."""
    return _SAID_OF_TEXT.sub("", text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")).casefold()


@functools.lru_cache(maxsize=8192)
def _verified(got: str, wanted: str) -> bool:
    """Return what math-verify says. Cached, because the answers of a group repeat."""
    target, gold = _parsed(got), _parsed(wanted)
    return bool(target and gold) and _library().verify(gold, target, timeout_seconds=None)


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> Any:
    """Return what math-verify makes of an expression; empty for one that it cannot or must not read."""
    if len(text) > _LONGEST:
        return []
    latex = _latex(text)
    if len(_OPERATION.findall(latex)) > _MOST_OPERATIONS or _ENDLESS.search(latex):
        return []
    return _library().parse(f"${latex}$", parsing_timeout=None, fallback_mode="no_fallback")


def _latex(text: str) -> str:
    """Write an expression in LaTeX that may be in the plain text of a keyboard, or with symbols of Unicode."""
    text = _TRAILING_UNIT.sub("", text.strip("$ "))
    for symbol, command in _SYMBOLS.items():
        text = text.replace(symbol, command)
    text = _SUPERSCRIPTS.sub(lambda found: "^{" + found[0].translate(_PLAIN_SUPERSCRIPTS) + "}", text)
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
