# SPDX-License-Identifier: Apache-2.0
"""Claim: no response, however degenerate, makes an answer format hang or raise.

Processor's time is measured, with a bound far above what it takes (below 0.5 s), because others may use the machine.
"""

import threading
import time

import pytest

from megatron_g2rpo import registry
from megatron_g2rpo.tasks import score_answer
from tests.unit.tasks.common import make_sample
from tests.unit.tasks.test_answers import REFERENCES

LONG = 120_000  # characters; the work is linear in them
REPEATED = ("[", "{", "9", "(", '{"a":', "[1,2,3,4],", "(1,2),", "\\boxed{", "$", "*", "`", '"', "'a'", "x=5 ",
            "A, ", "<answer>", "<box>", "\\text{", "[1, ", "1e999,", "the answer is ", "½", "!", "１", "\u200f",
            "the dog runs ", "e\u0301", "\n", "\\frac{", "-", "5 cm ", "^", "\u0660", " ")  # fmt: skip
ENDLESS = (
    "9^{9^{9^9}}", "9^9^9^9", "2^{1000000000}", "(10^9)!", "99!!", "((3!)!)!", r"\binom{1000000}{500000}",
    r"\sum_{n=1}^{1000000} n", "(x+y+z+w)^{99}", "(x+1)^{50}(y+1)^{50}(z+1)^{50}", "((9^{99})^{99})^{99}",
    r"\exp(\exp(\exp(99)))", "(" * 60 + "1" + ")" * 60, "99^{99 \\cdot 99 \\cdot 99 \\cdot 99}", "9^{(9^{9})}",
    r"\left(99^{99}\right)^{99}", "10**10**10", "9⁹⁹⁹", r"(\sqrt{2}+\sqrt{3}+\sqrt{5}+\sqrt{7})^{20}", r"\int_0^1 x dx",
    r"\sqrt{" * 20 + "2" + "}" * 20, ",".join(f"x_{{{i}}}" for i in range(40)), "(x+1)" * 30,
)  # fmt: skip


def seconds(name: str, answer: str, reference: str) -> float:
    """Processor's time of one score, which must be one between 0 and 1."""
    sample, function = make_sample(answer=reference, answer_format=name), registry.answer_formats.get(name)
    start = time.process_time()
    assert 0.0 <= function(answer, sample) <= 1.0
    return time.process_time() - start


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_a_degenerate_response_is_scored_at_once(name):
    seconds(name, REFERENCES[name], REFERENCES[name])  # libraries are imported
    for piece in REPEATED:
        text = (piece * (LONG // len(piece) + 1))[:LONG]
        for answer in (text, f"<answer>[{text[:90_000]}]</answer>", text[:199]):
            assert seconds(name, answer, REFERENCES[name]) < 5.0, (piece, len(answer))


@pytest.mark.parametrize("answer", ENDLESS)
def test_mathematics_that_would_never_end_is_not_evaluated(answer):
    score_answer("math", r"\pi", r"2\pi")  # SymPy is imported
    for reference in (r"\frac{\sqrt{2}}{3}", "x^2+1", "(1, 2)"):
        assert seconds("math", answer, reference) < 10.0


def test_mathematics_works_outside_of_the_main_thread():
    """Where math-verify's own time limits, which are signals, raise."""
    said = []
    thread = threading.Thread(target=lambda: said.append(score_answer("math", "sqrt(3)/2", r"\frac{\sqrt{3}}{2}")))
    thread.start()
    thread.join()
    assert said == [1.0]
