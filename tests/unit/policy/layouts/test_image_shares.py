# SPDX-License-Identifier: Apache-2.0
"""Claim: each image is encoded once, by the peer with the least to do."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_g2rpo.policy.layouts.image_shares import assign_images, largest_share


def test_images_are_dealt_out_evenly_and_each_once() -> None:
    assert assign_images([10, 40, 20, 30], 2) == [[0, 1], [2, 3]]
    assert assign_images([5], 3) == [[0], [], []]
    assert assign_images([], 2) == [[], []]
    patches = torch.randint(16, 4096, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    shares = assign_images(patches, 8)
    assert sorted(image for share in shares for image in share) == list(range(64))
    loads = [sum(patches[image] for image in share) for share in shares]
    assert max(loads) - min(loads) <= max(patches)


@given(images=st.lists(st.integers(1, 64), min_size=1, max_size=9), peers=st.integers(1, 4))
def test_the_largest_share_is_that_of_the_busiest_peer_in_tokens_as_in_patches(images: list[int], peers: int) -> None:
    shares = assign_images([4 * tokens for tokens in images], peers)
    assert largest_share(images, peers) == max(sum(images[image] for image in share) for share in shares)
    # The same by another way: each image, largest first, onto the lightest load.
    loads = [0] * peers
    for tokens in sorted(images, reverse=True):
        loads[loads.index(min(loads))] += tokens
    assert largest_share(images, peers) == max(loads)
