# SPDX-License-Identifier: Apache-2.0
"""Claim: one process of the Megatron policy computes what transformers computes (fp32), and a difference is detected.

Compared are values, gradients and three optimizer steps; see ``tests.common.layout_parity``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_g2rpo.models import qwen3_vl
from megatron_g2rpo.policy.device import select
from tests.common.compare import Report
from tests.common.layout_parity import Case, check_layout_parity, prepare

CASES = [
    Case(shape="tied"),
    Case(shape="untied", overlap=True),
    Case(shape="wide", distributed_optimizer=True),
    Case(shape="one_kv_head", distributed_optimizer=True, overlap=True),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def compare(directory: Path, case: Case) -> Report:
    prepare(directory, case)
    report = check_layout_parity(directory, select("cpu"), case)
    print(f"parity [{case}]: {report}")
    return report


@pytest.mark.parametrize("case", CASES, ids=str)
def test_policy_equals_transformers(directory: Path, case: Case) -> None:
    compare(directory, case).assert_within_tolerance()


def test_chunked_mrope_is_caught(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative: Qwen2-VL's chunked frequency layout agrees on text and must fail here, on images."""

    def chunked_axes(mrope_section: list[int]) -> list[int]:
        return torch.repeat_interleave(torch.arange(3), torch.tensor(mrope_section)).tolist()

    monkeypatch.setattr(qwen3_vl, "interleaved_axes", chunked_axes)
    report = compare(directory, Case(shape="tied"))
    assert report.worst["logprob"][0] > 1e-3
    with pytest.raises(AssertionError, match="logprob sequence"):
        report.assert_within_tolerance()


@pytest.mark.parametrize(
    ("option", "value"),
    [("weight_decay", 0.0), ("adam_beta1", 0.8), ("adam_beta2", 0.95), ("lr", 1.01e-3), ("clip_grad", 100.0)],
)
def test_another_optimizer_is_caught(
    directory: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: float
) -> None:
    """Negative: an optimizer that is not the reference's by one setting exceeds the tolerance of the updates."""
    prepare(directory, Case(shape="untied"))
    section, override = Case.section, f"megatron_cfg.optimizer.{option}={value}"
    monkeypatch.setattr(Case, "section", lambda case, directory: section(case, directory, override))
    report = compare(directory, Case(shape="untied"))
    assert {failure.split()[0] for failure in report.failures} - {"later_logprob"} == {"update"}
