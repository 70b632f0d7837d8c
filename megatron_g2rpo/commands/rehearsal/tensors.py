# SPDX-License-Identifier: Apache-2.0
"""The tensors among what an op takes or gives back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Iterate over the tensors among arguments or results of an op, those in lists and tuples included.

    torch's ``tree_iter`` finds them too, in the most of a microsecond a value; a rehearsal asks for millions.
    """
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
