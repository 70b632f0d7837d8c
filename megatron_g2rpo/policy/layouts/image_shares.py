# SPDX-License-Identifier: Apache-2.0
"""Which rank encodes which image of a row: tensor- and context-parallel peers share them."""

from __future__ import annotations

from collections.abc import Sequence


def assign_images(sizes: Sequence[int], peers: int) -> list[list[int]]:
    """Which images each peer encodes: the largest first, each to the peer with the least work so far.

    Args:
        sizes: work of each image: its patches, or its merged tokens. It is linear in them, because the tower's
            attention stays within an image, and its linear layers dominate at the sizes in use.
        peers: ranks that share the row.

    Returns:
        Image numbers of each peer, ascending.
    """
    shares: list[list[int]] = [[] for _ in range(peers)]
    load = [0] * peers
    for image in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        peer = min(range(peers), key=lambda p: (load[p], p))
        shares[peer].append(image)
        load[peer] += sizes[image]
    return [sorted(share) for share in shares]


def largest_share(sizes: Sequence[int], peers: int) -> int:
    """Work of the peer that has the most, in the unit of ``sizes``; arguments as in ``assign_images``."""
    return max(sum(sizes[image] for image in share) for share in assign_images(sizes, peers))
