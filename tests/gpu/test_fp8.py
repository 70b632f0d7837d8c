# SPDX-License-Identifier: Apache-2.0
"""FP8 recipes of the policy on Transformer Engine's layers, against ``fp8_reference``.

Two computations of the same FP8 pass part: where their float32 values fall on either side of the middle between two FP8
numbers, an element differs by one part in 16, and everything after it by a little, so that more elements do. Hence two
comparisons. Every product of the whole model is repeated from the operands that it had, which is tight. The pass as a
whole is compared with one by transformers, in which errors have added up: what is asserted is how much nearer ours is
to the quantised reference than to the unquantised one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_g2rpo.data.packing import response_values
from megatron_g2rpo.policy import megatron
from megatron_g2rpo.policy.device import Device, init_process_group, select
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.policy.reference_policy import ReferencePolicy
from megatron_g2rpo.types import PackedBatch
from tests.common.compare import Report, relative_distance, total_distance
from tests.common.parity import TEMPERATURE, Values, packer_for, toy_loss
from tests.common.tiny_model import random_inputs
from tests.gpu.devices import needs_cuda, needs_transformer_engine, needs_virtual
from tests.gpu.fp8_policy import (
    SHAPE,
    fp8_policy,
    gradients,
    model_directory,
    reference_model,
    reference_pass,
    rows,
    scales,
    sequences,
    te_linears,
)
from tests.gpu.fp8_reference import Fp8, QuantisedLinear

pytestmark = [needs_cuda, needs_transformer_engine]

E5M2 = torch.float8_e5m2
RECIPES = [
    pytest.param("delayed", "hybrid", id="delayed-hybrid"),
    pytest.param("tensorwise", "e4m3", id="tensorwise-e4m3"),
    pytest.param("tensorwise", "hybrid", id="tensorwise-hybrid"),
    pytest.param("blockwise", "e4m3", id="blockwise-e4m3"),
]


@pytest.fixture(scope="module")
def device() -> Device:
    device = select("gpu")
    init_process_group(device)
    return device


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fp8")
    model_directory(directory)
    return directory


def fp8_of(recipe: str, format: str) -> Fp8:
    return Fp8(recipe, E5M2) if format == "hybrid" else Fp8(recipe)


# -- every product of the model -----------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What one linear multiplied in one micro-batch: its input ``[S, 1, h]``, output and their gradients."""

    input: Tensor
    output: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def _operands(policy: MegatronPolicy) -> Iterator[dict[str, list[_Seen]]]:
    """Record what every linear multiplies, by the linear's name, micro-batch by micro-batch."""
    seen: dict[str, list[_Seen]] = {name: [] for name in te_linears(policy)}

    def before(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].view_as(args[0]), *args[1:])  # its gradient is this linear's alone, without the residual's

    def after(name: str, args: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
        record = _Seen(args[0].detach().cpu(), output[0].detach().cpu())
        seen[name].append(record)
        for key, tensor in (("input", args[0]), ("output", output[0])):
            tensor.register_hook(lambda gradient, key=key: record.gradients.__setitem__(key, gradient.cpu()))

    handles = []
    for name, module in te_linears(policy).items():
        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(lambda _, args, output, name=name: after(name, args, output)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _repeated(linear: QuantisedLinear, module: Any, seen: _Seen, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, input gradient and weight gradient of one linear, computed again from its operands."""
    x = seen.input.flatten(0, 1).requires_grad_()
    weight = module.weight.detach().cpu().requires_grad_()
    gamma = getattr(module, "layer_norm_weight", None)
    normalised = x
    if gamma is not None:
        normalised = x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * gamma.detach().cpu()
    y = linear(normalised, weight)
    linear.move("input", "weight")
    dx, dw = torch.autograd.grad(y, (x, weight), seen.gradients["output"].flatten(0, 1))
    linear.move("gradient")
    return y.detach(), dx, dw


# An FP8 product differs from another of the same operands by the order of float32 sums, 1e-6, and by the elements that
# a last bit of the norm, or of a scale, rounds the other way: one of 1e4 is 1e-2 x 1/16. Unquantised, it is 2e-2 away.
PRODUCT = {"output": 1e-3, "input_gradient": 1e-3, "weight_gradient": 1e-3, "scale": 1e-5}


def _compare_products(policy: MegatronPolicy, fp8: Fp8 | None, batches: list[PackedBatch], steps: int) -> Report:
    """Compare every product of some optimizer steps with the recipe's; ``None`` for unquantised products."""
    report = Report(PRODUCT)
    linears = {name: QuantisedLinear(fp8 or Fp8("tensorwise")) for name in te_linears(policy)}
    for step in range(steps):
        with _operands(policy) as seen:
            tokens = policy.gradients(batches, toy_loss, TEMPERATURE)["num_tokens"]
        for name, module in te_linears(policy).items():
            linear, total = linears[name], torch.zeros(())
            linear.forget_weight()
            assert len(seen[name]) == len(batches), name
            for index, record in enumerate(seen[name]):
                where = f"{name}, step {step}, micro-batch {index}"
                with nullcontext() if fp8 is not None else patch.object(QuantisedLinear, "operand", _unquantised):
                    y, dx, dw = _repeated(linear, module, record, policy.config.layernorm_epsilon)
                report.note("output", relative_distance(record.output.flatten(0, 1), y), where)
                ours = record.gradients["input"].flatten(0, 1)
                report.note("input_gradient", relative_distance(ours, dx), where)
                total = total + dw
            ours = module.weight.main_grad.cpu() * tokens
            report.note("weight_gradient", relative_distance(ours, total), f"{name}, step {step}")
        if policy.config.fp8_recipe == "delayed":
            for name, values in scales(policy).items():
                expected = [float(linears[name].scales[operand]) for operand in ("input", "weight", "gradient")]
                for value, scale in zip(values, expected, strict=True):
                    report.note("scale", abs(value / scale - 1), f"{name}, step {step}")
        policy.update(batches, toy_loss, TEMPERATURE) if step + 1 < steps else None
    if policy.config.fp8_recipe != "delayed":
        report.note("scale", 0.0, "no recipe but delayed keeps scales")
    return report


def _unquantised(linear: QuantisedLinear, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x


@pytest.mark.parametrize(("recipe", "format"), RECIPES)
def test_every_product_is_that_of_the_recipe(recipe: str, format: str, device: Device, directory: Path) -> None:
    policy = fp8_policy(directory, device, recipe, format)
    batches = rows(policy, sequences(policy.hf_config))
    assert len(batches) > 1  # cached weights, and scales that move between micro-batches
    _compare_products(policy, fp8_of(recipe, format), batches, steps=1).assert_within_tolerance()


@pytest.mark.parametrize(("recipe", "format"), RECIPES)
def test_products_of_no_recipe_are_told_apart(recipe: str, format: str, device: Device, directory: Path) -> None:
    policy = fp8_policy(directory, device, recipe, format)
    batches = rows(policy, sequences(policy.hf_config))
    report = _compare_products(policy, None, batches, steps=1)
    report.assert_exceeded("output", "input_gradient", "weight_gradient", margin=10)


def test_products_of_another_format_are_told_apart(device: Device, directory: Path) -> None:
    policy = fp8_policy(directory, device, "tensorwise", "e4m3")
    batches = rows(policy, sequences(policy.hf_config))
    report = _compare_products(policy, fp8_of("tensorwise", "hybrid"), batches, steps=1)
    report.assert_exceeded("input_gradient", "weight_gradient", margin=10)


# -- the whole model ----------------------------------------------------------------------------------------------


def _share(ours: dict[str, Tensor], quantised: Values, exact: Values) -> float:
    """Return how far gradients are from the quantised reference's, by how far they are from the unquantised one's."""
    return total_distance(ours, quantised.gradients) / total_distance(ours, exact.gradients)


def _responses(batches: list[PackedBatch], policy: MegatronPolicy) -> Tensor:
    values = policy.logprobs(batches, TEMPERATURE)
    found = {}
    for batch, value in zip(batches, values, strict=True):
        found.update(response_values(batch, value.logprobs))
    return torch.cat([found[index] for index in sorted(found)])


@pytest.mark.parametrize(("recipe", "format"), RECIPES)
def test_the_whole_pass_is_near_the_quantised_reference(
    recipe: str, format: str, device: Device, directory: Path
) -> None:
    policy = fp8_policy(directory, device, recipe, format)
    members = sequences(policy.hf_config)
    batches = rows(policy, members)
    reference = reference_model(directory, fp8_of(recipe, format))
    quantised = reference_pass(reference, members, batches)
    exact = reference_pass(reference_model(directory, None), members, batches)
    metrics = policy.gradients(batches, toy_loss, TEMPERATURE)
    share = _share(gradients(policy), quantised, exact)
    print(f"{recipe} {format}: share {share:.3f}, loss {metrics['loss']:.5f} {quantised.loss:.5f} {exact.loss:.5f}")
    assert share < 0.7
    assert abs(metrics["loss"] - quantised.loss) < 0.02 * abs(exact.loss)
