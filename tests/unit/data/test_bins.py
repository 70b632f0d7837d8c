# SPDX-License-Identifier: Apache-2.0
"""Claim: bins hold every sequence once within the budget, and pay for a group's prompt once a bin."""

from __future__ import annotations

import gc
import tracemalloc
import weakref

import pytest
import torch

from megatron_g2rpo.data import bins as bins_module
from megatron_g2rpo.data.bins import Cost, assign_bins, shares_trunk, tokens_of


def wholes(lengths: list[int]) -> list[Cost]:
    return [Cost(whole=length, trunk=0, branch=length) for length in lengths]


def test_bins_hold_everything_once_within_the_budget() -> None:
    lengths = torch.randint(1, 50, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    bins = assign_bins(wholes(lengths), 64)
    assert sorted(index for members in bins for index in members) == list(range(200))
    assert all(sum(lengths[index] for index in members) <= 64 for members in bins)
    # First-fit-decreasing needs at most 11/9 of the optimum, which is at least the sum over the budget.
    assert len(bins) <= 11 / 9 * sum(lengths) / 64 + 1


def test_a_group_stays_in_one_bin_or_in_as_few_as_it_needs() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 50, (120,), generator=generator).tolist()
    groups = [index // 6 for index in range(120)]
    bins = assign_bins(wholes(lengths), 160, groups)
    assert sorted(index for members in bins for index in members) == list(range(120))
    assert all(sum(lengths[index] for index in members) <= 160 for members in bins)
    totals = [sum(lengths[6 * group : 6 * group + 6]) for group in range(20)]
    assert min(totals) <= 160 < max(totals)
    for group, total in enumerate(totals):
        spread = sum(any(groups[index] == group for index in members) for members in bins)
        assert spread == (1 if total <= 160 else 2)


def test_a_sequence_longer_than_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a sequence of 65 tokens exceeds the 64 .*train_mb_tokens"):
        assign_bins(wholes([3, 65]), 64)


class Group:
    """A key that can be watched."""


def test_nothing_of_a_step_is_kept_after_it() -> None:
    """However long a run: neither the groups, which are keys here, nor anything that this module allocated."""
    watched: list[weakref.ref[Group]] = []

    def step() -> None:
        groups = [Group() for _ in range(20)]
        watched.extend(map(weakref.ref, groups))
        # Groups with a trunk and without, and of each some that fit into no bin.
        costs = [Cost.of(9, answer, 4, shares=group % 2 == 0) for group in range(20) for answer in (4, 9, 30, 40)]
        assign_bins(costs, 64, [group for group in groups for _ in range(4)])

    step()
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(10):
            step()
        gc.collect()
        here = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, bins_module.__file__)])
    finally:
        tracemalloc.stop()
    assert len(watched) == 11 * 20
    assert not any(each() for each in watched)
    assert sum(trace.size for trace in here.traces) == 0


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_a_group_that_shares_its_prompt_costs_it_once_a_bin(multiple: int) -> None:
    generator = torch.Generator().manual_seed(multiple)
    prompts = torch.randint(2, 120, (24,), generator=generator).tolist()
    answers = torch.randint(1, 60, (24, 8), generator=generator).tolist()
    costs = [
        Cost.of(prompt, answer, multiple, shares=True)
        for prompt, of_prompt in zip(prompts, answers, strict=True)
        for answer in of_prompt
    ]
    groups = [index // 8 for index in range(len(costs))]
    budget = 256
    bins = assign_bins(costs, budget, groups)
    assert sorted(index for members in bins for index in members) == list(range(len(costs)))
    split = 0
    for members in bins:
        of_group = [[i for i in members if groups[i] == group] for group in sorted({groups[i] for i in members})]
        assert sum(tokens_of([costs[i] for i in each]) for each in of_group) <= budget
        split += sum(0 < len(each) < 8 for each in of_group)
    assert split, "a group is to be larger than a bin"
    apart = assign_bins([Cost(whole=c.whole, trunk=0, branch=c.whole) for c in costs], budget, groups)
    assert len(bins) < len(apart)


def test_what_a_group_costs_by_hand() -> None:
    group = [Cost.of(10, answer, 1, shares=True) for answer in (1, 4, 7)]
    assert [(c.whole, c.trunk, c.branch) for c in group] == [(11, 9, 1), (14, 9, 4), (17, 9, 7)]
    assert tokens_of(group) == 9 + 1 + 4 + 7
    assert tokens_of(group[:1]) == 11, "one alone shares nothing"


def test_a_group_does_not_share_what_padding_makes_dearer() -> None:
    """Prompts of two tokens: a trunk of one and two branches, each padded to 8, are more than two sequences of 8."""
    group = [Cost.of(2, 5, 8, shares=True)] * 2
    assert not shares_trunk(group)
    assert tokens_of(group) == 16
    assert assign_bins(group, 16, [0, 0]) == [[0, 1]]


def test_a_sequence_that_only_fits_whole_has_a_bin_of_its_own() -> None:
    """Its trunk and branch are padded to 24 tokens together, it alone to 16."""
    group = [Cost.of(10, 6, 8, shares=True), *[Cost.of(10, 3, 8, shares=True)] * 2]
    assert group[0].trunk + group[0].branch == 24
    assert sorted(assign_bins(group, 16, [0] * 3)) == [[0], [1], [2]]


def test_without_sharing_nothing_is_shared() -> None:
    group = [Cost.of(50, 5, 1, shares=False)] * 4
    assert not shares_trunk(group)
    assert tokens_of(group) == 4 * 55
