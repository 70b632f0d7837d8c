# SPDX-License-Identifier: Apache-2.0
"""A validation part by image: samples that share one are all in it, or none is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from megatron_g2rpo.data.errors import DataError


def validation_samples(contents: Sequence[Sequence[str]], share: float) -> list[bool]:
    """Say of every sample whether it belongs to the validation part.

    Samples that share a content belong together, and so do those that a chain of such samples connects. A group is
    drawn by a hash of its contents, whatever the order of the samples; a sample that is added later moves no group that
    it has nothing to do with. Where no group would be drawn, the one with the least hash is; where all would, all but
    the one with the largest.

    Args:
        contents: what each sample shows, as hex digests of its images, or of its question where it has none.
        share: expected share of the groups, between 0 and 1.

    Raises:
        DataError: all samples belong together, so that there is nothing to divide.
    """
    root = _connected(contents)
    groups = [root[sample[0]] for sample in contents]
    position = {group: _position(group) for group in set(groups)}
    if len(position) < 2:
        raise DataError("--split: all samples share one image or question, and cannot be divided; leave --split out")
    drawn = {group for group, at in position.items() if at < share} or {min(position, key=position.__getitem__)}
    if len(drawn) == len(position):
        drawn.remove(max(position, key=position.__getitem__))
    return [group in drawn for group in groups]


def digest(data: bytes) -> str:
    """Return the hex digest of an image or a question."""
    return hashlib.sha256(data).hexdigest()


def _position(group: str) -> float:
    """Return a number in [0, 1) from a group's least digest.

    It is hashed again, because the least of many digests is small: large groups would all be drawn.
    """
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8]) / 2**64


def _connected(contents: Iterable[Sequence[str]]) -> dict[str, str]:
    """Return the least digest of the group that each digest is in (union-find, with path halving)."""
    parent: dict[str, str] = {}

    def find(node: str) -> str:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for sample in contents:
        for other in sample:
            low, high = sorted((find(sample[0]), find(other)))
            parent[high] = low
    return {node: find(node) for node in list(parent)}
