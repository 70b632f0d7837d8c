# SPDX-License-Identifier: Apache-2.0
"""Claims: a pass of prefill is bounded, and little of it is padding."""

from __future__ import annotations

import pytest
import torch

from megatron_g2rpo.rollout.transformers.prefill import passes


@pytest.mark.parametrize("padded", [True, False])
def test_passes_cover_all_items_in_order_within_the_limit(padded: bool) -> None:
    random = torch.Generator().manual_seed(0)
    for _ in range(50):
        sizes = sorted(torch.randint(1, 900, (40,), generator=random).tolist(), reverse=True)
        found = list(passes(sizes, 1000, padded=padded))
        assert [place for start, stop in found for place in range(start, stop)] == list(range(40))
        for start, stop in found:
            run = sizes[start:stop]
            room = len(run) * max(run) if padded else sum(run)
            assert len(run) == 1 or room <= 1000
            assert not padded or room - sum(run) <= max(256, 0.25 * room)


def test_an_item_beyond_the_limit_goes_alone() -> None:
    assert list(passes([5000, 10, 10], 1000)) == [(0, 1), (1, 3)]
    assert list(passes([], 1000)) == []


def test_prompts_of_very_different_lengths_do_not_share_a_pass() -> None:
    assert list(passes([1065, 1065, 40, 40], 8192, padded=True)) == [(0, 2), (2, 4)]
    assert list(passes([57, 50, 45, 40], 8192, padded=True)) == [(0, 4)], "small prompts do: a pass has its price"
