# SPDX-License-Identifier: Apache-2.0
"""Tasks: how a sample becomes a prompt, how responses are read, and how they are rewarded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["score_answer"]


def score_answer(
    answer_format: str,
    answer: str,
    reference: str | list[str],
    *,
    images: Sequence[Any] = (),
    resized_sizes: Sequence[tuple[int, int]] = (),
    extra: Mapping[str, Any] | None = None,
) -> float:
    r"""Return how right an answer is by an answer format, 0 to 1: to try one by hand.

    ``score_answer("math", r"\frac{1}{2}", "0.5")`` is 1.0. A format of a file of your own is known once that file is
    imported.

    Args:
        answer_format: name of the answer format.
        answer: the answer's text, as the response format finds it.
        reference: the reference, in the notation of the answer format; a list of texts accepts each of them.
        images: PIL images of the sample, for formats that need their size.
        resized_sizes: (width, height) in pixels of each image as the model gets it, for boxes in the frame ``resized``.
        extra: further fields of the sample, such as ``box_frame`` or ``options``.

    Raises:
        ValueError: an unknown answer format, and the message names the nearest; or a reference that cannot be read.
    """
    # Late: whoever imports the package for a recipe does not wait for torch.
    from megatron_g2rpo import registry
    from megatron_g2rpo.types import Sample

    function = registry.answer_formats.get(answer_format)
    sample = Sample(
        key="score_answer",
        task="score_answer",
        question="",
        answer=reference if isinstance(reference, str) else json.dumps(reference, ensure_ascii=False),
        answer_format=answer_format,
        images=tuple(images),
        resized_sizes=tuple(resized_sizes),
        extra=dict(extra or {}),
    )
    return float(function(answer, sample))
