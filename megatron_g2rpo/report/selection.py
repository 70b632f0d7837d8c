# SPDX-License-Identifier: Apache-2.0
"""Which groups of rollouts a page shows where its budget does not hold all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_g2rpo.report.rollouts import Overview

# Bytes of the page, measured on the quickstart's rollouts: per rollout, per token (ids and three values), per character
# of text, and per group (prompt, question, its numbers), compressed and in base64.
PER_ROLLOUT, PER_TOKEN, PER_CHARACTER, PER_GROUP = 30.0, 5.0, 0.4, 150.0


def balanced(overview: Overview, groups: Sequence[np.ndarray]) -> list[int]:
    """Order groups so that every beginning of the order is spread evenly over tasks and over steps.

    Tasks take turns. The groups of a task come in the order of the van der Corput sequence over its steps: the first,
    the last, the middle, the quarters and so on. The order depends on nothing but the groups.

    Returns:
        Indices into ``groups``, each once.
    """
    of_task: dict[str, list[int]] = {}
    for index, rows in enumerate(groups):
        of_task.setdefault(str(overview.task[rows[0]]), []).append(index)
    queues = [[mine[place] for place in spread(len(mine))] for _, mine in sorted(of_task.items())]
    longest = max(map(len, queues), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]


def spread(count: int) -> list[int]:
    """Return 0 to ``count`` - 1 in the order of a van der Corput sequence, the last one second."""
    if count <= 2:
        return list(range(count))
    bits = (count - 1).bit_length()
    reversed_bits = (int(f"{index:0{bits}b}"[::-1], 2) for index in range(1 << bits))
    order = [place for place in reversed_bits if place < count - 1]
    return [order[0], count - 1, *order[1:]]


def estimated_bytes(
    overview: Overview, groups: Sequence[np.ndarray], longest_text: int, most_tokens: int
) -> np.ndarray:
    """Estimate how many bytes of the page each group takes, pictures aside.

    Args:
        overview: the rollouts.
        groups: their rows, by group.
        longest_text: characters of a text above which it is cut.
        most_tokens: tokens of a response above which it is cut.
    """
    tokens = np.minimum(overview.tokens, most_tokens)
    characters = np.minimum(overview.characters, longest_text)
    rollout = PER_ROLLOUT + PER_TOKEN * tokens + PER_CHARACTER * characters
    return np.array([PER_GROUP + rollout[rows].sum() for rows in groups])


def within(order: Sequence[int], sizes: np.ndarray, budget: float) -> list[int]:
    """Return the beginning of an order whose sizes stay within a budget; at least one group where there are any."""
    if not order:
        return []
    total = np.cumsum(sizes[list(order)])
    return list(order[: max(1, int(np.searchsorted(total, budget, side="right")))])
