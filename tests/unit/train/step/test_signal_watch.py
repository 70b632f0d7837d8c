# SPDX-License-Identifier: Apache-2.0
"""Claim: rewards that teach nothing for five steps in a row are said, and a step with signal begins the count anew."""

from __future__ import annotations

from megatron_g2rpo.train.step.warnings import SignalWatch


def test_five_steps_in_a_row_without_signal_are_said() -> None:
    watch = SignalWatch()
    shares = [1.0] * 4 + [0.9] + [1.0] * 11
    said = [step for step, share in enumerate(shares) if watch({"train/zero_variance_groups": share})]
    assert said == [9, 14]
