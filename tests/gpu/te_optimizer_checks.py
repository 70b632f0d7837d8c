# SPDX-License-Identifier: Apache-2.0
"""Checks of Transformer Engine's FusedAdam against torch's AdamW; each raises AssertionError where they differ."""

from __future__ import annotations

from typing import Any

import torch

from tests.gpu.te_checks import assert_near

SHAPES = ((96, 64), (64,), (3, 5, 7))
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Return parameters on the device, the same in each call."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    return [torch.nn.Parameter(each.cuda()) for each in drawn]


def step_gradients(step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the gradients of a step: some are 0, their sizes span five powers of ten."""
    generator = torch.Generator().manual_seed(100 + step)
    drawn = [torch.randn(shape, generator=generator) * 10.0 ** (i * 2 - 4) for i, shape in enumerate(SHAPES)]
    drawn[1][:4] = 0
    return [each.to(dtype).cuda() for each in drawn]


def check_adam(dtype: torch.dtype, steps: int = 5, **options: Any) -> None:
    """FusedAdam is torch's AdamW on fp32 parameters, or on the fp32 main copies of bf16 ones.

    A bf16 parameter is its main copy rounded. Differences are parts of the largest value; both work in fp32, torch
    decays a weight before the step and divides in another order: 1e-6.
    """
    from transformer_engine.pytorch.optimizers import FusedAdam

    own = parameters(dtype)
    reference = [torch.nn.Parameter(each.detach().float().cpu()) for each in own]
    fused = FusedAdam(own, master_weights=dtype != torch.float32, **OPTIONS, **options)
    adamw = torch.optim.AdamW(reference, **OPTIONS)
    for step in range(steps):
        for parameter, other, gradient in zip(own, reference, step_gradients(step, dtype), strict=True):
            parameter.grad, other.grad = gradient, gradient.float().cpu()
        fused.step()
        adamw.step()
        for i, (parameter, other) in enumerate(zip(own, reference, strict=True)):
            state, expected = fused.state[parameter], adamw.state[other]
            main = parameter if dtype == torch.float32 else state["master_param"]
            names = [f"{name} of parameter {i} in step {step}" for name in ("main", "exp_avg", "exp_avg_sq")]
            actual = (main, state["exp_avg"], state["exp_avg_sq"])
            assert_near(actual, (other, expected["exp_avg"], expected["exp_avg_sq"]), 1e-6, names)
            assert torch.equal(parameter.detach(), main.detach().to(dtype)), f"parameter {i} is not its main copy"
