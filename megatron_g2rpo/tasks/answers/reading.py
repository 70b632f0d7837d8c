# SPDX-License-Identifier: Apache-2.0
r"""What all answer formats do first: Unicode is folded, wrappings are taken off, and the references are listed.

A model is asked for an answer and nothing else, and writes ``**B**``, ``$5$`` or ``\boxed{\text{blue}}``. References of
public datasets are wrapped likewise, ``<answer>$$\pi $$</answer>``, so that both go through the same readers.

A reader is a function of a text that returns None for what it cannot read. In a model's answer that is a wrong answer,
worth 0; in a reference it is an error of the dataset.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from megatron_g2rpo.tasks.boxed import find_boxed

if TYPE_CHECKING:
    from megatron_g2rpo.types import Sample

T = TypeVar("T")

_LAYERS = 8  # wrappings in wrappings that are taken off; nobody writes more
_NO_TEXT = [0x00AD, 0x061C, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2060, *range(0x2066, 0x206A), 0xFEFF]
_BLANKS = [0x00A0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000]
_FOLDED: dict[int, str | None] = {
    **dict.fromkeys(_NO_TEXT),  # direction marks, zero-width blanks, soft hyphens
    **dict.fromkeys(_BLANKS, " "),
    **dict.fromkeys([0x2018, 0x2019, 0x201A, 0x201B, 0x2032], "'"),
    **dict.fromkeys([0x201C, 0x201D, 0x201E, 0x201F, 0x2033], '"'),
    **dict.fromkeys([0x2010, 0x2011, 0x2012, 0x2013, 0x2014, 0x2212, 0xFE63], "-"),
    **dict.fromkeys([0xFE59], "("),
    **dict.fromkeys([0xFE5A], ")"),
    0x2103: "°C",
    0x2109: "°F",
}
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
_UNRAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_WIDE = re.compile("[\uff00-\uffef]+")
_PAIRS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("__", "__"), ("*", "*"), ("`", "`"))
_STYLES = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf)|mbox|boldsymbol|operatorname)\s*\{")
_LEAD_IN = re.compile(
    r"\*{0,2}(?:(?:so|thus|therefore|hence)\b[,:]?\s*)?(?:(?:the|my)\s+)?(?:(?:final|correct|right|best)\s+)*"
    r"(?:answer|result|value|option|choice)\s*(?:\*{2}\s*)?(?:is\b|would be\b|:|=)\s*(?:\*{2}(?=\s))?:?\s*"
    r"|#{1,6} *(?:final +)?answer *:? *\n\s*"
    r"|答案\s*(?:是|为|:)?\s*",
    re.IGNORECASE,
)


def fold(text: str) -> str:
    """Return a text in Unicode's composed form (NFC), with one spelling of what looks alike.

    Full-width letters and digits become plain ones and half-width kana full ones; curly quotes, dashes, the minus sign
    and odd blanks become those of a keyboard; direction marks, zero-width blanks and soft hyphens go.
    """
    if text.isascii():
        return text
    text = _WIDE.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    return unicodedata.normalize("NFC", text.translate(_FOLDED))


def with_carets(text: str) -> str:
    """Write the superscripts of Unicode as powers: ``x²`` becomes ``x^{2}``."""
    return _SUPERSCRIPTS.sub(lambda found: "^{" + found[0].translate(_UNRAISED) + "}", text)


def unwrap(text: str, *, lead_in: bool = True) -> str:
    r"""Fold a text and take off what an answer is wrapped in.

    That is: ``<answer>`` tags, code fences, the last ``\boxed{}`` or ``\fbox{}``, the marks of mathematics (``$``,
    ``$$``, ``\(``, ``\[``), bold and code, ``\text{}`` and the like, and ``The answer is``.

    Args:
        text: the text, of any length: the work is linear in it.
        lead_in: whether ``The answer is`` and its like are taken off.
    """
    text = fold(text).strip()
    for _ in range(_LAYERS):
        inner = _without_a_layer(text, lead_in)
        if inner == text:
            break
        text = inner
    return text


def untag(text: str) -> str:
    """Fold a text and take off ``<answer>`` tags and a code fence, nothing else: what a transcription is read with."""
    return _without_fence(_without_tags(fold(text).strip())).strip()


def _without_a_layer(text: str, lead_in: bool) -> str:
    text = _without_fence(_without_tags(text)).strip()
    if "\\boxed{" in text or "\\fbox{" in text:
        boxed = find_boxed(text.replace("\\fbox{", "\\boxed{"))
        if boxed is not None:
            return boxed
    stop = len(text) - 1 if text.endswith((".", ",", ";")) else len(text)
    for opening, closing in _PAIRS:
        inner = text[len(opening) : stop - len(closing)].strip()
        is_pair = text.startswith(opening) and text.endswith(closing, 0, stop) and bool(inner)
        if is_pair and opening[-1] not in inner.replace("\\$", ""):
            return inner
    if (style := _STYLES.match(text)) and text.endswith("}") and "}" not in text[style.end() : -1]:
        return text[style.end() : -1].strip()
    if lead_in and (found := _LEAD_IN.match(text)) and found.end() < len(text):
        return text[found.end() :]
    return text


def _without_tags(text: str) -> str:
    if text.startswith("<answer>") and text.endswith("</answer>"):
        return text[len("<answer>") : -len("</answer>")].strip()
    return text


def _without_fence(text: str) -> str:
    if not text.startswith("```") or not text.endswith("```") or len(text) <= 6:
        return text
    language, line_break, inner = text[3:-3].partition("\n")
    named = bool(line_break) and language.strip().isalnum()
    return inner if named or not language.strip() else text[3:-3]


def reference_of(sample: Sample) -> str:
    """Return the reference of a sample.

    Raises:
        ValueError: it is not a text.
    """
    if not isinstance(sample.answer, str):
        raise ValueError(f'the reference answer {sample.answer!r} is not a text; write it as one, "{sample.answer}"')
    return sample.answer


@functools.lru_cache(maxsize=4096)
def accepted(reference: str) -> tuple[str, ...]:
    """Return the references that a sample accepts: the texts of a JSON list of texts, or the one text that it is.

    Raises:
        ValueError: the list is empty.
    """
    text = _without_tags(reference.strip())
    if text.startswith("["):
        try:
            listed = json.loads(text)
        except (ValueError, RecursionError):  # no JSON: a box, an interval, a text in brackets
            return (reference,)
        if not listed:
            raise ValueError(f"the reference answer {reference!r} is a list without an accepted answer")
        if all(isinstance(each, str) for each in listed):
            return tuple(listed)
    return (reference,)


def readable(parsed: T | None, kind: str, reference: str) -> T:
    """Return what was read of a reference.

    Raises:
        ValueError: nothing was; the message shows the reference and says what it is not.
    """
    if parsed is None:
        shown = reference if len(reference) <= 200 else f"{reference[:200]}..."
        raise ValueError(f"the reference answer {shown!r} is not {kind}")
    return parsed


def best(
    answer: str, sample: Sample, *, read: Callable[[str], T | None], compare: Callable[[T, T], float], kind: str
) -> float:
    """Return how right an answer is by the accepted reference that suits it best.

    Args:
        answer: the answer's text.
        sample: the sample, whose reference may be a JSON list of accepted ones.
        read: reads answer and references alike.
        compare: what was read of answer and of a reference, in this order -> 0 to 1.
        kind: what a reference must be, for the message: ``"a number"``.

    Raises:
        ValueError: a reference that cannot be read, also where the answer is unreadable.
    """
    wanted = [readable(read(reference), kind, reference) for reference in accepted(reference_of(sample))]
    got = read(answer)
    return 0.0 if got is None else max(compare(got, each) for each in wanted)
