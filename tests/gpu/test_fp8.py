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
from torch import Tensor

from megatron_g2rpo.policy import megatron
from megatron_g2rpo.policy.device import Device
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.policy.reference_policy import ReferencePolicy
from megatron_g2rpo.types import PackedBatch
from tests.common.compare import Report, relative_distance, total_distance
from tests.common.parity import TEMPERATURE, Values, toy_loss
from tests.gpu.devices import needs_cuda, needs_transformer_engine
from tests.gpu.fp8_policy import (
    SHAPE,
    fp8_policy,
    gradients,
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
        _, optimizer, _ = policy._training()
        optimizer.step()
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
    _compare_products(policy, fp8_of(recipe, format), batches, steps=2).assert_within_tolerance()


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


# Measured with these weights; the rest of the way, 1, is quantisation itself. Numbers of e5m2 are twice as far
# apart, and delayed scaling's first micro-batch uses scale 1, whatever the sizes of weights and gradients.
SHARES = {"delayed-hybrid": 0.7, "tensorwise-e4m3": 0.35, "tensorwise-hybrid": 0.5, "blockwise-e4m3": 0.4}


@pytest.mark.parametrize(("recipe", "format"), RECIPES)
def test_the_whole_pass_is_nearer_to_the_quantised_reference(
    recipe: str, format: str, device: Device, directory: Path
) -> None:
    policy = fp8_policy(directory, device, recipe, format)
    members = sequences(policy.hf_config)
    batches = rows(policy, members)
    quantised = reference_pass(reference_model(directory, fp8_of(recipe, format)), members, batches)
    exact = reference_pass(reference_model(directory, None), members, batches)
    metrics = policy.gradients(batches, toy_loss, TEMPERATURE)
    assert _share(gradients(policy), quantised, exact) < SHARES[f"{recipe}-{format}"]
    # A mean over 190 tokens, each off by some 1e-1 either way.
    assert abs(metrics["loss"] - quantised.loss) < 0.03 * abs(exact.loss)


def test_without_fp8_the_pass_is_the_unquantised_reference(device: Device, directory: Path) -> None:
    policy = fp8_policy(directory, device, None)
    members = sequences(policy.hf_config)
    batches = rows(policy, members)
    exact = reference_pass(reference_model(directory, None), members, batches)
    metrics = policy.gradients(batches, toy_loss, TEMPERATURE)
    assert metrics["loss"] == pytest.approx(exact.loss, rel=1e-5)  # float32
    ours = gradients(policy)
    assert max(relative_distance(ours[name], exact.gradients[name]) for name in ours) < 1e-4


# -- what stays out of FP8 ----------------------------------------------------------------------------------------


@contextmanager
def _outputs(policy: MegatronPolicy) -> Iterator[dict[str, Tensor]]:
    """Record the latest output of every module, by name."""
    found: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            found[name] = first.detach().cpu()

    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: keep(name, output))
        for name, module in policy.model.named_modules()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_only_the_linears_of_the_language_layers_are_quantised(precision: str, device: Device, directory: Path) -> None:
    found = []
    for recipe in ("tensorwise", None):
        policy = fp8_policy(directory, device, recipe, precision=precision)
        batches = rows(policy, sequences(policy.hf_config))
        with _outputs(policy) as outputs:
            policy.logprobs(batches[:1], TEMPERATURE)
        found.append(outputs)
        # Transformer Engine's attention has the switch too, but computes in FP8 only if a recipe says so (fp8_dpa).
        computing = {
            name
            for name, module in policy.model.named_modules()
            if getattr(module, "fp8", False) and hasattr(module, "weight")
        }
        expected = {
            f"language_model.decoder.layers.{layer}.{owner}.{linear}"
            for layer in range(SHAPE["layers"])
            for owner, linear in (
                ("self_attention", "linear_qkv"),
                ("self_attention", "linear_proj"),
                ("mlp", "linear_fc1"),
                ("mlp", "linear_fc2"),
            )
        }
        assert computing == (expected if recipe else set())
    quantised, plain = found
    same = {name for name in plain if torch.equal(plain[name], quantised[name])}
    outside = {name for name in plain if name.startswith(("vision_model", "language_model.embedding"))}
    assert len(outside) > 20  # the tower is there
    assert outside <= same
    assert "language_model.decoder.layers.0.self_attention.linear_qkv" not in same


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_first_layers_that_stay_out_are_exactly_unquantised(recipe: str, device: Device, directory: Path) -> None:
    found = []
    for fp8 in (recipe, None):
        policy = fp8_policy(
            directory,
            device,
            fp8,
            "e4m3",
            "megatron_cfg.first_last_layers_bf16=true",
            "megatron_cfg.num_layers_at_start_in_bf16=1",
            "megatron_cfg.num_layers_at_end_in_bf16=0",
            precision="bfloat16",
        )
        batches = rows(policy, sequences(policy.hf_config))
        with _outputs(policy) as outputs:
            policy.logprobs(batches[:1], TEMPERATURE)
        found.append(outputs)
    layers = [f"language_model.decoder.layers.{index}" for index in range(SHAPE["layers"])]
    assert [torch.equal(found[0][name], found[1][name]) for name in layers] == [True, False]


def test_a_layer_left_out_by_mistake_is_seen(device: Device, directory: Path) -> None:
    overrides = ["first_last_layers_bf16=true", "num_layers_at_start_in_bf16=0", "num_layers_at_end_in_bf16=1"]
    policy = fp8_policy(
        directory, device, "tensorwise", "e4m3", *(f"megatron_cfg.{override}" for override in overrides)
    )
    batches = rows(policy, sequences(policy.hf_config))
    report = _compare_products(policy, Fp8("tensorwise"), batches, steps=1)
    report.assert_exceeded("output", "weight_gradient", margin=10)
    assert all(failure.split()[1].startswith("1.") for failure in report.failures), report.failures


# -- delayed scales -----------------------------------------------------------------------------------------------

STEPS = 20


def _run(
    directory: Path, device: Device, recipe: str, *, passes: bool = False, steps: int = STEPS, **keys: Any
) -> tuple[list[Any], dict[str, Tensor]]:
    """Return the scales after each of some optimizer steps, and the last weights.

    Args:
        passes: compute log-probabilities between the steps as well, some of them with four times the weights.
    """
    policy = fp8_policy(directory, device, recipe, "hybrid", lr=1e-3, **keys)
    batches = rows(policy, sequences(policy.hf_config))
    other = rows(policy, sequences(policy.hf_config, seed=5))
    reference = ReferencePolicy(policy)
    reference._weights = [4 * weight for weight in reference._weights]
    found = []
    for step in range(steps):
        if passes:
            policy.logprobs(other, TEMPERATURE)
            reference.logprobs(batches, TEMPERATURE)
        policy.update(batches, toy_loss, TEMPERATURE)
        if passes and step % 3 == 0:
            reference.logprobs(other, TEMPERATURE)
        found.append(scales(policy) if recipe == "delayed" else None)
    return found, {name: tensor.cpu().clone() for name, tensor in policy.stream()}


def _equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def only_steps(device: Device, directory: Path) -> tuple[list[Any], dict[str, Tensor]]:
    return _run(directory, device, "delayed")


def test_passes_without_gradient_move_no_scale(
    only_steps: tuple[list[Any], dict[str, Tensor]], device: Device, directory: Path
) -> None:
    found, weights = _run(directory, device, "delayed", passes=True)
    assert found == only_steps[0]  # bit for bit, at every step
    assert _equal(weights, only_steps[1])
    assert found[0] != found[1] != found[2]  # they move


def test_recomputation_moves_no_scale(
    only_steps: tuple[list[Any], dict[str, Tensor]], device: Device, directory: Path
) -> None:
    found, weights = _run(directory, device, "delayed", recompute_granularity="full", recompute_num_layers=1)
    assert found == only_steps[0]
    assert _equal(weights, only_steps[1])


def test_a_pass_without_gradient_that_moves_scales_is_seen(
    only_steps: tuple[list[Any], dict[str, Tensor]], device: Device, directory: Path
) -> None:
    with patch.object(megatron, "unmoved_scales", lambda model: nullcontext()):
        found, _ = _run(directory, device, "delayed", passes=True, steps=1)
    assert found[0] != only_steps[0][0]


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_passes_between_and_recomputation_change_no_weight(recipe: str, device: Device, directory: Path) -> None:
    _, plain = _run(directory, device, recipe, steps=3)
    full = {"recompute_granularity": "full", "recompute_num_layers": 1}
    _, other = _run(directory, device, recipe, steps=3, passes=True, **full)
    assert _equal(plain, other)
