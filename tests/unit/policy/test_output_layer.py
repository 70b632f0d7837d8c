# SPDX-License-Identifier: Apache-2.0
"""Claim: to the rest of megatron-core, the log-probability layer is the output layer whose place it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_g2rpo.policy import device
from megatron_g2rpo.policy.logprobs import linear_logprobs
from megatron_g2rpo.policy.output_layer import LogprobOutputLayer

DEVICE = device.select("cpu")
VOCAB, PADDED, HIDDEN = 11, 12, 8


def group() -> dist.ProcessGroup:
    device.init_process_group(DEVICE)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def output_layer(*, tied: bool = False, **settings: Any) -> ColumnParallelLinear:
    config = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1, use_cpu_initialization=True)
    for name, value in settings.items():
        setattr(config, name, value)
    with DEVICE.megatron():
        return ColumnParallelLinear(
            HIDDEN,
            PADDED,
            config=config,
            init_method=nn.init.normal_,
            bias=settings.get("add_bias_linear", False),
            skip_weight_param_allocation=tied,
            tp_group=group(),
        )


def adopt(layer: ColumnParallelLinear, chunk_size: int | None = None) -> LogprobOutputLayer:
    with DEVICE.megatron():
        return LogprobOutputLayer.adopt(layer, vocab_size=VOCAB, chunk_size=chunk_size, tp_group=group())


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 1, HIDDEN, generator=generator), torch.randint(VOCAB, (5,), generator=generator)


def test_the_parameter_and_its_marks_are_taken_over() -> None:
    given = output_layer()
    given.weight.shared_embedding = True
    layer = adopt(given)
    assert dict(layer.named_parameters()) == {"weight": given.weight}
    assert layer.weight is given.weight
    assert layer.weight.shared_embedding
    assert layer.weight.tensor_model_parallel
    assert isinstance(layer, ColumnParallelLinear)


@pytest.mark.parametrize("tied", [False, True])
def test_names_in_checkpoints_stay(tied: bool) -> None:
    given = output_layer(tied=tied)
    layer = adopt(given)
    assert list(layer.state_dict()) == list(given.state_dict())
    with DEVICE.megatron():
        ours, theirs = (
            one.sharded_state_dict(prefix="output_layer.", metadata={"dp_cp_group": group()}) for one in (layer, given)
        )
    assert list(ours) == list(theirs)
    if not tied:
        names = ("key", "local_shape", "global_shape", "global_offset", "axis_fragmentations", "replica_id")
        for name in names:
            assert getattr(ours["output_layer.weight"], name) == getattr(theirs["output_layer.weight"], name), name
        assert ours["output_layer.weight"].data.data_ptr() == given.weight.data_ptr()


@pytest.mark.parametrize("tied", [False, True])
def test_it_computes_log_probabilities(tied: bool) -> None:
    layer = adopt(output_layer(tied=tied), chunk_size=2)
    matrix = nn.Parameter(torch.randn(PADDED, HIDDEN)) if tied else layer.weight
    hidden, labels = inputs()
    with DEVICE.megatron():
        output = layer(hidden.requires_grad_(), labels, weight=matrix if tied else None, temperature=0.7)
    output.sum().backward()
    ours = (output, hidden.grad, matrix.grad)
    hidden.grad, matrix.grad = None, None
    expected = linear_logprobs(hidden[:, 0], matrix, labels, vocab_size=VOCAB, temperature=0.7, chunk_size=2)
    expected.sum().backward()
    for actual, wanted in zip(ours, (expected, hidden.grad, matrix.grad), strict=True):
        assert actual is not None
        assert torch.equal(actual, wanted)


def test_vocabulary_temperature_and_chunk_size_reach_the_kernel() -> None:
    """Negative: were one of them lost, the comparison above could be of two equal mistakes."""
    layer = adopt(output_layer(), chunk_size=0)
    hidden, labels = inputs()
    with DEVICE.megatron():
        with pytest.raises(ValueError, match="chunk_size must be at least 1"):
            layer(hidden, labels)
        layer.chunk_size = None
        with pytest.raises(ValueError, match="temperature must be > 0"):
            layer(hidden, labels, temperature=-1.0)
        with pytest.raises(ValueError, match=f"label {VOCAB} is not in a vocabulary of {VOCAB}"):
            layer(hidden, torch.full_like(labels, VOCAB))


def test_what_is_refused() -> None:
    hidden, labels = inputs()
    tied = adopt(output_layer(tied=True))
    with DEVICE.megatron():
        with pytest.raises(ValueError, match="pass the embedding's as `weight`"):
            tied(hidden, labels)
        with pytest.raises(ValueError, match=r"the output matrix is \(11, 8\), not \(12, 8\)"):
            tied(hidden, labels, weight=torch.randn(VOCAB, HIDDEN))
    with pytest.raises(ValueError, match="bias"):
        adopt(output_layer(add_bias_linear=True))
    with pytest.raises(ValueError, match="defer_embedding_wgrad_compute"):
        adopt(output_layer(defer_embedding_wgrad_compute=True))
