# SPDX-License-Identifier: Apache-2.0
"""One rank of test_logprobs_kernel.py: compares its share of the vocabulary with the whole in one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_g2rpo.policy import device
from megatron_g2rpo.policy.logprobs import linear_logprobs
from megatron_g2rpo.policy.output_layer import LogprobOutputLayer
from megatron_g2rpo.types import NO_LABEL
from tests.common.compare import Report, largest_difference
from tests.common.hardware import this_device
from tests.common.launch import report_result

PADDED, HIDDEN, TOKENS, TEMPERATURE = 54, 6, 8, 0.5
# float32 sums in another order, relative to the largest entry; of each of the three, in the kernel and in the layer.
TOLERANCES = {f"{where} {what}": 2e-6 for where in ("kernel", "layer") for what in ("output", "hidden", "weight")}

Results = dict[str, Tensor]


def case(vocab: int, scale: float, labelled: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same on every rank: hidden states, whole padded matrix, labels, incoming gradient.

    Hidden states and matrix are whole numbers over 4, so that every product gives the same logits, to the bit: the last
    bit of a logit of 1e4 is 1e-3 of its probability.
    """
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).mul(4).round() / 4
    weight = torch.randn(PADDED, HIDDEN, generator=generator).mul(4).round() / 4 * scale
    labels = torch.randint(vocab, (TOKENS,), generator=generator)
    labels[3] = NO_LABEL
    if not labelled:
        labels[:] = NO_LABEL
    return hidden, weight, labels, torch.randn(2, TOKENS, generator=generator)


def with_gradients(
    compute: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, grad: Tensor
) -> Results:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    output = compute(hidden, weight)
    output.backward(grad)
    assert hidden.grad is not None
    assert weight.grad is not None
    return {"output": output.detach(), "hidden": hidden.grad, "weight": weight.grad}


def whole(
    hidden: Tensor, weight: Tensor, labels: Tensor, grad: Tensor, vocab: int, **excluded: Tensor | None
) -> Results:
    keywords = {"vocab_size": vocab, "temperature": TEMPERATURE, **excluded}
    return with_gradients(lambda h, w: linear_logprobs(h, w, labels, **keywords), hidden, weight, grad)


def my_rows(weight: Tensor, rank: int) -> Tensor:
    return weight.chunk(2)[rank]


def note(report: Report, kind: str, actual: Tensor, expected: Tensor, where: str) -> None:
    difference, largest = largest_difference(actual, expected), float(expected.abs().max())
    if largest == 0:  # without labels: nothing but zeros will do
        report.note(kind, math.inf if difference else 0.0, where)
    else:
        report.note(kind, difference / largest, where)


def assert_same_on_both_ranks(tensor: Tensor, name: str) -> None:
    other = tensor.clone()
    dist.broadcast(other, 0)
    assert torch.equal(tensor, other), f"{name} differs between the ranks"


def check_kernel(
    report: Report,
    group: dist.ProcessGroup,
    place: torch.device,
    vocab: int,
    scale: float,
    labelled: bool,
    chunk: int | None,
    first_kept: int = 0,
    kept: int | None = None,
) -> None:
    """Tokens before ``first_kept`` are banned; labels are sampled from the ``kept`` tokens from theirs on, or all."""
    rank = dist.get_rank(group)
    name = f"vocabulary {vocab}, from token {first_kept}, scale {scale}, labelled {labelled}, chunk {chunk}"
    hidden, weight, labels, grad = case(vocab, scale, labelled)
    labels = labels.clamp(min=first_kept).where(labels != NO_LABEL, NO_LABEL)
    excluded = {"banned_token_ids": torch.arange(first_kept), "kept_ids": None}
    if kept is not None:
        # Some lie on one rank, some on both, and -1 stands for those beyond the vocabulary.
        ids = labels.clamp(min=0) + torch.arange(kept)[:, None]
        excluded["kept_ids"] = torch.where(ids < vocab, ids, -1)
        name += f", {kept} kept"
    expected = whole(hidden, weight, labels, grad, vocab, **excluded)
    # What is compared with is computed on the CPU.
    hidden, weight, labels, grad = (tensor.to(place) for tensor in (hidden, weight, labels, grad))
    excluded = {key: None if ids is None else ids.to(place) for key, ids in excluded.items()}
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        ours = with_gradients(
            lambda h, w: linear_logprobs(
                h,
                w,
                labels,
                vocab_size=vocab,
                temperature=TEMPERATURE,
                **excluded,
                group=group,
                chunk_size=chunk,
            ),
            hidden,
            my_rows(weight, rank),
            grad,
        )
    assert all_reduce.call_count == (2 if labelled else 0), f"{name}: {all_reduce.call_count} collectives"
    dist.all_reduce(ours["hidden"], group=group)
    assert_same_on_both_ranks(ours["output"], f"{name}: output")
    note(report, "kernel output", ours["output"], expected["output"], name)
    note(report, "kernel hidden", ours["hidden"], expected["hidden"], name)
    note(report, "kernel weight", ours["weight"], my_rows(expected["weight"], rank), name)
    assert expected["output"].any() == labelled, "the comparison needs numbers"


def check_layer(report: Report, group: dist.ProcessGroup, hardware: device.Device, sequence_parallel: bool) -> None:
    rank, vocab, name = dist.get_rank(group), 50, f"sequence parallel {sequence_parallel}"
    hidden, weight, labels, grad = case(vocab, 1.0, labelled=True)
    expected = whole(hidden, weight, labels, grad, vocab)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
    )
    mine = hidden.chunk(2)[rank] if sequence_parallel else hidden
    mine = mine[:, None].to(hardware.torch_device, copy=True).requires_grad_()
    with hardware.megatron():
        given = ColumnParallelLinear(
            HIDDEN, PADDED, config=config, init_method=nn.init.zeros_, bias=False, tp_group=group
        )
        given.to(hardware.torch_device)
        given.weight.data.copy_(my_rows(weight, rank))
        layer = LogprobOutputLayer.adopt(given, vocab_size=vocab, chunk_size=3, tp_group=group)
        output = layer(mine, labels.to(mine.device), temperature=TEMPERATURE)
        output.backward(grad.to(mine.device))
    assert mine.grad is not None
    note(report, "layer output", output.detach(), expected["output"], name)
    expected_hidden = expected["hidden"].chunk(2)[rank] if sequence_parallel else expected["hidden"]
    assert given.weight.grad is not None
    note(report, "layer hidden", mine.grad[:, 0], expected_hidden, name)
    note(report, "layer weight", given.weight.grad, my_rows(expected["weight"], rank), name)


def main() -> None:
    hardware = this_device()
    device.init_process_group(hardware)
    group = dist.group.WORLD
    assert group is not None
    report, place = Report(TOLERANCES), hardware.torch_device
    for chunk in (None, 3):
        check_kernel(report, group, place, vocab=50, scale=1.0, labelled=True, chunk=chunk)
        check_kernel(report, group, place, vocab=54, scale=1.0, labelled=True, chunk=chunk)
        # The second rank holds padding only.
        check_kernel(report, group, place, vocab=20, scale=1.0, labelled=True, chunk=chunk)
        check_kernel(report, group, place, vocab=50, scale=1.0, labelled=True, chunk=chunk, first_kept=5)
        # The first rank holds banned tokens only.
        check_kernel(report, group, place, vocab=54, scale=1.0, labelled=True, chunk=chunk, first_kept=PADDED // 2)
        check_kernel(report, group, place, vocab=50, scale=1.0, labelled=True, chunk=chunk, kept=12)
        check_kernel(report, group, place, vocab=20, scale=1.0, labelled=True, chunk=chunk, kept=2)
        check_kernel(report, group, place, vocab=50, scale=4096.0, labelled=True, chunk=chunk)
        check_kernel(report, group, place, vocab=50, scale=1.0, labelled=False, chunk=chunk)
    for sequence_parallel in (False, True):
        check_layer(report, group, hardware, sequence_parallel)
    report_result(report.worst)


if __name__ == "__main__":
    main()
