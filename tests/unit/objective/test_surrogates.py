# SPDX-License-Identifier: Apache-2.0
"""The PPO surrogate: values and gradients against a case-by-case statement, diagnostics, options."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_g2rpo.objective import surrogates
from megatron_g2rpo.objective.sequences import Sequences

OPTIONS = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0, "log_ratio_clamp": 20.0}


def one_sequence(size: int) -> Sequences:
    return Sequences(ids=torch.zeros(size, dtype=torch.int64), size=1)


def by_cases(log_ratio: float, advantage: float, low: float, high: float, dual: float | None, clamp: float):
    """(loss, its derivative by the log-probability) of one token, from the definition, branch by branch."""
    ratio = math.exp(min(max(log_ratio, -clamp), clamp))
    slope = -advantage * ratio if abs(log_ratio) < clamp else 0.0
    if advantage >= 0:
        return (-advantage * (1 + high), 0.0) if ratio > 1 + high else (-advantage * ratio, slope)
    if ratio < 1 - low:
        return -advantage * (1 - low), 0.0
    if dual is not None and ratio > dual:
        return -advantage * dual, 0.0
    return -advantage * ratio, slope


@pytest.mark.parametrize("dual", [3.0, 1.1, None])
@pytest.mark.parametrize("clamp", [20.0, 0.5])
def test_values_and_gradients_equal_the_case_by_case_statement(dual: float | None, clamp: float) -> None:
    """float64, 1e-12 relative: the same few operations. Log-ratios reach beyond every clip and the clamp."""
    generator = torch.Generator().manual_seed(0)
    behaviour = -5 * torch.rand(400, dtype=torch.float64, generator=generator)
    log_ratio = 1.5 * torch.randn(400, dtype=torch.float64, generator=generator)
    log_ratio[:4] = torch.tensor([0.0, 25.0, -25.0, 0.0])
    logprobs = (behaviour + log_ratio).requires_grad_()
    advantages = torch.randn(400, dtype=torch.float64, generator=generator)
    advantages[3] = 0.0

    options = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": dual, "log_ratio_clamp": clamp}
    result = surrogates.get("ppo")(logprobs, behaviour, advantages, one_sequence(400), **options)
    result.loss.sum().backward()
    cases = [
        by_cases(d, a, 0.2, 0.3, dual, clamp)
        for d, a in zip((logprobs - behaviour).tolist(), advantages.tolist(), strict=True)
    ]
    values, slopes = torch.tensor(cases, dtype=torch.float64).unbind(1)
    torch.testing.assert_close(result.loss, values, rtol=1e-12, atol=0)
    torch.testing.assert_close(logprobs.grad, slopes, rtol=1e-12, atol=0)


def test_on_policy_the_gradient_is_the_policy_gradient() -> None:
    """At ratio 1 no clip acts: the derivative of the loss is exactly -A."""
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantages = torch.tensor([1.5, -0.5, 0.0])
    surrogates.get("ppo")(logprobs, logprobs, advantages, one_sequence(3), **OPTIONS).loss.sum().backward()
    assert torch.equal(logprobs.grad, -advantages)


def test_diagnostics_say_which_clip_decided_each_token() -> None:
    ratios = torch.tensor([0.5, 0.5, 1.0, 1.35, 1.35, 4.0, 4.0])
    advantages = torch.tensor([-1.0, 1.0, -1.0, 1.0, -1.0, -1.0, 1.0])
    result = surrogates.get("ppo")(
        ratios.log().requires_grad_(), torch.zeros(7), advantages, one_sequence(7), **OPTIONS
    )
    assert result.clipped_low.tolist() == [True] + [False] * 6
    assert result.clipped_high.tolist() == [False, False, False, True, False, False, True]
    assert result.clipped_dual.tolist() == [False] * 5 + [True, False]
    assert not result.ratio.requires_grad
    torch.testing.assert_close(result.ratio, ratios)
    sums = result.sums(torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0]))
    counts = {name: sums[name].item() for name in ("clipped_low", "clipped_high", "clipped_dual")}
    assert counts == {"clipped_low": 1, "clipped_high": 1, "clipped_dual": 1}
    assert sums["ratio"].item() == pytest.approx(0.5 + 1.0 + 1.35 + 4.0)


def test_no_gradient_flows_into_the_behaviour_policy_or_the_advantages() -> None:
    tensors = [torch.tensor([0.1, 0.2], requires_grad=True) for _ in range(3)]
    surrogates.get("ppo")(*tensors, one_sequence(2), **OPTIONS).loss.sum().backward()
    assert [tensor.grad is None for tensor in tensors] == [False, True, True]


@pytest.mark.parametrize(
    ("option", "value"),
    [("clip_low", -0.1), ("clip_low", 1.1), ("clip_high", -0.1), ("dual_clip", 1.0), ("log_ratio_clamp", 0.0)],
)
def test_options_out_of_range_are_errors(option: str, value: float) -> None:
    tensors = [torch.zeros(1) for _ in range(3)]
    with pytest.raises(ValueError, match=option):
        surrogates.get("ppo")(*tensors, one_sequence(1), **{**OPTIONS, option: value})


def test_shapes_that_would_broadcast_and_unknown_names_are_errors() -> None:
    with pytest.raises(ValueError, match="one shape"):
        surrogates.get("ppo")(torch.zeros(3), torch.zeros(3), torch.zeros(1), one_sequence(3), **OPTIONS)
    with pytest.raises(ValueError, match=r"unknown surrogate 'pqo' \(did you mean 'ppo'\?\); known: ppo"):
        surrogates.get("pqo")
