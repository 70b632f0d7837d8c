# SPDX-License-Identifier: Apache-2.0
"""Claim: the kernel is the output projection, log_softmax, gather and entropy: values, gradients, a chunk of memory.

The oracle is autograd through torch's log_softmax over whole logits in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_g2rpo.policy import logprobs
from megatron_g2rpo.policy.logprobs import linear_logprobs
from megatron_g2rpo.types import NO_LABEL

VOCAB, PADDED, HIDDEN = 50, 53, 6
# float32 sums over 50 entries, against float64; relative to the largest entry of a tensor.
TOLERANCE = 2e-6
CHUNKS = [1, 7, None, 100]


def case(tokens: int = 9, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, matrix with random padding rows, labels with one missing, incoming gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(VOCAB, (tokens,), generator=generator)
    labels[3] = NO_LABEL
    return hidden, weight, labels, torch.randn(2, tokens, generator=generator)


def oracle(hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int = VOCAB, temperature: float = 1.0) -> Tensor:
    log_p = ((hidden @ weight.t())[:, :vocab] / temperature).log_softmax(-1)
    has_label = labels != NO_LABEL
    logprob = log_p.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.stack([torch.where(has_label, logprob, 0.0), torch.where(has_label, entropy, 0.0)])


def with_gradients(
    compute: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, grad: Tensor
) -> dict[str, Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    output = compute(hidden, weight)
    output.backward(grad.to(output.dtype))
    assert hidden.grad is not None
    assert weight.grad is not None
    return {"output": output.detach(), "hidden": hidden.grad, "weight": weight.grad}


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_values_and_gradients(chunk: int | None, temperature: float) -> None:
    hidden, weight, labels, grad = case()
    ours = with_gradients(
        lambda h, w: linear_logprobs(h, w, labels, vocab_size=VOCAB, temperature=temperature, chunk_size=chunk),
        hidden,
        weight,
        grad,
    )
    exact = with_gradients(
        lambda h, w: oracle(h, w, labels, temperature=temperature), hidden.double(), weight.double(), grad
    )
    assert {name: tensor.dtype for name, tensor in ours.items()} == dict.fromkeys(ours, torch.float32)
    for name, expected in exact.items():
        assert error(ours[name], expected) < TOLERANCE, name


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_gradient_is_the_derivative(chunk: int | None) -> None:
    """Numerical derivatives in float64, of a small case: two evaluations for each number."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 2, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(8, 2, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, NO_LABEL, 6, 3])
    assert gradcheck(
        lambda h, w: linear_logprobs(h, w, labels, vocab_size=7, temperature=0.7, chunk_size=chunk), (hidden, weight)
    )


@pytest.mark.parametrize("chunk", CHUNKS)
def test_bfloat16_is_as_exact_as_autograd_over_whole_logits(chunk: int | None) -> None:
    """Both round the logits and their gradient to bfloat16, and neither rounds anything else but the results.

    The norm of the error may be a quarter larger than the plain way's: rounding errors of the same size, but not the
    same. (Sums over many chunks in bfloat16 make it twice as large.)
    """
    hidden, weight, labels, grad = case(tokens=40, dtype=torch.bfloat16)
    exact = with_gradients(lambda h, w: oracle(h, w, labels), hidden.double(), weight.double(), grad)
    plain = with_gradients(lambda h, w: oracle((h @ w.t()).float(), torch.eye(PADDED), labels), hidden, weight, grad)
    ours = with_gradients(
        lambda h, w: linear_logprobs(h, w, labels, vocab_size=VOCAB, chunk_size=chunk), hidden, weight, grad
    )
    assert ours["output"].dtype == torch.float32
    assert ours["hidden"].dtype == ours["weight"].dtype == torch.bfloat16
    for name, expected in exact.items():
        assert (ours[name] - expected).norm() < 1.25 * (plain[name] - expected).norm(), name


def test_padding_columns_take_no_probability_and_get_no_gradient() -> None:
    hidden, weight, labels, grad = case()
    ours = with_gradients(lambda h, w: linear_logprobs(h, w, labels, vocab_size=VOCAB), hidden, weight, grad)
    assert not ours["weight"][VOCAB:].any()
    assert ours["weight"][:VOCAB].any()
    # Negative: with the padding taken for vocabulary, the result must differ, or this test could not see it.
    wrong = linear_logprobs(hidden, weight, labels, vocab_size=PADDED)
    assert (wrong - ours["output"]).abs().max() > 1e-3


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_excluded_tokens_take_no_probability_and_get_no_gradient(chunk: int | None, temperature: float) -> None:
    """The distribution over the others: the oracle leaves their columns out."""
    hidden, weight, labels, grad = case()
    banned_token_ids = torch.tensor([0, 7, 31, VOCAB - 1])
    others = torch.tensor([token for token in range(VOCAB) if token not in banned_token_ids])
    has_label = labels != NO_LABEL
    labels[has_label] = others[labels[has_label] % len(others)]
    places = torch.searchsorted(others, labels.clamp(min=0)).where(has_label, NO_LABEL)

    def left_out(h: Tensor, w: Tensor) -> Tensor:
        return oracle(h, w[others], places, vocab=len(others), temperature=temperature)

    def ours(h: Tensor, w: Tensor, banned_token_ids: Tensor | None = banned_token_ids) -> Tensor:
        keywords = {"temperature": temperature, "chunk_size": chunk}
        return linear_logprobs(h, w, labels, vocab_size=VOCAB, banned_token_ids=banned_token_ids, **keywords)

    actual = with_gradients(ours, hidden, weight, grad)
    exact = with_gradients(left_out, hidden.double(), weight.double(), grad)
    for name, expected in exact.items():
        assert error(actual[name], expected) < TOLERANCE, name
    assert not actual["weight"][banned_token_ids].any()
    # Negative: a kernel that forgot them could not pass.
    assert (ours(hidden, weight, None) - actual["output"]).abs().max() > 1e-2
    labels[0] = 7
    with pytest.raises(ValueError, match="label 7 is one of the tokens that the policy never samples"):
        ours(hidden, weight)


@pytest.mark.parametrize("chunk", [1, None])
def test_extreme_logits(chunk: int | None) -> None:
    """Logits of +-1e4: a certain token, an impossible one, and two tokens that share everything, apart by 1.

    log(e / (1 + e)) = -0.3133 must survive beside 1e4, whose float32 neighbours are 1e-3 apart.
    """
    weight = torch.tensor([[-1e4, 0.0], [1e4, 0.0], [1e4, 1.0], [-1e4, 0.0], [0.0, 0.0]], requires_grad=True)
    hidden = torch.tensor([[1.0, -1e4], [1.0, -1e4], [1.0, 1.0], [-1.0, 0.0]], requires_grad=True)
    output = linear_logprobs(hidden, weight, torch.tensor([1, 0, 2, 1]), vocab_size=5, chunk_size=chunk)
    output.backward(torch.ones(2, 4))
    share = torch.tensor([1 / (1 + math.e), math.e / (1 + math.e)], dtype=torch.float64)
    logprob = torch.tensor([0.0, -2e4, math.log(share[1]), -2e4 - math.log(2)])
    torch.testing.assert_close(output[0], logprob, atol=1e-6, rtol=1e-7)
    expected = torch.tensor([0.0, 0.0, -(share * share.log()).sum(), math.log(2)]).double()
    torch.testing.assert_close(output[1].double(), expected, atol=1e-6, rtol=1e-6)
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    # Token 2: d logprob / dz = onehot - p and d entropy / dz = -p (log p + H), over columns 1 and 2.
    log_odds = -share * (share.log() + expected[2])
    grad_logits = torch.tensor([0.0, 1.0]) - share + log_odds
    assert hidden.grad[2, 1].item() == pytest.approx(grad_logits[1].item(), rel=1e-5)


@pytest.mark.parametrize("chunk", [2, None])
def test_without_labels(chunk: int | None) -> None:
    """Zeros that are still part of the graph: the collectives of a backward pass must run on every rank."""
    hidden, weight, labels, grad = case()
    for tokens in (len(hidden), 0):
        ours = with_gradients(
            lambda h, w, tokens=tokens: linear_logprobs(
                h, w, torch.full_like(labels[:tokens], NO_LABEL), vocab_size=VOCAB, chunk_size=chunk
            ),
            hidden[:tokens],
            weight,
            grad[:, :tokens],
        )
        assert ours["output"].shape == (2, tokens)
        assert not any(tensor.any() for tensor in ours.values())


def test_tokens_without_label_have_no_influence() -> None:
    """Their values and incoming gradients may be anything, not a number included."""
    hidden, weight, labels, grad = case()
    labels[5:] = NO_LABEL
    labelled = labels != NO_LABEL
    hidden[~labelled], grad[:, ~labelled] = torch.nan, torch.nan
    ours = with_gradients(lambda h, w: linear_logprobs(h, w, labels, vocab_size=VOCAB), hidden, weight, grad)
    alone = with_gradients(
        lambda h, w: linear_logprobs(h, w, labels[labelled], vocab_size=VOCAB),
        hidden[labelled],
        weight,
        grad[:, labelled],
    )
    assert not ours["output"][:, ~labelled].any()
    assert not ours["hidden"][~labelled].any()
    torch.testing.assert_close(ours["output"][:, labelled], alone["output"], rtol=0, atol=0)
    torch.testing.assert_close(ours["hidden"][labelled], alone["hidden"], rtol=0, atol=0)
    torch.testing.assert_close(ours["weight"], alone["weight"], rtol=0, atol=0)


class Products(TorchDispatchMode):
    """Counts multiplications in matrix products, inside of autograd functions too."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("needs_hidden", "needs_weight", "unlabelled", "chunk", "expected"),
    [
        # The logits of 16 tokens, those of 16 - 7 again, two gradients: 8 tokens at once are 7 kept and 1 computed.
        (True, True, 0, 8, 16 + 9 + 2 * 16),
        (True, False, 0, 8, 16 + 9 + 16),
        (False, True, 0, 8, 16 + 9 + 16),
        (False, False, 0, 8, 16),
        (True, True, 6, 8, 10 + 3 + 2 * 10),
        (True, True, 16, 8, 0),
        (True, True, 0, 1, 16 + 16 + 2 * 16),
        (True, True, 0, 18, 16 + 2 * 16),
        (True, True, 0, None, 16 + 2 * 16),
    ],
)
def test_only_what_is_needed_is_computed(
    needs_hidden: bool, needs_weight: bool, unlabelled: int, chunk: int | None, expected: int
) -> None:
    """Tokens that go through a matrix product."""
    hidden, weight, labels, _ = case(tokens=16)
    labels = torch.where(torch.arange(16) < unlabelled, NO_LABEL, labels.clamp(min=0))
    hidden.requires_grad_(needs_hidden)
    weight.requires_grad_(needs_weight)
    with Products() as products:
        output = linear_logprobs(hidden, weight, labels, vocab_size=VOCAB, chunk_size=chunk)
        if needs_hidden or needs_weight:
            output.sum().backward()
    assert output.requires_grad == (needs_hidden or needs_weight)
    assert (hidden.grad is not None, weight.grad is not None) == (needs_hidden, needs_weight)
    assert products.count == expected * VOCAB * HIDDEN


def test_frozen_sides_do_not_change_the_other_gradient() -> None:
    hidden, weight, labels, grad = case()
    both = with_gradients(
        lambda h, w: linear_logprobs(h, w, labels, vocab_size=VOCAB, chunk_size=4), hidden, weight, grad
    )
    for name, moving in (("hidden", hidden), ("weight", weight)):
        moving.requires_grad_()
        linear_logprobs(hidden, weight, labels, vocab_size=VOCAB, chunk_size=4).backward(grad)
        moving.requires_grad_(False)
        assert moving.grad is not None
        assert torch.equal(moving.grad, both[name])
    assert (hidden.grad is None, weight.grad is None) == (False, False)


def test_nothing_that_is_passed_in_is_changed() -> None:
    """And a graph that is kept gives the same gradient again."""
    hidden, weight, labels, grad = case()
    passed = (hidden, weight, labels, grad)
    before = [tensor.clone() for tensor in passed]
    hidden.requires_grad_()
    weight.requires_grad_()
    output = linear_logprobs(hidden, weight, labels, vocab_size=VOCAB, temperature=0.7, chunk_size=4)
    value = output.detach().clone()
    first = torch.autograd.grad(output, (hidden, weight), grad, retain_graph=True)
    kept = [tensor.clone() for tensor in first]
    second = torch.autograd.grad(output, (hidden, weight), grad)
    for tensor, copy in zip((*passed, output, *first, *second), (*before, value, *kept, *kept), strict=True):
        assert torch.equal(tensor.detach(), copy)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes that torch's allocator held at once, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()  # held, so that what it allocated is not freed inside
    assert profiler.profiler is not None
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    del result
    held = peak = 0
    for _, change in sorted(events):
        held += change
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(("dtype", "chunks_held"), [(torch.float32, 1.0), (torch.bfloat16, 1.5)])
@pytest.mark.parametrize("chunk", [8, 16, 32, None])
def test_memory_is_that_of_a_chunk_in_both_passes(
    dtype: torch.dtype, chunks_held: float, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 the products come out in that dtype: half as much again.

    What comes on top is rows, columns, a tile, and (in bfloat16) 100 KiB of workspace of the matrix products.
    """
    monkeypatch.setattr(logprobs, "TILE_BYTES", 1)  # a tile of its usual size would hold all of this case
    tokens, vocab, h = 64, 8192, 2
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, h, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, h, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (tokens,), generator=generator)
    held = 4 * vocab * (chunk or tokens * 5 // 4)
    rest = 144 * 1024 + weight.numel() * weight.itemsize

    def forward() -> Tensor:
        return linear_logprobs(hidden, weight, labels, vocab_size=vocab, chunk_size=chunk)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward().sum(), (hidden, weight))

    assert held * 3 / 4 < peak_bytes(forward) < chunks_held * held + rest
    assert held < peak_bytes(both) < chunks_held * held + rest
    with torch.no_grad():
        assert peak_bytes(forward) < chunks_held * (chunk or tokens) * 4 * vocab + rest


def test_a_uniform_distribution() -> None:
    output = linear_logprobs(torch.zeros(3, 4), torch.randn(VOCAB, 4), torch.arange(3), vocab_size=VOCAB)
    expected = torch.tensor([-math.log(VOCAB), math.log(VOCAB)])[:, None].expand(2, 3)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"labels": torch.tensor([0, 50])}, "label 50 is not in a vocabulary of 50"),
        ({"labels": torch.tensor([0, -1])}, "label -1 is not in a vocabulary of 50"),
        ({"vocab_size": 54}, "1 ranks with 53 rows of the output matrix are less than 54 tokens"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"labels": torch.tensor([0, 1]), "vocab_size": VOCAB, **change}
    with pytest.raises(ValueError) as raised:
        linear_logprobs(torch.zeros(2, 4), torch.zeros(PADDED, 4), **arguments)
    assert str(raised.value) == message


# Tokens that filters kept when the label was sampled.


def kept_by_token(labels: Tensor) -> Tensor:
    """Four ids a token, its label and three others, and a fifth, -1, which stands for none: int64 ``[5, S]``."""
    generator = torch.Generator().manual_seed(1)
    others = torch.stack([torch.randperm(VOCAB, generator=generator)[:8] for _ in labels])
    rows = [
        [int(label), *(i for i in row.tolist() if i != label)][:4] for label, row in zip(labels, others, strict=True)
    ]
    return torch.tensor([[*row[1:], -1, row[0]] for row in rows]).t()


def kept_oracle(hidden: Tensor, weight: Tensor, labels: Tensor, kept: Tensor, temperature: float) -> Tensor:
    """Token by token, over the logits of its kept ids alone."""
    columns = []
    for h, label, ids in zip(hidden, labels.tolist(), kept.t(), strict=True):
        ids = ids[ids >= 0]
        if label == NO_LABEL:
            columns.append(hidden.new_zeros(2) + 0.0 * h.sum())
            continue
        log_p = (weight[ids] @ h / temperature).log_softmax(-1)
        columns.append(torch.stack([log_p[ids.tolist().index(label)], -(log_p.exp() * log_p).sum()]))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_distribution_is_that_of_the_kept_tokens(chunk: int | None, temperature: float) -> None:
    """Log-probabilities, entropies and both gradients."""
    hidden, weight, labels, grad = case()
    kept = kept_by_token(labels.clamp(min=0))
    keywords = {"vocab_size": VOCAB, "temperature": temperature, "chunk_size": chunk}
    actual = with_gradients(lambda h, w: linear_logprobs(h, w, labels, kept_ids=kept, **keywords), hidden, weight, grad)
    exact = with_gradients(
        lambda h, w: kept_oracle(h, w, labels, kept, temperature), hidden.double(), weight.double(), grad
    )
    for name, expected in exact.items():
        assert error(actual[name], expected) < TOLERANCE, name
    # Negative: over the whole vocabulary it is another distribution.
    whole = linear_logprobs(hidden, weight, labels, **keywords)
    assert (whole - actual["output"]).abs().max() > 0.1


def test_keeping_all_tokens_changes_no_bit() -> None:
    hidden, weight, labels, grad = case()
    everything = torch.arange(VOCAB)[:, None].expand(-1, len(labels))
    results = [
        with_gradients(
            lambda h, w, kept=kept: linear_logprobs(h, w, labels, vocab_size=VOCAB, chunk_size=3, kept_ids=kept),
            hidden,
            weight,
            grad,
        )
        for kept in (None, everything)
    ]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_label_that_was_not_kept_is_refused() -> None:
    hidden, weight, labels, _ = case()
    kept = kept_by_token(labels.clamp(min=0))
    kept[kept == labels[5]] = -1
    with pytest.raises(ValueError, match=f"label {int(labels[5])} is not among the tokens that it was sampled from"):
        linear_logprobs(hidden, weight, labels, vocab_size=VOCAB, kept_ids=kept)
