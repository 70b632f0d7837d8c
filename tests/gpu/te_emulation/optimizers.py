# SPDX-License-Identifier: Apache-2.0
"""Kernels over lists of tensors: Adam, scaling, L2 norms. Arithmetic is in fp32, results in each tensor's own type.

``tensor_lists`` holds lists of equal length: the i-th tensors of all of them belong together.
"""

from __future__ import annotations

import torch


@torch.no_grad()
def multi_tensor_scale(
    chunk_size: int, is_infinite: torch.Tensor, tensor_lists: list[list[torch.Tensor]], scale: float
) -> None:
    """Write ``source * scale`` into each target (lists: sources, targets); ``is_infinite`` is 1 after a NaN or inf."""
    for source, target in zip(*tensor_lists, strict=True):
        scaled = source.float() * scale
        if not bool(torch.isfinite(scaled).all()):
            is_infinite.fill_(1)
        target.copy_(scaled)


def multi_tensor_scale_tensor(
    chunk_size: int, is_infinite: torch.Tensor, tensor_lists: list[list[torch.Tensor]], scale: torch.Tensor
) -> None:
    """Do as ``multi_tensor_scale`` does, with the scale in a tensor [1]."""
    multi_tensor_scale(chunk_size, is_infinite, tensor_lists, float(scale))


@torch.no_grad()
def multi_tensor_l2norm(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: list[list[torch.Tensor]],
    per_tensor_python: bool | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm over all tensors, fp32 [1], and each tensor's own, [tensors], where they are asked for."""
    squares = torch.stack([tensor.float().pow(2).sum() for tensor in tensor_lists[0]])
    each = squares.sqrt() if per_tensor_python else squares.new_empty(0)
    return squares.sum().sqrt().reshape(1), each


def multi_tensor_unscale_l2norm(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: list[list[torch.Tensor]],
    inv_scale: torch.Tensor,
    per_tensor_python: bool | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norms of ``tensor * inv_scale``; the tensors stay as they are."""
    unscaled = [tensor.float() * inv_scale for tensor in tensor_lists[0]]
    return multi_tensor_l2norm(chunk_size, noop_flag, [unscaled], per_tensor_python)


@torch.no_grad()
def multi_tensor_adam(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: list[list[torch.Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Update parameters and moments in place.

    Lists: gradients, parameters, first moments, second moments and, optionally, fp32 main copies, which are then what
    is updated, and copied to the parameters. ``mode`` 1 decouples the weight decay (AdamW), 0 adds it to the gradient.
    ``step`` counts from 1.
    """
    correct1 = 1 - beta1**step if bias_correction else 1.0
    correct2 = 1 - beta2**step if bias_correction else 1.0
    mains = tensor_lists[4] if len(tensor_lists) > 4 else tensor_lists[1]
    for gradient, parameter, moment1, moment2, main in zip(*tensor_lists[:4], mains, strict=True):
        g, w = gradient.float(), main.float()
        if mode == 0:
            g = g + weight_decay * w
        m = beta1 * moment1.float() + (1 - beta1) * g
        v = beta2 * moment2.float() + (1 - beta2) * g * g
        update = (m / correct1) / ((v / correct2).sqrt() + epsilon)
        if mode != 0:
            update = update + weight_decay * w
        w = w - lr * update
        moment1.copy_(m)
        moment2.copy_(v)
        main.copy_(w)
        if main is not parameter:
            parameter.copy_(w)


@torch.no_grad()
def multi_tensor_adam_capturable(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: list[list[torch.Tensor]],
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: torch.Tensor,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    inv_scale: torch.Tensor,
) -> None:
    """Do as ``multi_tensor_adam`` does, with numbers in tensors [1]; gradients are unscaled first, in place.

    A ``noop_flag`` of 1 (a gradient was not finite) leaves everything as it is.
    """
    if int(noop_flag) == 1:
        return
    for gradient in tensor_lists[0]:
        gradient.copy_(gradient.float() * inv_scale)
    numbers = (beta1, beta2, epsilon, int(step), mode, bias_correction, weight_decay)
    multi_tensor_adam(chunk_size, noop_flag, tensor_lists, float(lr), *numbers)


multi_tensor_adam_capturable_master = multi_tensor_adam_capturable
