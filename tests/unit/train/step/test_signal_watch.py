# SPDX-License-Identifier: Apache-2.0
"""Claim: rewards that teach nothing are said at once, warned of after five steps; a step with signal begins anew."""

from __future__ import annotations

from megatron_g2rpo.train.step.warnings import SignalWatch


def test_the_first_step_without_signal_is_said_and_the_fifth_in_a_row_warned_of() -> None:
    watch = SignalWatch()
    shares = [1.0] * 4 + [0.9] + [1.0] * 11
    said = {step: watch(step, {"train/zero_variance_groups": share}) for step, share in enumerate(shares)}
    assert [step for step, lines in said.items() if lines] == [0, 5, 9, 14]
    assert said[5] == ["step 5: all responses of every group have the same reward (mean 0): the rewards teach nothing"]
    assert [step for step, lines in said.items() if lines and lines[0].startswith("warning: ")] == [9, 14]
