# SPDX-License-Identifier: Apache-2.0
"""The quickstart's own reward part: whether the thinking states the operands that the question is about.

The recipe names this file under ``imports`` and weighs the part under ``env.reward_weights``.
"""

from __future__ import annotations

import re

from megatron_g2rpo.extend import reward_part
from megatron_g2rpo.types import Response, Sample

Step = tuple[float, str, float]

_OPERATORS = str.maketrans("×x÷−", "**/-")
_STEP = re.compile(r"(\d+(?:\.\d+)?)\s*([-+*/×x÷−])\s*(-?\d+(?:\.\d+)?)")


@reward_part("operands")
def operands(sample: Sample, response: Response) -> float:
    """How much of the reference's working the thinking states: the share of right operands and operators.

    The working is the field ``reference_steps`` of the dataset, ``7 + 5``; 0 for a sample without one. The k-th step
    stated is held against the k-th reference step, so that a list of guesses earns nothing.

    Raises:
        ValueError: the reference states no step.
    """
    reference = sample.extra.get("reference_steps")
    if reference is None:
        return 0.0
    wanted = _steps(reference)
    if not wanted:
        raise ValueError(f"the reference steps {reference!r} state no step such as '7 + 5'")
    stated = _steps(response.thinking or "")
    right = sum(a == b for got, step in zip(stated, wanted, strict=False) for a, b in zip(got, step, strict=True))
    return right / (3 * len(wanted))


def _steps(text: str) -> list[Step]:
    return [(float(a), op.translate(_OPERATORS), float(b)) for a, op, b in _STEP.findall(text)]
