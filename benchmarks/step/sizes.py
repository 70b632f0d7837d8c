# SPDX-License-Identifier: Apache-2.0
"""What is measured: the sizes of a step, and which sides take how many steps of each."""

from __future__ import annotations

from dataclasses import dataclass, replace

# Our step with the prompt shared and not, TRL's with one micro-batch and with several, and the floor.
OURS, OURS_UNSHARED, TRL, TRL_MICRO, FLOOR = "ours", "ours-unshared", "trl", "trl-micro", "floor"
SIDES = (OURS, OURS_UNSHARED, TRL, TRL_MICRO, FLOOR)
TRL_FORMS = (TRL, TRL_MICRO)

PATCH, MERGE = 8, 2
# Tokens of the chat template around image and question, see `workload.question`.
FRAME_TOKENS = 10


@dataclass(frozen=True, kw_only=True)
class Size:
    """One step: its prompts, and the answers to each.

    Attributes:
        name: its name in results and on the command line.
        prompts: prompts a step, each with one square image.
        samples: n, answers to each prompt.
        image_tokens: tokens of the image, a square number.
        text_tokens: tokens of the question and the chat template around it, at least ``FRAME_TOKENS`` + 1.
        answer_tokens: tokens of every answer.
    """

    name: str
    prompts: int
    samples: int
    image_tokens: int
    text_tokens: int
    answer_tokens: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a prompt."""
        return self.image_tokens + self.text_tokens

    @property
    def rollouts(self) -> int:
        """Answers of a step."""
        return self.prompts * self.samples

    @property
    def side(self) -> int:
        """Pixels of an image's side."""
        return round(self.image_tokens**0.5) * PATCH * MERGE


SMALL = Size(name="i", prompts=16, samples=8, image_tokens=16, text_tokens=41, answer_tokens=32)
LARGE = Size(name="ii", prompts=4, samples=8, image_tokens=1024, text_tokens=41, answer_tokens=64)

# How cost grows, one number at a time, from four prompts of size (i).
_BASE = replace(SMALL, prompts=4)
BY_SAMPLES = tuple(replace(_BASE, name=f"n={n}", samples=n) for n in (1, 2, 4, 8, 16, 32))
BY_PROMPT = tuple(
    replace(_BASE, name=f"prompt={tokens + 41}", prompts=1, image_tokens=tokens) for tokens in (16, 64, 256, 1024)
)
BY_ANSWER = tuple(replace(_BASE, name=f"answer={tokens}", answer_tokens=tokens) for tokens in (8, 32, 128, 512))
TINY = Size(name="tiny", prompts=2, samples=3, image_tokens=4, text_tokens=14, answer_tokens=5)

BY_NAME = {size.name: size for size in (SMALL, LARGE, *BY_SAMPLES, *BY_PROMPT, *BY_ANSWER, TINY)}


@dataclass(frozen=True, kw_only=True)
class Job:
    """Steps of one size that some sides take in turns.

    Attributes:
        size: the step.
        sides: the sides, in the order of their turns.
        steps: measured steps a side.
        warm_up: steps before them that are recorded, but not counted.
    """

    size: Size
    sides: tuple[str, ...]
    steps: int
    warm_up: int = 1


def jobs(*, quick: bool) -> list[Job]:
    """Return what a run measures, the two sizes first; ``quick`` for a few minutes of it."""
    if quick:
        return [Job(size=SMALL, sides=SIDES, steps=2)]
    # A step of TRL at (ii) takes minutes; what a first step does once is a percent of it.
    counted = [Job(size=SMALL, sides=SIDES, steps=7), Job(size=LARGE, sides=SIDES, steps=5)]
    growing = [
        # TRL takes groups of two or more.
        Job(size=size, sides=(OURS, OURS_UNSHARED, TRL) if size.samples > 1 else (OURS, OURS_UNSHARED), steps=2)
        for size in (*BY_SAMPLES, *BY_PROMPT, *BY_ANSWER)
    ]
    return [*counted, *growing]
