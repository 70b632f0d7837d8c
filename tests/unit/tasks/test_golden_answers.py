# SPDX-License-Identifier: Apache-2.0
"""What people report that models write, and the paper's sixty samples, with the verdicts that a person gives them.

``golden_answers.jsonl`` has a line a pair: format, answer, reference, score and the reason for it, which was written
down before the code was asked. ``extra`` are further fields of the sample; ``image_size`` among them makes an image.
"""

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_g2rpo import registry
from megatron_g2rpo.tasks import score_answer
from tests.common.builtin import builtin_names

PAIRS = [json.loads(line) for line in (Path(__file__).parent / "golden_answers.jsonl").read_text("utf-8").splitlines()]


def score(pair: dict) -> float:
    extra = dict(pair.get("extra", {}))
    size = extra.pop("image_size", None)
    images = [Image.new("RGB", size)] if size else []
    return score_answer(pair["format"], pair["answer"], pair["reference"], images=images, extra=extra)


@pytest.mark.parametrize("name", sorted({pair["format"] for pair in PAIRS}))
def test_every_golden_pair_gets_the_verdict_of_a_person(name):
    wrong = []
    for number, pair in enumerate(PAIRS, start=1):
        # Sums and exponentials in another order than the verdict's.
        if pair["format"] == name and score(pair) != pytest.approx(pair["score"], abs=1e-9):
            wrong.append(f"line {number}: {pair['answer']!r} against {pair['reference']!r}: {score(pair)}, {pair}")
    assert not wrong, "\n".join(wrong)


def test_the_golden_pairs_are_many_and_know_every_format_and_each_of_the_sixty_samples():
    assert len(PAIRS) >= 300
    assert {pair["format"] for pair in PAIRS} == builtin_names(registry.answer_formats)
    assert sum("the paper's sample" in pair["reason"] and pair["score"] == 1 for pair in PAIRS) >= 60
    assert all(pair["reason"] for pair in PAIRS)


@pytest.mark.parametrize(
    "pair", [pair for pair in PAIRS if "the paper's sample" in pair["reason"]], ids=lambda p: p["answer"][:40]
)
def test_the_paper_s_references_are_worth_one_with_their_tags(pair):
    assert score(pair | {"answer": pair["reference"]}) == 1.0
