# SPDX-License-Identifier: Apache-2.0
"""Which sequences share a row: bin packing that keeps groups together and pays for a group's prompt once.

The n sequences of a group may lie in a row as one *trunk*, the prompt without its last token, and n *branches*, each
the prompt's last token and the response without its last: the token at which the first token of a response is predicted
is each branch's own, so that every label has a place. Neither is anything left out (the last token of a sequence
predicts nothing) nor does a branch's first token differ from the prompt's last: it attends to the same tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What a sequence costs in a row, in tokens with the padding that follows.

    Attributes:
        whole: its cost alone.
        trunk: the part that it can share with the other sequences of its group; 0 where it shares nothing.
        branch: its cost beside a shared trunk.
    """

    whole: int
    trunk: int
    branch: int

    @classmethod
    def of(cls, prompt: int, response: int, multiple: int, *, shares: bool) -> Cost:
        """Return the cost of a sequence.

        Args:
            prompt: number of tokens of the prompt.
            response: number of tokens of the response.
            multiple: number that the tokens of every segment of a row are padded to a multiple of.
            shares: whether groups share their prompt.
        """
        whole = round_up(prompt + response, multiple)
        # Without a token of the response there is no branch, and without a second one of the prompt no trunk.
        if not shares or response < 1 or prompt < 2:
            return cls(whole=whole, trunk=0, branch=whole)
        return cls(whole=whole, trunk=round_up(prompt - 1, multiple), branch=round_up(response, multiple))


def shares_trunk(group: Sequence[Cost]) -> bool:
    """Return whether the sequences of one group in one row cost less with a shared trunk than each by itself."""
    if len(group) < 2 or any(cost.trunk == 0 for cost in group):
        return False
    return group[0].trunk + sum(cost.branch for cost in group) < sum(cost.whole for cost in group)


def tokens_of(group: Sequence[Cost]) -> int:
    """Return the number of tokens that sequences of one group need in a row, padding included."""
    if shares_trunk(group):
        return group[0].trunk + sum(cost.branch for cost in group)
    return sum(cost.whole for cost in group)


def assign_bins(costs: Sequence[Cost], budget: int, groups: Sequence[Hashable] | None = None) -> list[list[int]]:
    """Assign sequences to bins by first-fit-decreasing bin packing that keeps groups together.

    A group stays in one bin if it fits, else in as few as first-fit-decreasing finds for it, because its prompt and
    its images are processed once per bin. Bins are slightly emptier as a result, which costs nothing where they are not
    padded up to the budget.

    Args:
        costs: the cost of each sequence; those of a group have equal trunks.
        budget: largest number of tokens in a bin.
        groups: the group of each sequence; None: each sequence is a group of its own.

    Returns:
        Indices of the sequences of each bin, in ascending order.

    Raises:
        ValueError: a sequence does not fit into an empty bin.
    """
    longest = max((cost.whole for cost in costs), default=0)
    if longest > budget:
        raise ValueError(
            f"a sequence of {longest} tokens exceeds the {budget} tokens of a micro-batch; raise "
            "policy.sequence_packing.train_mb_tokens or lower policy.max_total_sequence_length"
        )
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(range(len(costs)) if groups is None else groups):
        members.setdefault(group, []).append(index)
    items = [part for group in members.values() for part in _parts(group, costs, budget)]
    bins = _first_fit_decreasing([tokens_of([costs[i] for i in item]) for item in items], budget)
    return [sorted(index for item in chosen for index in items[item]) for chosen in bins]


def _parts(group: list[int], costs: Sequence[Cost], budget: int) -> list[list[int]]:
    """Split a group into parts that fit into a bin each; every part has the group's trunk once."""
    chosen = [costs[index] for index in group]
    if tokens_of(chosen) <= budget:
        return [group]
    if not shares_trunk(chosen):
        return [[group[i] for i in part] for part in _first_fit_decreasing([cost.whole for cost in chosen], budget)]
    free = budget - chosen[0].trunk
    # Padding may make a trunk and one branch longer than the whole sequence.
    alone = [index for index in group if costs[index].branch > free]
    together = [index for index in group if costs[index].branch <= free]
    parts = _first_fit_decreasing([costs[index].branch for index in together], free)
    return [[together[i] for i in part] for part in parts] + [[index] for index in alone]


def _first_fit_decreasing(sizes: Sequence[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fit = next((b for b, left in enumerate(free) if left >= sizes[index]), None)
        if fit is None:
            bins.append([])
            free.append(budget)
            fit = len(bins) - 1
        bins[fit].append(index)
        free[fit] -= sizes[index]
    return bins


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple that is not below a value."""
    return -(-value // multiple) * multiple
