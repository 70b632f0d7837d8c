# SPDX-License-Identifier: Apache-2.0
"""Answer formats: functions that say how right an answer is, found by the name that samples and recipes use.

A function gets the text of a model's answer and the sample, and returns a number in [0, 1]. It gets ``""`` for a
response without an answer, which is worth 0 whatever it returns. A model's answer that cannot be read is worth 0. A
reference (``sample.answer``) that cannot be read raises ``ValueError``: the dataset is wrong, and every reward for that
sample would be. The formats of texts, numbers, choices and mathematics take a JSON list of texts as reference, too: any
of them is right.

Add one, in a file that the recipe's ``imports`` names:

    @answer_format("my_format")
    def my_format(answer: str, sample: Sample) -> float: ...

``megatron_g2rpo.tasks.score_answer`` tries one by hand. A module each: ``numbers``, ``choices``, ``mathematics``,
``text``, ``directions``, ``boxes``, ``points``, ``video``, ``segmentation``; ``reading`` has what all readers do first.
"""

from megatron_g2rpo import registry
from megatron_g2rpo.tasks.answers import (
    boxes,
    choices,
    directions,
    mathematics,
    numbers,
    points,
    segmentation,
    text,
    video,
)

register = registry.answer_formats.register

__all__ = [
    "boxes",
    "choices",
    "directions",
    "mathematics",
    "numbers",
    "points",
    "register",
    "segmentation",
    "text",
    "video",
]
