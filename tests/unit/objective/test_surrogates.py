# SPDX-License-Identifier: Apache-2.0
"""The surrogates: values and gradients against case-by-case statements and plain autograd, diagnostics, options.

float64 throughout, 1e-12 relative: the same few operations, in another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_g2rpo import registry
from megatron_g2rpo.objective import surrogates
from megatron_g2rpo.objective.sequences import Sequences
from tests.common.builtin import builtin_names
from tests.unit.objective.shares import on_two_ranks

PPO = {"ratio_clip_min": 0.2, "ratio_clip_max": 0.3, "ratio_clip_c": 3.0, "log_ratio_clamp": 20.0}
OPTIONS = {
    "ppo": PPO,
    "gspo": PPO,
    "cispo": {"ratio_clip_min": 0.2, "ratio_clip_max": 0.3, "log_ratio_clamp": 20.0},
    "sapo": {"sapo_tau_positive": 1.0, "sapo_tau_negative": 1.05, "log_ratio_clamp": 20.0},
}
CLOSE = {"rtol": 1e-12, "atol": 0.0}

every_surrogate = pytest.mark.parametrize("name", OPTIONS)


def one_sequence(size: int) -> Sequences:
    return Sequences(ids=torch.zeros(size, dtype=torch.int64), size=1)


def clipped_token(log_ratio: float, advantage: float, dual: float | None, clamp: float) -> tuple[float, float]:
    """(loss, its derivative by the log-ratio) of the clipped surrogate, from the definition, branch by branch."""
    ratio = math.exp(min(max(log_ratio, -clamp), clamp))
    slope = -advantage * ratio if abs(log_ratio) < clamp else 0.0
    if advantage >= 0:
        return (-advantage * 1.3, 0.0) if ratio > 1.3 else (-advantage * ratio, slope)
    if ratio < 0.8:
        return -advantage * 0.8, 0.0
    if dual is not None and ratio > dual:
        return -advantage * dual, 0.0
    return -advantage * ratio, slope


def tokens(size: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, behaviour, advantages), each [S]. Log-ratios reach beyond every clip and the clamp; some A are 0."""
    generator = torch.Generator().manual_seed(0)
    behaviour = -5 * torch.rand(size, dtype=torch.float64, generator=generator)
    log_ratio = 1.5 * torch.randn(size, dtype=torch.float64, generator=generator)
    advantages = torch.randn(size, dtype=torch.float64, generator=generator)
    log_ratio[:8] = torch.tensor([0.0, 25.0, -25.0, 25.0, -25.0, 0.0, 25.0, -25.0])
    advantages[:8] = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, 0.0, 0.0, 0.0])
    return (behaviour + log_ratio).requires_grad_(), behaviour, advantages


def check_tokens(
    name: str, options: dict[str, float | None], oracle: Callable[[float, float, float], tuple[float, float]]
) -> None:
    """``oracle`` maps (logprob, log-ratio, advantage) of a token to (loss, its derivative by the logprob)."""
    logprobs, behaviour, advantages = tokens()
    result = surrogates.get(name)(logprobs, behaviour, advantages, one_sequence(len(logprobs)), **options)
    result.loss.sum().backward()
    columns = (logprobs.tolist(), (logprobs - behaviour).tolist(), advantages.tolist())
    expected = [oracle(*token) for token in zip(*columns, strict=True)]
    values, slopes = torch.tensor(expected, dtype=torch.float64).unbind(1)
    torch.testing.assert_close(result.loss, values, **CLOSE)
    torch.testing.assert_close(logprobs.grad, slopes, **CLOSE)


@pytest.mark.parametrize("dual", [3.0, 1.1, None])
@pytest.mark.parametrize("clamp", [20.0, 0.5])
def test_ppo_equals_the_case_by_case_statement(dual: float | None, clamp: float) -> None:
    options = {"ratio_clip_min": 0.2, "ratio_clip_max": 0.3, "ratio_clip_c": dual, "log_ratio_clamp": clamp}
    check_tokens("ppo", options, lambda _, log_ratio, advantage: clipped_token(log_ratio, advantage, dual, clamp))


@pytest.mark.parametrize("ratio_clip_min", [0.2, 1.0])
@pytest.mark.parametrize("clamp", [20.0, 0.1])
def test_cispo_weighs_the_policy_gradient_by_the_clipped_ratio(ratio_clip_min: float, clamp: float) -> None:
    def oracle(logprob: float, log_ratio: float, advantage: float) -> tuple[float, float]:
        ratio = math.exp(min(max(log_ratio, -clamp), clamp))
        weight = min(max(ratio, 1 - ratio_clip_min), 1.3)
        return -weight * advantage * logprob, -weight * advantage

    check_tokens("cispo", {"ratio_clip_min": ratio_clip_min, "ratio_clip_max": 0.3, "log_ratio_clamp": clamp}, oracle)


@pytest.mark.parametrize("clamp", [20.0, 0.5])
def test_sapo_equals_its_gate_and_the_gates_derivative(clamp: float) -> None:
    """The slope is written with sech, ``f'(r) = sech(tau (r - 1) / 2)^2``; it is below 1e-300 for large ratios.

    There the sigmoid of the implementation is 1 up to rounding, and its slope is 0: hence an absolute tolerance too.
    """
    logprobs, behaviour, advantages = tokens()
    options = {"sapo_tau_positive": 1.3, "sapo_tau_negative": 2.1, "log_ratio_clamp": clamp}
    result = surrogates.get("sapo")(logprobs, behaviour, advantages, one_sequence(400), **options)
    result.loss.sum().backward()
    values, slopes = [], []
    for log_ratio, advantage in zip((logprobs - behaviour).tolist(), advantages.tolist(), strict=True):
        ratio = math.exp(min(max(log_ratio, -clamp), clamp))
        tau = 1.3 if advantage > 0 else 2.1
        values.append(-advantage * 4 / tau / (1 + math.exp(-tau * (ratio - 1))))
        sech = 1 / math.cosh(min(tau * (ratio - 1) / 2, 300))
        slopes.append(-advantage * sech**2 * ratio if abs(log_ratio) < clamp else 0.0)
    torch.testing.assert_close(result.loss, torch.tensor(values, dtype=torch.float64), **CLOSE)
    expected = torch.tensor(slopes, dtype=torch.float64)
    torch.testing.assert_close(logprobs.grad, expected, rtol=1e-12, atol=1e-13)


def packed_row() -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """(logprobs, behaviour, advantages, ids), each [S], and N: sequences of 1 to 5 tokens, scattered over the row.

    Every mean log-ratio (beyond the clamp, in each regime of the clips, 0) meets every sign of A; the tokens of a
    sequence differ widely around their mean. One sequence has no tokens; a fifth of the row belongs to none.
    """
    generator = torch.Generator().manual_seed(1)
    cases = [(mean, sign) for mean in (-25.0, -0.5, -0.1, 0.0, 0.1, 0.5, 2.0, 25.0) for sign in (-1.0, 0.0, 1.0)]
    logprobs, behaviour, advantages, ids = [], [], [], []
    for index, (mean, sign) in enumerate(cases):
        size = 1 + index % 5
        log_ratio = torch.randn(size, dtype=torch.float64, generator=generator)
        log_ratio += mean - log_ratio.mean()
        old = -5 * torch.rand(size, dtype=torch.float64, generator=generator)
        advantage = sign * (0.5 + torch.rand(1, dtype=torch.float64, generator=generator))
        logprobs.append(old + log_ratio)
        behaviour.append(old)
        advantages.append(advantage.expand(size))
        ids.append(torch.full((size,), index))
    outside = sum(map(len, ids)) // 4
    for column in (logprobs, behaviour):
        column.append(-5 * torch.rand(outside, dtype=torch.float64, generator=generator))
    advantages.append(torch.zeros(outside, dtype=torch.float64))
    ids.append(torch.full((outside,), -1))
    order = torch.randperm(sum(map(len, ids)), generator=generator)
    columns = [torch.cat(column)[order] for column in (logprobs, behaviour, advantages, ids)]
    return columns[0].requires_grad_(), columns[1], columns[2], columns[3], len(cases) + 1


def sequence_level_gspo(
    logprobs: Tensor, behaviour: Tensor, advantages: Tensor, ids: Tensor, size: int, dual: float | None, clamp: float
) -> Tensor:
    """Loss of each sequence [N], differentiated through the mean over all of its tokens: the paper's objective."""
    losses = []
    for index in range(size):
        members = ids == index
        if not members.any():
            losses.append(logprobs.new_zeros(()))
            continue
        ratio = (logprobs[members] - behaviour[members]).mean().clamp(-clamp, clamp).exp()
        advantage = advantages[members][0]
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
        if dual is not None and advantage < 0:
            loss = torch.minimum(loss, -advantage * dual)
        losses.append(loss)
    return torch.stack(losses)


@pytest.mark.parametrize("dual", [3.0, None])
@pytest.mark.parametrize("clamp", [20.0, 0.3])
def test_gspo_has_the_gradient_of_the_sequence_level_objective(dual: float | None, clamp: float) -> None:
    """The claim of the form with the stop-gradient: the mean over each sequence, against autograd through the mean."""
    logprobs, behaviour, advantages, ids, size = packed_row()
    whole = sequence_level_gspo(logprobs, behaviour, advantages, ids, size, dual, clamp)
    (expected,) = torch.autograd.grad(whole.sum(), logprobs)

    sequences = Sequences(ids=ids, size=size)
    options = {"ratio_clip_min": 0.2, "ratio_clip_max": 0.3, "ratio_clip_c": dual, "log_ratio_clamp": clamp}
    result = surrogates.get("gspo")(logprobs, behaviour, advantages, sequences, **options)
    inside = ids >= 0
    torch.testing.assert_close(result.loss[inside], whole[ids[inside]], **CLOSE)
    weights = torch.where(inside, 1 / sequences.counts().clamp(min=1)[ids], 0.0)
    (found,) = torch.autograd.grad((weights * result.loss).sum(), logprobs)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (expected == 0).any()
    assert (expected[inside] != 0).any()


def test_gspo_gives_every_token_the_clips_of_its_sequence_and_its_own_advantage() -> None:
    """Advantages that differ within a sequence: each token is ``ppo`` with the mean in the place of its log-ratio."""
    logprobs, behaviour, _, ids, size = packed_row()
    advantages = torch.randn(len(ids), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sequences = Sequences(ids=ids, size=size)
    result = surrogates.get("gspo")(logprobs, behaviour, advantages, sequences, **PPO)
    result.loss.sum().backward()
    means = [
        (logprobs - behaviour)[ids == index].mean().item() if index >= 0 else 0.0  # no sequence: ratio 1
        for index in ids.tolist()
    ]
    expected = [clipped_token(mean, a, 3.0, 20.0) for mean, a in zip(means, advantages.tolist(), strict=True)]
    values, slopes = torch.tensor(expected, dtype=torch.float64).unbind(1)
    torch.testing.assert_close(result.loss, values, **CLOSE)
    torch.testing.assert_close(logprobs.grad, slopes, **CLOSE)
    ratios = torch.tensor(means, dtype=torch.float64).clamp(-20, 20).exp()
    torch.testing.assert_close(result.ratio, ratios, **CLOSE)
    assert torch.equal(result.clipped_low, (ratios < 0.8) & (advantages < 0))
    assert torch.equal(result.clipped_high, (ratios > 1.3) & (advantages > 0))
    assert torch.equal(result.clipped_dual, (ratios > 3.0) & (advantages < 0))


@every_surrogate
@pytest.mark.parametrize("split", ["scattered", "all on rank 1"])
def test_two_ranks_that_share_sequences_find_what_one_finds(name: str, split: str) -> None:
    """Values, gradients and diagnostics; some sequences lie on one rank alone, and a rank may hold no token at all."""
    logprobs, behaviour, advantages, ids, size = packed_row()
    ranks = torch.ones_like(ids)
    if split == "scattered":
        ranks = torch.randint(0, 2, ids.shape, generator=torch.Generator().manual_seed(3))
        assert any(len(set(ranks[ids == index].tolist())) == 2 for index in range(size))

    def compute(sequences: Sequences, own: Tensor) -> list[Tensor]:
        leaf = logprobs.detach()[own].requires_grad_()
        result = surrogates.get(name)(leaf, behaviour[own], advantages[own], sequences, **OPTIONS[name])
        result.loss.sum().backward()
        flags = (result.clipped_low, result.clipped_high, result.clipped_dual)
        return [result.loss.detach(), leaf.grad, result.ratio, *flags]

    whole = compute(Sequences(ids=ids, size=size), torch.ones_like(ids, dtype=torch.bool))
    for rank, share in enumerate(on_two_ranks(ids, size, ranks, compute)):
        for found, expected in zip(share, whole, strict=True):
            torch.testing.assert_close(found, expected[ranks == rank], **CLOSE)


@every_surrogate
def test_on_policy_the_gradient_is_the_policy_gradient(name: str) -> None:
    """At ratio 1 no clip acts and no gate closes: the derivative of the loss is exactly -A."""
    logprobs = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.5, -0.5, 0.0], dtype=torch.float64)
    surrogates.get(name)(logprobs, logprobs, advantages, one_sequence(3), **OPTIONS[name]).loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages, **CLOSE)


def test_ppo_says_which_clip_decided_each_token() -> None:
    ratios = torch.tensor([0.5, 0.5, 1.0, 1.35, 1.35, 4.0, 4.0])
    advantages = torch.tensor([-1.0, 1.0, -1.0, 1.0, -1.0, -1.0, 1.0])
    result = surrogates.get("ppo")(
        ratios.log().requires_grad_(), torch.zeros(7), advantages, one_sequence(7), **OPTIONS["ppo"]
    )
    assert result.clipped_low.tolist() == [True] + [False] * 6
    assert result.clipped_high.tolist() == [False, False, False, True, False, False, True]
    assert result.clipped_dual.tolist() == [False] * 5 + [True, False]
    torch.testing.assert_close(result.ratio, ratios)
    sums = result.sums(torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0]))
    counts = {name: sums[name].item() for name in ("clipped_low", "clipped_high", "clipped_dual")}
    assert counts == {"clipped_low": 1, "clipped_high": 1, "clipped_dual": 1}
    assert sums["ratio"].item() == pytest.approx(0.5 + 1.0 + 1.35 + 4.0)


def test_cispo_counts_clipped_weights_of_either_sign_and_sapo_has_no_clip() -> None:
    ratios = torch.tensor([0.5, 0.5, 0.5, 1.0, 1.35, 1.35, 1.35])
    advantages = torch.tensor([-1.0, 1.0, 0.0, 1.0, -1.0, 1.0, 0.0])
    tensors = (ratios.log(), torch.zeros(7), advantages, one_sequence(7))
    result = surrogates.get("cispo")(*tensors, **OPTIONS["cispo"])
    assert result.clipped_low.tolist() == [True, True] + [False] * 5
    assert result.clipped_high.tolist() == [False] * 4 + [True, True, False]
    assert not result.clipped_dual.any()
    torch.testing.assert_close(result.ratio, ratios)
    result = surrogates.get("sapo")(*tensors, **OPTIONS["sapo"])
    assert not torch.stack([result.clipped_low, result.clipped_high, result.clipped_dual]).any()
    torch.testing.assert_close(result.ratio, ratios)


def test_sums_leave_out_masked_tokens_even_if_they_are_not_numbers() -> None:
    logprobs = torch.tensor([0.0, torch.nan])
    result = surrogates.get("ppo")(logprobs, torch.zeros(2), torch.ones(2), one_sequence(2), **PPO)
    assert result.sums(torch.tensor([1.0, 0.0]))["ratio"].item() == 1.0


@every_surrogate
def test_gradient_flows_into_the_policy_alone_and_only_through_the_loss(name: str) -> None:
    tensors = [torch.tensor([0.1, 0.2], requires_grad=True) for _ in range(3)]
    result = surrogates.get(name)(*tensors, one_sequence(2), **OPTIONS[name])
    result.loss.sum().backward()
    assert [tensor.grad is None for tensor in tensors] == [False, True, True]
    assert not result.ratio.requires_grad


@every_surrogate
def test_extreme_log_ratios_stay_finite_in_float32(name: str) -> None:
    """exp(200) overflows float32; the clamp keeps values and gradients finite."""
    logprobs = torch.tensor([0.0, -200.0, 0.0, -200.0, 0.0, -200.0], requires_grad=True)
    behaviour = torch.tensor([-200.0, 0.0] * 3)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 0.0])
    sequences = Sequences(ids=torch.arange(6), size=6)
    result = surrogates.get(name)(logprobs, behaviour, advantages, sequences, **OPTIONS[name])
    result.loss.sum().backward()
    assert result.loss.isfinite().all()
    assert result.ratio.isfinite().all()
    assert logprobs.grad.isfinite().all()


OUT_OF_RANGE = {
    "ratio_clip_min": [-0.1, 1.1],
    "ratio_clip_max": [-0.1],
    "ratio_clip_c": [1.0],
    "log_ratio_clamp": [0.0],
}
OUT_OF_RANGE |= {"sapo_tau_positive": [0.0], "sapo_tau_negative": [-1.0]}


@every_surrogate
def test_options_out_of_range_are_errors(name: str) -> None:
    tensors = [torch.zeros(1) for _ in range(3)]
    for option in surrogates.options(name):
        for value in (*OUT_OF_RANGE[option], math.nan):
            with pytest.raises(ValueError, match=option):
                surrogates.get(name)(*tensors, one_sequence(1), **{**OPTIONS[name], option: value})


@every_surrogate
def test_shapes_that_would_broadcast_are_errors(name: str) -> None:
    for position in range(4):
        shapes = [1 if index == position else 3 for index in range(4)]
        tensors = [torch.zeros(shape) for shape in shapes[:3]]
        with pytest.raises(ValueError, match="one shape"):
            surrogates.get(name)(*tensors, one_sequence(shapes[3]), **OPTIONS[name])


def test_the_names_and_their_options() -> None:
    given = {"log_ratio_clamp"}  # the section has it, and fills it in
    assert {name: {*surrogates.options(name)} for name in builtin_names(registry.surrogates)} == {
        name: {*options} - given for name, options in OPTIONS.items()
    }
    with pytest.raises(ValueError, match=r"unknown surrogate 'pqo' \(did you mean 'ppo'\?\); known: cispo, gspo, "):
        surrogates.get("pqo")
