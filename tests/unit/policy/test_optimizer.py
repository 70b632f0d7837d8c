# SPDX-License-Identifier: Apache-2.0
"""Claims: gradients are normalised once, and their norm is computed once; the distributed optimizer's state survives a
checkpoint, for which megatron-core's own state dicts would not do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

from megatron_g2rpo.policy import optimizer as policy_optimizer
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.policy.optimizer import check_normalisation, step_by_norm
from megatron_g2rpo.policy.optimizer_shares import piece, spreads
from megatron_g2rpo.train.run.checkpoints import Checkpoints
from tests.common.parity import packer_for, random_sequences, toy_loss
from tests.common.policy_layout import layout_options
from tests.common.tiny_model import make_tiny_qwen3vl


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_tiny_qwen3vl(directory, layers=1, vision_depth=2, deepstack=(0,))
    return directory


@pytest.fixture
def make(directory: Path) -> Callable[..., MegatronPolicy]:
    return lambda **options: MegatronPolicy(layout_options(directory, **options), select("cpu"), seed=0, max_steps=10)


@pytest.fixture
def many_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients in buckets of a few parameters with padding between, as in a real model; the default is 40 M."""
    ddp_config = partial(policy_optimizer.DistributedDataParallelConfig, bucket_size=5000)
    monkeypatch.setattr(policy_optimizer, "DistributedDataParallelConfig", ddp_config)


def step(policy: MegatronPolicy) -> dict[str, float]:
    return policy.update(packer_for(policy.hf_config).pack(random_sequences(policy.hf_config), budget=80), toy_loss)


def inner(policy: MegatronPolicy) -> Any:
    """megatron-core's one optimizer, of the chain of one."""
    assert policy.optimizer is not None
    return policy.optimizer.chained_optimizers[0]


# -- normalisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["plain", "distributed-overlap-gather"])
def test_a_policy_normalises_once(make: Callable[..., MegatronPolicy], mode: str) -> None:
    policy = make(mode=mode)
    assert policy._ddp is not None
    check_normalisation(policy.config, policy._ddp)
    assert policy.config.finalize_model_grads_func is finalize_model_grads


def per_micro_batch(policy: MegatronPolicy) -> None:
    policy.config.calculate_per_token_loss = False


def averaged(policy: MegatronPolicy) -> None:
    policy._ddp.ddp_config.average_in_collective = True  # type: ignore[union-attr]


def scaled(policy: MegatronPolicy) -> None:
    policy._ddp.buffers[0].buckets[-1].gradient_scaling_factor = 0.5  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (per_micro_batch, "calculate_per_token_loss is off"),
        (averaged, "average_in_collective is on"),
        (scaled, r"scale by \[0\.5, 1\.0\]"),
    ],
)
def test_another_normalisation_is_refused(
    make: Callable[..., MegatronPolicy], change: Callable[[MegatronPolicy], None], message: str
) -> None:
    policy = make()
    change(policy)
    with pytest.raises(RuntimeError, match=message):
        check_normalisation(policy.config, policy._ddp)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["plain", "distributed"])
@pytest.mark.parametrize("in_fp32", [True, False])
def test_gradients_of_bf16_weights_are_summed_in_float32_if_asked_for(
    make: Callable[..., MegatronPolicy], directory: Path, mode: str, in_fp32: bool
) -> None:
    in_fp32_key = "megatron_cfg.distributed_data_parallel_config.grad_reduce_in_fp32"
    section = layout_options(directory, f"{in_fp32_key}={str(in_fp32).lower()}", mode=mode, precision="bfloat16")
    policy = MegatronPolicy(section, select("cpu"), seed=0, max_steps=10)
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.bfloat16}
    expected = torch.float32 if in_fp32 else torch.bfloat16
    assert {parameter.main_grad.dtype for parameter in policy.model.parameters()} == {expected}


# -- the norm ---------------------------------------------------------------------------------------------------------

CLIPS = "megatron_cfg.optimizer.clip_grad=0.01"  # far below the norm, so that what is clipped by tells


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The gradient norms that megatron-core has computed."""
    computed: list[float] = []

    def watched(*arguments: Any, **keywords: Any) -> float:
        computed.append(get_grad_norm_fp32(*arguments, **keywords))
        return computed[-1]

    monkeypatch.setattr(megatron_optimizer, "get_grad_norm_fp32", watched)
    return computed


@pytest.mark.parametrize("mode", ["plain", "distributed"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_update_computes_the_norm_once_and_is_bit_for_bit_that_of_megatron_cores_own_step(
    directory: Path, norms: list[float], mode: str, precision: str
) -> None:
    def make() -> MegatronPolicy:
        section = layout_options(directory, CLIPS, mode=mode, precision=precision)
        return MegatronPolicy(section, select("cpu"), seed=0, max_steps=10)

    ours, theirs = make(), make()
    batches = packer_for(ours.hf_config).pack(random_sequences(ours.hf_config), budget=80)
    for _ in range(2):
        norms.clear()
        metrics = ours.update(batches, toy_loss)
        assert norms == [metrics["grad_norm"]]
        assert metrics["grad_norm"] > 0.1
        _, optimizer, scheduler = theirs._training()
        theirs.gradient_norm(batches, toy_loss)
        with theirs.device.megatron():
            optimizer.step()
        scheduler.step(increment=1)
    assert len(norms) == 3  # the last of ours, and two of theirs
    for (name, one), (_, other) in zip(ours.stream(), theirs.stream(), strict=True):
        assert torch.equal(one, other), name


def test_the_norm_is_that_of_one_step_alone(
    make: Callable[..., MegatronPolicy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a step that raises: the next one is asked for its own."""
    policy = make()
    step(policy)
    _, optimizer, _ = policy._training()
    own = optimizer.get_grad_norm

    def fails() -> None:
        raise ArithmeticError("no step")

    monkeypatch.setattr(optimizer, "step", fails)
    with pytest.raises(ArithmeticError):
        step_by_norm(optimizer, 1.0)
    assert optimizer.get_grad_norm == own


# -- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.usefixtures("many_buckets")
def test_a_distributed_optimizer_takes_the_same_steps_after_a_restart(
    make: Callable[..., MegatronPolicy], tmp_path: Path, precision: str
) -> None:
    options = {"mode": "distributed-overlap-gather", "precision": precision}
    checkpoints = Checkpoints(tmp_path, None)
    straight = make(**options)
    step(straight)
    checkpoints.save(1, straight, {})
    expected = [step(straight) for _ in range(2)]
    restored = make(**options)
    step(restored)  # what it did before must not matter
    checkpoints.load(1, restored)
    assert [step(restored) for _ in range(2)] == expected
    for (name, one), (_, other) in zip(straight.stream(), restored.stream(), strict=True):
        assert torch.equal(one, other), name


def test_a_checkpoint_before_the_first_step(make: Callable[..., MegatronPolicy], tmp_path: Path) -> None:
    expected = [step(policy) for policy in [make()] for _ in range(2)]
    policy = make()
    Checkpoints(tmp_path, None).save(0, policy, {})
    assert [step(policy) for _ in range(2)] == expected
    restored = make()
    Checkpoints(tmp_path, None).load(0, restored)
    assert [step(restored) for _ in range(2)] == expected


@pytest.mark.usefixtures("many_buckets")
def test_megatron_cores_own_state_dict_takes_moments_from_wrong_places(make: Callable[..., MegatronPolicy]) -> None:
    """Negative: why ``policy.checkpointing`` gathers the state itself. It counts the padding of buckets on one side."""
    policy = make(mode="distributed-overlap")
    step(policy)
    optimizer = inner(policy)
    with policy.device.megatron():
        theirs = optimizer.sharded_param_state_fully_reshardable(
            model_sharded_state_dict=policy.model.sharded_state_dict(),
            metadata={"distrib_optim_sharding_type": "fully_reshardable"},
        )
    wrong = 0
    for number, spread in enumerate(spreads(optimizer)):
        moments = optimizer.state[piece(optimizer, spread.parameter)]  # of one rank: all there is
        wrong += not torch.equal(theirs[number]["exp_avg"].data.flatten(), moments["exp_avg"])
    assert len(optimizer.buffers[0].buckets) > 3
    assert wrong > 0


def test_megatron_cores_own_load_shares_one_step_counter(make: Callable[..., MegatronPolicy]) -> None:
    """Negative: after it, every parameter's update advances the count that all of them read."""
    policy = make(mode="distributed")
    step(policy)
    optimizer = inner(policy)
    before = {name: tensor.clone() for name, tensor in policy.stream()}
    with policy.device.megatron():
        optimizer.load_state_dict(optimizer.state_dict())
    counters = [state["step"] for state in optimizer.state.values()]
    assert len({counter.data_ptr() for counter in counters}) == 1
    step(policy)
    assert int(counters[0]) == 1 + len(counters)

    right = make(mode="distributed")
    step(right)
    step(right)
    assert {int(state["step"]) for state in inner(right).state.values()} == {2}
    moved = torch.stack([(tensor - before[name]).norm() for name, tensor in right.stream()]).norm()
    error = torch.stack(
        [(one - other).norm() for (_, one), (_, other) in zip(policy.stream(), right.stream(), strict=True)]
    ).norm()
    assert error > 0.1 * moved  # Adam's bias correction is that of a later step


# -- one pass over a tensor on a CPU ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["plain", "distributed"])
def test_adam_takes_one_pass_over_a_tensor_on_a_cpu(make: Callable[..., MegatronPolicy], mode: str) -> None:
    fused, looped = make(mode=mode), make(mode=mode)
    assert all(group["fused"] for group in inner(fused).optimizer.param_groups)
    for group in inner(looped).optimizer.param_groups:
        group["fused"] = False
    for policy in (fused, looped):
        for _ in range(3):
            step(policy)
    for (name, one), (_, other) in zip(fused.stream(), looped.stream(), strict=True):
        # Three steps of 1e-3, where a moment near zero is rounded otherwise.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, msg=name)
