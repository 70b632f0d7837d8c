# SPDX-License-Identifier: Apache-2.0
"""Texts: equal ones, transcriptions by their errors, and descriptions by the words that they share.

The formats fold Unicode (``reading.fold``) on both sides. A reference may be a JSON list of texts: each is right.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

from megatron_g2rpo import registry
from megatron_g2rpo.tasks.answers.reading import best, untag, unwrap

if TYPE_CHECKING:
    from megatron_g2rpo.types import Sample

register = registry.answer_formats.register

_FINAL = re.compile(r"[\s.。｡,;:!]+$")
_QUOTED = re.compile(r"([\"'`])((?:(?!\1).)+)\1", re.DOTALL)
_MOST_WORDS = 20_000  # of an answer: ROUGE of more than an hour's reading is 0


def normalise(text: str) -> str:
    """Return a folded text without differences of case and blanks, quotes around it, and marks at its end.

    A mark that is the whole text stays, and so does ``!`` after a digit, where it is a factorial.
    """
    text = " ".join(text.casefold().split())
    if quoted := _QUOTED.fullmatch(_without_final_marks(text)):
        text = quoted[2].strip()
    return _without_final_marks(text)


def _without_final_marks(text: str) -> str:
    found = _FINAL.search(text[-8:])  # the last few: a regular expression would look at every run of marks
    if found is None:
        return text
    marks = len(text[-8:]) - found.start()
    kept = text[:-marks]
    return text if not kept or ("!" in found[0] and kept[-1].isdigit()) else kept


def _read_exact(text: str) -> str | None:
    return normalise(unwrap(text)) or None


@register("exact")
def exact(answer: str, sample: Sample) -> float:
    """Return 1 if answer and reference are the same text; else 0.

    Apart from case, blanks, final marks, quotes around it, spellings of Unicode (composed or not, full width, curly
    quotes), and what an answer is wrapped in (bold, a box, ``The answer is``). An article counts: list ``["dog", "a
    dog"]`` as reference where both are right.
    """
    return best(answer, sample, read=_read_exact, compare=lambda got, wanted: float(got == wanted), kind="a text")


def _read_transcription(text: str) -> str | None:
    return untag(text) or None


@register("edit_distance")
def edit_distance(answer: str, sample: Sample) -> float:
    """Return 1 minus the Levenshtein distance divided by the length of the longer text, in characters."""
    return best(answer, sample, read=_read_transcription, compare=_edit_similarity, kind="a text")


def _edit_similarity(got: str, wanted: str) -> float:
    from rapidfuzz.distance import Levenshtein

    return 1.0 - Levenshtein.distance(got, wanted) / max(len(got), len(wanted))


@register("OCR")
def ocr(answer: str, sample: Sample) -> float:
    """Return 1 minus the word error rate, at least 0: the least edits of words by the words of the reference.

    Case and marks count; blanks and line breaks only separate words. For scripts that do not separate words,
    ``edit_distance`` tells more.

    Source: the type `OCR` of OneThinker and OpenVLThinkerV2, whose public code removes blanks around ``/``, ``<`` and
    ``>`` from answers, and not from references.
    """
    return best(answer, sample, read=_read_transcription, compare=_word_accuracy, kind="a text")


def _word_accuracy(got: str, wanted: str) -> float:
    import jiwer

    words, reference = got.split(), wanted.split()
    if len(words) >= 2 * len(reference):
        return 0.0  # as many words too many as the reference has, at least
    return max(0.0, 1.0 - jiwer.wer(" ".join(reference), " ".join(words)))


@register("open-ended")
def open_ended(answer: str, sample: Sample) -> float:
    """Return the mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L, of stemmed words without case and marks.

    A reference of one word has no pair of words: the mean is that of ROUGE-1 and ROUGE-L then.

    Source: Lin, ROUGE, 2004; the type `open-ended` of OneThinker and OpenVLThinkerV2, whose public code fails to import
    ROUGE and gives 0 to every answer.
    """
    return best(answer, sample, read=_read_words, compare=_rouge, kind="a text with words")


_WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff]|[^\\W_\u3040-\u30ff\u3400-\u9fff]+")


def _read_words(text: str) -> tuple[str, ...] | None:
    """Return the words of a text, in lower case; characters of Chinese and Japanese count as words."""
    return tuple(_WORD.findall(unwrap(text).casefold())) or None


def _rouge(got: tuple[str, ...], wanted: tuple[str, ...]) -> float:
    from rapidfuzz.distance import LCSseq

    if len(got) > _MOST_WORDS:
        return 0.0
    scorer, stem = _rouge_scorer()
    got, wanted = tuple(map(stem, got)), tuple(map(stem, wanted))
    scores = scorer.score(wanted, got)
    values = [scores["rouge1"].fmeasure]
    if len(wanted) > 1:
        values.append(scores["rouge2"].fmeasure)
    # The package's own ROUGE-L fills a table in Python, which takes seconds for long texts.
    values.append(2 * LCSseq.similarity(got, wanted) / (len(got) + len(wanted)))
    return sum(values) / len(values)


@functools.cache
def _rouge_scorer() -> tuple[Any, Any]:
    """Return a scorer of lists of words, and a function that stems a word."""
    from nltk.stem.porter import PorterStemmer
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import Tokenizer

    class Words(Tokenizer):
        """Takes what is a list of words already."""

        def tokenize(self, text: Any) -> list[str]:
            return list(text)

    stemmed = functools.lru_cache(maxsize=65_536)(PorterStemmer().stem)

    def stem(word: str) -> str:
        # Short words are left, as in rouge_score's own tokenizer; a "word" of a thousand letters is none.
        return stemmed(word) if 3 < len(word) < 40 else word

    return RougeScorer(["rouge1", "rouge2"], tokenizer=Words()), stem
