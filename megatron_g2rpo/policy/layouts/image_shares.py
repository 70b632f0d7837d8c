# SPDX-License-Identifier: Apache-2.0
"""Distributes the images of a packed row over the tensor- and context-parallel ranks that encode them."""

from __future__ import annotations

from collections.abc import Sequence


def assign_images(sizes: Sequence[int], peers: int) -> list[list[int]]:
    """Decide which images each peer encodes: the largest image first, each to the peer with the least work so far.

    Args:
        sizes: work of each image, in patches or in merged tokens. Work is linear in them, because the vision tower's
            attention stays within an image, and its linear layers dominate at the sizes in use.
        peers: number of ranks that share the row.

    Returns:
        One list of image indices per peer, ascending.
    """
    shares: list[list[int]] = [[] for _ in range(peers)]
    load = [0] * peers
    for image in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        peer = min(range(peers), key=lambda p: (load[p], p))
        shares[peer].append(image)
        load[peer] += sizes[image]
    return [sorted(share) for share in shares]


def largest_share(sizes: Sequence[int], peers: int) -> int:
    """Return the work of the peer with the most, in the unit of ``sizes``; the arguments are ``assign_images``'s."""
    return max(sum(sizes[image] for image in share) for share in assign_images(sizes, peers))
