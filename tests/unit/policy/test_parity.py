# SPDX-License-Identifier: Apache-2.0
"""Claim: one process of the Megatron policy computes what transformers computes: values and gradients (fp32)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_g2rpo.policy import model as policy_model
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.rope import InterleavedMRoPE
from tests.parity import SHAPES, check_parity
from tests.tiny_model import make_tiny_qwen3vl


@pytest.mark.parametrize("shape", SHAPES)
def test_policy_equals_transformers(tmp_path: Path, shape: str) -> None:
    make_tiny_qwen3vl(tmp_path / shape, **SHAPES[shape], seed=1)
    check_parity(tmp_path, select("cpu"), tensor=1, shape=shape)


def test_chunked_mrope_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative: Qwen2-VL's chunked frequency layout agrees on text and must fail here, on images."""

    class Chunked(InterleavedMRoPE):
        def __init__(self, head_dim: int, rope_theta: float, mrope_section: list[int]) -> None:
            super().__init__(head_dim, rope_theta, mrope_section)
            self.axis = torch.repeat_interleave(torch.arange(3), torch.tensor(mrope_section))

    monkeypatch.setattr(policy_model, "InterleavedMRoPE", Chunked)
    make_tiny_qwen3vl(tmp_path / "base", **SHAPES["base"], seed=1)
    with pytest.raises(AssertionError):
        check_parity(tmp_path, select("cpu"), tensor=1, shape="base")
