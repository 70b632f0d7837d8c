# SPDX-License-Identifier: Apache-2.0
"""One sample looked at whole, for ``data check``: every fault that a run would meet, and what the sample holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_g2rpo import registry
from megatron_g2rpo.data.checks import Check
from megatron_g2rpo.data.errors import SampleError
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.data.shard_index import Entry
from megatron_g2rpo.tasks.answers.reading import accepted
from megatron_g2rpo.types import Prompt, Sample

# A reference that earns less than this against itself is compared by another rule than it was written for.
FULL = 1.0 - 1e-6


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What was seen of one sample.

    Attributes:
        key: name of the sample.
        task: its task.
        answer_format: name of the answer format that scores it; ``""`` where its json cannot be read.
        faults: reason and message of each fault.
        image_digests: sha256 of each image's pixels, hex digits.
        image_sizes: width and height of each image, pixels.
        question_digest: sha256 of question and images, hex digits: equal for samples that ask the same.
        answer: the reference.
        prompt_tokens: number of tokens of the prompt; None where it was not encoded.
    """

    key: str
    task: str
    answer_format: str = ""
    faults: tuple[tuple[str, str], ...] = ()
    image_digests: tuple[str, ...] = ()
    image_sizes: tuple[tuple[int, int], ...] = ()
    question_digest: str = ""
    answer: str = ""
    prompt_tokens: int | None = None


@dataclass
class Inspector:
    """Looks at samples, one by one.

    Attributes:
        read: function that reads a sample of a dataset.
        answer_formats: task -> answer format of all its samples; a task that is missing, or None, leaves it to them.
        processor: encodes prompts; None: their lengths are not looked at.
        checks: what every prompt must hold, see ``data.checks``.
    """

    read: Callable[[Entry], Sample]
    answer_formats: Mapping[str, str | None] = field(default_factory=dict)
    processor: ChatProcessor | None = None
    checks: Sequence[Check] = ()

    def __call__(self, entry: Entry) -> Inspected:
        """Look at one sample; its faults are returned, not raised."""
        faults: list[tuple[str, str]] = []
        try:
            sample = self.read(entry)
            digests = tuple(hashlib.sha256(image.tobytes()).hexdigest() for image in sample.images)
            sizes = tuple(image.size for image in sample.images)
        except SampleError as error:
            return Inspected(key=entry.name, task=entry.task, faults=((error.reason, str(error)),))
        name = self.answer_formats.get(sample.task) or sample.answer_format
        faults += _reference(sample, name)
        prompt = None
        if self.processor is not None:
            prompt, found = self._encoded(self.processor, sample)
            faults += found
        return Inspected(
            key=sample.key,
            task=sample.task,
            answer_format=name,
            faults=tuple(faults),
            image_digests=digests,
            image_sizes=sizes,
            question_digest=hashlib.sha256(json.dumps([sample.question, digests]).encode()).hexdigest(),
            answer=sample.answer,
            prompt_tokens=None if prompt is None else len(prompt.inputs.token_ids),
        )

    def _encoded(self, processor: ChatProcessor, sample: Sample) -> tuple[Prompt | None, list[tuple[str, str]]]:
        try:
            prompt = processor.encode_sample(sample, 0)
        except SampleError as error:
            return None, [(error.reason, str(error))]
        faults = []
        for check in self.checks:
            try:
                check(prompt)
            except SampleError as error:
                faults.append((error.reason, str(error)))
        return prompt, faults


def _reference(sample: Sample, answer_format: str) -> list[tuple[str, str]]:
    """The fault of a reference that its format cannot read, or that earns less than 1 against itself."""
    if answer_format not in registry.answer_formats:
        return [("answer_format", f"sample {sample.key}: {registry.answer_formats.unknown(answer_format)}")]
    place = f"sample {sample.key}: the reference {sample.answer!r}"
    try:
        value = own_score(answer_format, sample)
    except Exception as error:  # noqa: BLE001 (a user's format may raise anything)
        return [("reference", f"{place} cannot be read under {answer_format!r} ({type(error).__name__}: {error})")]
    if not value >= FULL:
        return [("reference", f"{place} earns {value:.3f} against itself under {answer_format!r}; is that its format?")]
    return []


def own_score(answer_format: str, sample: Sample) -> float:
    """Return what a sample's reference earns against itself under an answer format; of several, that of the worst.

    An answer is taken in the frame of the reference: in another one it would have other numbers.

    Raises:
        Exception: whatever the format raises for a reference that it cannot read.
    """
    function = registry.answer_formats.get(answer_format)
    own = replace(sample, extra={name: value for name, value in sample.extra.items() if name != "answer_frame"})
    return min(float(function(text, own)) for text in accepted(sample.answer))
