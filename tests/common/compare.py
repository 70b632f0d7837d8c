# SPDX-License-Identifier: Apache-2.0
"""The comparator of the numerical tests: errors by kind, the worst of each, and the tolerance that each must keep.

A ``Report`` is told every error (``note``), and says at the end that all are within their tolerances, or that those of
a deliberate mistake exceed them by a margin. An error that is no number exceeds every tolerance.

Tensors may be on any device; they are compared on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# -- errors of tensors ----------------------------------------------------------------------------------------------


def relative_distance(ours: Tensor, theirs: Tensor, scale: Tensor | None = None) -> float:
    """Return ``||ours - theirs|| / ||scale||`` in float32; ``||ours - theirs||`` where the scale is 0.

    Args:
        ours, theirs: tensors of equal shape.
        scale: tensor whose norm the distance is divided by; None for ``theirs``.
    """
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    ours, theirs = ours.cpu(), theirs.cpu()
    difference, size = float((ours.float() - theirs).norm()), float((theirs if scale is None else scale.cpu()).norm())
    return difference / size if size else difference


def largest_distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the largest ``relative_distance`` of two tensors of the same name; nan where one is nan."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    return float(torch.tensor([relative_distance(ours[name], theirs[name]) for name in theirs]).max())


def total_distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return ``||ours - theirs||`` over all tensors together, in float64."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    return float(
        torch.stack([(ours[name].cpu().double() - theirs[name].cpu().double()).norm() for name in ours]).norm()
    )


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest ``|ours - theirs|``; 0 for tensors without elements."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours.cpu() - theirs.cpu()).abs().max()) if ours.numel() else 0.0


def largest_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest ``|ours - theirs|``, relative to values above one; 0 for tensors without elements."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    ours, theirs = ours.cpu(), theirs.cpu()
    return float(((ours - theirs).abs() / theirs.abs().clamp(min=1)).max()) if ours.numel() else 0.0


# -- errors by kind -------------------------------------------------------------------------------------------------


class Report:
    """The largest error of each kind, and whatever exceeded its tolerance.

    Args:
        tolerances: largest allowed error of each kind. A kind without a tolerance is a mistake of the test.
        worst: errors of another report to start from, such as that of another process.

    Attributes:
        worst: kind -> (error, where it is).
        failures: a line for each error that exceeded its tolerance.
    """

    def __init__(self, tolerances: Mapping[str, float], worst: Mapping[str, Any] | None = None) -> None:
        self.tolerances = dict(tolerances)
        self.worst: dict[str, tuple[float, str]] = {}
        self.failures: list[str] = []
        for kind, (error, where) in (worst or {}).items():
            self.note(kind, error, where)

    def note(self, kind: str, error: float, where: str = "") -> None:
        """Add one error to the report.

        Raises:
            KeyError: the kind has no tolerance.
        """
        if kind not in self.tolerances:
            raise KeyError(f"errors of kind {kind!r} have no tolerance; those that have: {', '.join(self.tolerances)}")
        self._keep_larger(kind, error, where)
        if not error <= self.tolerances[kind]:
            self.failures.append(f"{kind} {where}: {error:.2e} > {self.tolerances[kind]:.0e}")

    def _keep_larger(self, kind: str, error: float, where: str) -> None:
        known = self.worst.get(kind)
        if known is None or (not error <= known[0] and not math.isnan(known[0])):
            self.worst[kind] = (error, where)

    def over_all_ranks(self) -> Report:
        """Return, on every rank, the report of the errors of all ranks. A collective of the world."""
        everyone: list[Report] = [self] * dist.get_world_size()
        dist.all_gather_object(everyone, self)
        merged = Report(self.tolerances)
        for other in everyone:
            merged.merge(other)
        return merged

    def merge(self, other: Report) -> None:
        """Add the errors of another report; the same failure counts once."""
        for kind, (error, where) in other.worst.items():
            self._keep_larger(kind, error, where)
        self.failures += [failure for failure in other.failures if failure not in self.failures]

    def __str__(self) -> str:
        return ", ".join(
            f"{kind} {error:.1e}" + f" ({where})" * bool(where) for kind, (error, where) in self.worst.items()
        )

    def assert_within_tolerance(self) -> None:
        """Assert that every kind with a tolerance was compared, and that no error exceeds its tolerance."""
        missing = self.tolerances.keys() - self.worst.keys()
        assert not missing, f"nothing was compared of: {', '.join(sorted(missing))} ({str(self) or 'nothing at all'})"
        assert self.tolerances, "there is no tolerance: nothing was compared"
        assert not self.failures, f"{len(self.failures)} errors too large:\n" + "\n".join(self.failures) + f"\n{self}"

    def assert_exceeded(self, *kinds: str, margin: float = 1.0) -> None:
        """Assert that the errors of each of these kinds exceed ``margin`` times their tolerance."""
        assert kinds, "no kind was named: nothing would be asserted"
        for kind in kinds:
            assert kind in self.worst, f"nothing was compared of: {kind} ({str(self) or 'nothing at all'})"
            assert not self.worst[kind][0] <= margin * self.tolerances[kind], f"{kind} is within tolerance: {self}"
