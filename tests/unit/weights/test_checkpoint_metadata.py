# SPDX-License-Identifier: Apache-2.0
"""Claims about what is said of a file of a checkpoint that cannot be read."""

from __future__ import annotations

import io
import pickle

import pytest
import torch

from megatron_g2rpo.weights.checkpoint_metadata import reason


class Something:
    """No tensor."""


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def error_of(data: bytes) -> BaseException:
    with pytest.raises((pickle.UnpicklingError, RuntimeError, EOFError)) as caught:
        torch.load(io.BytesIO(data), weights_only=True)
    return caught.value


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (bytes(64), "UnpicklingError: Unsupported operand 0"),
        (saved(Something()), "UnpicklingError: Unsupported global: GLOBAL tests.unit.weights.test_checkpoint_metadata"),
        (b"", "EOFError"),
    ],
)
def test_the_finding_is_told_and_not_torchs_advice_to_run_what_is_in_the_file(data: bytes, told: str) -> None:
    error = error_of(data)
    assert "weights_only" in str(error) or isinstance(error, EOFError)
    said = reason(error)
    assert said.startswith(told)
    assert "weights_only" not in said
    assert "\n" not in said
