# SPDX-License-Identifier: Apache-2.0
"""Multiple choice: one label, or several, of the options that a question lists.

A label is a letter or a number of up to two digits. It is read alone or in brackets (``B``, ``b.``, ``(B)``, ``[B]``,
``B、``), after ``Option`` or ``The answer is``, and before the option's text (``B. cat``, ``B) cat``, ``B cat``).
Several are read where a text lists them: ``AC``, ``A, C``, ``A and C``; ``A or C`` chooses nothing. Since ``A`` and
``I`` are words of English, too, they are no label before a text that a blank alone (``A cat``) sets off, nor is ``I.``;
abbreviations (``E.g.``) are none, either.
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

from megatron_g2rpo import registry
from megatron_g2rpo.tasks.answers.reading import accepted, fold, readable, reference_of, unwrap
from megatron_g2rpo.tasks.answers.text import normalise

if TYPE_CHECKING:
    from collections.abc import Collection

    from megatron_g2rpo.types import Sample

register = registry.answer_formats.register

_LABEL = r"(?:[^\W\d_]|\d{1,2})"
_OPTION = re.compile(
    r"(?:(?:(?:option|choice|answer)s?\s*(?:is\b|:)?|both\b)\s*|我?选(?:择|项)?\s*:?\s*)(?=[(\[{]?(?:\w|\d\d)(?!\w))",
    re.IGNORECASE,
)
_ALONE = re.compile(rf"[(\[{{<]?\s*({_LABEL})\s*[)\]}}>]?\s*[.,:;、。]?")
_BRACKETED = re.compile(rf"[(\[{{]\s*({_LABEL})\s*[)\]}}][.:,]?\s*(?=\S)")
_DELIMITED = re.compile(rf"({_LABEL})(?:\s*[):、。]|\s*[.,;](?![\d.]|[A-Za-z]\b)|\s+-\s|[ \t]*\n)\s*(?=\S)")
_BOLD = re.compile(r"\*{2,3}|`")
_ABBREVIATION = re.compile(r"[a-z]\.\s?[a-z]\.", re.IGNORECASE)
_BEFORE_TEXT = re.compile(r"([B-HJ-Z]|A(?=\s+(?:is|because)\b))\s+(?=\S)")
_SEVERAL = re.compile(
    rf"[(\[]?({_LABEL})[)\]]?(?:\s*(?:[,;/&+、]|\band\b|,\s*and\b)\s*[(\[]?{_LABEL}[)\]]?)+\.?", re.IGNORECASE
)
_BRACKETED_SEVERAL = re.compile(rf"(?:[(\[]\s*{_LABEL}\s*[)\]]\s*){{2,}}\.?")
_RUN = re.compile(r"[A-J]{2,10}\.?")
_FURTHER = re.compile(rf"(?:[,;\n]|\b(?:and|or)\b)\s*[(\[]?({_LABEL})[.)\]:](?=\s)|\s[(\[]([A-J])[)\]](?=\s)")


@register("multiple_choice")
def multiple_choice(answer: str, sample: Sample) -> float:
    """Return 1 if answer and reference choose the same label or labels, with or without the option's text; else 0.

    An answer without a label is right if it is the text of the right option and of no other: of the reference
    (``C. dogs``), or of the options in the dataset's field ``options``, a list of texts or an object of texts by label.
    A reference that is a JSON list accepts each of its labels; one that demands several says ``AC``.
    """
    return float(any(_is_chosen(answer, reference, sample) for reference in accepted(reference_of(sample))))


@register("multiple choice")
def multiple_choice_by_the_papers_name(answer: str, sample: Sample) -> float:
    """Return what ``multiple_choice`` returns: the same format under the name of the paper's data.

    Source: the type `multiple choice` of OneThinker and OpenVLThinkerV2.
    """
    return multiple_choice(answer, sample)


def _is_chosen(answer: str, reference: str, sample: Sample) -> bool:
    options = _options(sample.extra.get("options"))
    wanted = readable(parse_choice(reference, is_reference=True), "the label of a choice", reference)
    text = normalise(unwrap(answer))
    if text == normalise(unwrap(reference)):
        return True
    got = parse_choice(answer, labels=options.keys())
    if got is not None and (not options or got <= options.keys() | wanted):
        return got == wanted
    if options:
        return frozenset(label for label, option in options.items() if option == text) == wanted
    return bool(text) and text == normalise(_text_after_label(reference) or "")


def _options(listed: object) -> dict[str, str]:
    """Return label -> text, normalised, of options: texts by label, or a list of texts that may begin with labels.

    They are labels if they are ``A``, ``B`` and so on, or 1, 2 ..., in this order: ``E. coli`` begins with none.
    """
    if isinstance(listed, dict) and all(isinstance(option, str) for option in listed.values()):
        return {str(label).upper(): normalise(unwrap(option)) for label, option in listed.items()}
    if not isinstance(listed, list | tuple) or not all(isinstance(option, str) for option in listed):
        return {}
    letters = [chr(ord("A") + index) for index in range(len(listed))]
    numbers = [str(index + 1) for index in range(len(listed))]
    texts = [_text_after_label(option) for option in listed]
    labels = [min(parse_choice(option, is_reference=True) or {""}) for option in listed]
    if None in texts or labels not in (letters, numbers):
        labels, texts = letters, listed
    return {label: normalise(unwrap(text or "")) for label, text in zip(labels, texts, strict=True)}


def _text_after_label(text: str) -> str | None:
    """Return the text after a label that is set off by a bracket or a mark; None if there is none."""
    text = unwrap(text, lead_in=False)
    found = _BRACKETED.match(text) or _DELIMITED.match(text)
    return text[found.end() :].strip() if found else None


def parse_choice(text: str, *, labels: Collection[str] = (), is_reference: bool = False) -> frozenset[str] | None:
    """Return the labels that a text chooses, in upper case; None if it chooses none.

    Args:
        text: the text, of any length.
        labels: labels of the options where they are known; with an option ``I``, ``I. iron`` is one.
        is_reference: whether the text is known to be a choice, so that ``I. iron`` is one, too.
    """
    text = _trimmed(text)
    if not text or _ABBREVIATION.match(text):
        return None
    if found := _ALONE.fullmatch(text[:16]):
        return _as_labels([found[1]]) if len(text) <= 16 else None
    head = text[:200]
    if len(text) <= 200:
        if _RUN.fullmatch(text) and len(set(text.rstrip("."))) == len(text.rstrip(".")):
            return _as_labels(text.rstrip("."))
        if _SEVERAL.fullmatch(text) or _BRACKETED_SEVERAL.fullmatch(text):
            return _as_labels(re.findall(rf"(?<![^\W_]){_LABEL}(?![^\W_])", text))
    if re.match(rf"[(\[]?{_LABEL}[)\]]?\s*(?:or|/)\s*[(\[]?{_LABEL}\b(?!\s+\w)", head, re.IGNORECASE):
        return None
    found = _BRACKETED.match(head) or _DELIMITED.match(head)
    if found is None:
        found = _BEFORE_TEXT.match(head)
    elif found[1] == "I" and not is_reference and text[1:2] in (".", ",", "\n") and "I" not in labels:
        return None
    if found is None:
        return None
    rest = text[found.end() : 2000]
    return _as_labels([found[1], *(each[1] or each[2] for each in _FURTHER.finditer(rest))])


def _trimmed(text: str) -> str:
    text = fold(text)
    if not text.isascii():  # Ⓑ and ⒝; only where a label may stand
        text = "".join(unicodedata.normalize("NFKC", each) for each in text[:4]) + text[4:]
    text = unwrap(text)
    if found := _OPTION.match(text):
        text = unwrap(text[found.end() :])
    return _BOLD.sub("", text[:64]).strip() + text[64:]


def _as_labels(labels: Collection[str]) -> frozenset[str] | None:
    return frozenset(label.upper() for label in labels if label.casefold() != "and")
