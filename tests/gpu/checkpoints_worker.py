# SPDX-License-Identifier: Apache-2.0
"""One rank of the tests of checkpoints and weights on a GPU. Usage: DIRECTORY PART...

The parts are the functions of ``PARTS``. Each builds policies of the directory's model, at the layout of its name, and
reports what a test states a tolerance of; what has none, because it must be equal, is asserted here.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_g2rpo import weights
from megatron_g2rpo.commands.convert.export_hf import export
from megatron_g2rpo.policy import fp8_state, layer_spec, process_groups
from megatron_g2rpo.policy.device import init_process_group, select
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.policy.optimizer_shares import single
from megatron_g2rpo.policy.quantized import is_float8tensor
from megatron_g2rpo.policy.reference_policy import ReferencePolicy
from megatron_g2rpo.train.run.checkpoints import Checkpoints
from megatron_g2rpo.weights.megatron_checkpoint import MODEL_FILES, MegatronCheckpoint
from tests.common.compare import total_distance
from tests.common.launch import report_result
from tests.common.policy_layout import layout_options
from tests.parallel.checkpoint_layouts_worker import Weights, micro_batches, same_files, two_steps, weights_of

LOCAL: dict[str, Any] = {"transformer_impl": "local", "core_attention": "local"}
STEP = 2  # of every checkpoint


def build(
    directory: Path, *overrides: str, steps: int | None = 10, fp8: str = "", fp8_param: bool = False, **keys: Any
) -> MegatronPolicy:
    """A policy in bf16; ``fp8`` names its recipe, the others are those of ``layout_options``.

    The process groups of the policy before it are gone: that one computes no more.
    """
    process_groups.reset()
    cfg = {"enabled": bool(fp8), "fp8_param": fp8_param, "fp8": "hybrid", "fp8_recipe": fp8 or "tensorwise"}
    options = [f"megatron_cfg.fp8_cfg.{key}={value}" for key, value in cfg.items()]
    keys = {"precision": "bfloat16", "mode": "distributed", **keys}
    return MegatronPolicy(layout_options(directory, *options, *overrides, **keys), select(), seed=0, max_steps=steps)


def save(policy: MegatronPolicy, directory: Path) -> None:
    Checkpoints(directory, None).save(STEP, policy, {})


def load(policy: MegatronPolicy, directory: Path) -> None:
    assert Checkpoints(directory, None).load(STEP, policy) == {"step": STEP}


def assert_equal(found: Weights, expected: Weights, what: str) -> None:
    assert found.keys() == expected.keys(), what
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, f"{what}: {name}"
        assert torch.equal(tensor, expected[name]), f"{what}: {name}"


def scales(policy: MegatronPolicy) -> Weights:
    return {name: entry.data.clone() for name, entry in fp8_state.sharded_state_dict(policy.model).items()}


def quantised(policy: MegatronPolicy) -> Weights:
    named = policy.model.named_parameters()
    return {name: weight.dequantize().detach() for name, weight in named if is_float8tensor(weight)}


class Saved:
    """What a policy had when it saved, and did afterwards."""

    def __init__(self, weights: Weights, scales: Weights, quantised: Weights) -> None:
        self.weights, self.scales, self.quantised = weights, scales, quantised
        self.metrics: list[dict[str, float]] = []
        self.end: Weights = {}


def resume(directory: Path, checkpoint: Path, **keys: Any) -> Saved:
    """A run that is killed after a checkpoint and resumed goes on as if it had not been, bit for bit."""
    policy = build(directory, **keys)
    two_steps(policy)
    save(policy, checkpoint)
    before = Saved(weights_of(policy), scales(policy), quantised(policy))
    before.metrics = two_steps(policy)
    before.end = weights_of(policy)
    resumed = build(directory, **keys)
    load(resumed, checkpoint)
    assert_equal(weights_of(resumed), before.weights, "weights on resuming")
    assert_equal(scales(resumed), before.scales, "FP8 scales and histories on resuming")
    assert_equal(quantised(resumed), before.quantised, "FP8 weights on resuming")
    again = checkpoint.with_name(checkpoint.name + "-again")
    save(resumed, again)
    same_files(checkpoint, again)
    assert two_steps(resumed) == before.metrics
    assert_equal(weights_of(resumed), before.end, "weights two steps after resuming")
    return before


@contextmanager
def names_of_version_0_3_0() -> Iterator[None]:
    """Local layers that are built here save norms under their own names, as up to version 0.3.0."""
    before = layer_spec._LOCAL
    layer_spec._LOCAL = replace(before, checkpoint_names={})
    try:
        yield
    finally:
        layer_spec._LOCAL = before


# -- one process ------------------------------------------------------------------------------------------------------


def torch_saves(directory: Path) -> dict[str, float]:
    """Without Transformer Engine: local layers and torch's AdamW write a checkpoint."""
    policy = build(directory, **LOCAL)
    assert isinstance(single(policy.optimizer).optimizer, torch.optim.AdamW)
    resume(directory, directory / "torch", **LOCAL)
    return {}


def engine_loads(directory: Path) -> dict[str, float]:
    """Layers and optimizer of Transformer Engine go on from it, and save it with no bit changed."""
    policy = build(directory)
    load(policy, directory / "torch")
    adam = single(policy.optimizer).optimizer
    assert type(adam).__module__.startswith("transformer_engine")
    assert {group["step"] for group in adam.param_groups if group["params"]} == {STEP}
    save(policy, directory / "torch-engine")
    same_files(directory / "torch", directory / "torch-engine")
    before = weights_of(policy)
    error = _same_step(adam)
    load(policy, directory / "torch")
    two_steps(policy)
    moved = weights_of(policy)
    local = build(directory, **LOCAL)
    load(local, directory / "torch")
    assert_equal(weights_of(local), before, "local layers")
    two_steps(local)
    layers = total_distance(weights_of(local), moved) / total_distance(moved, before)
    return {"optimizer step": error, "two steps": layers}


def _same_step(adam: Any) -> float:
    """The largest difference between a step of Transformer Engine's Adam and of torch's from one state, in updates."""
    generator = torch.Generator().manual_seed(3)
    copies, groups = [], []
    for group in adam.param_groups:
        names = ("lr", "betas", "eps", "weight_decay")
        groups.append({"params": [], **{name: group[name] for name in names}, "lr": 1e-3})
        group["lr"] = 1e-3
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            copy = parameter.detach().clone()
            copy.grad = parameter.grad.clone()
            groups[-1]["params"].append(copy)
            copies.append((parameter, copy, copy.clone()))
    other = torch.optim.AdamW(groups)
    for parameter, copy, _ in copies:
        moments = {name: adam.state[parameter][name].clone() for name in ("exp_avg", "exp_avg_sq")}
        other.state[copy] = {"step": torch.tensor(float(STEP)), **moments}
    adam.step()
    other.step()
    return max(float((one - two).norm() / (two - before).norm()) for one, two, before in copies)


def torch_loads(directory: Path) -> dict[str, float]:
    """Without Transformer Engine again: local layers and AdamW go on from what Transformer Engine's left."""
    policy = build(directory, **LOCAL)
    load(policy, directory / "engine")
    save(policy, directory / "engine-torch")
    same_files(directory / "engine", directory / "engine-torch")
    return {}


def engine(directory: Path) -> dict[str, float]:
    """Resuming in bf16, either naming of norms, the weight stream and the reference policy."""
    saved = resume(directory, directory / "engine")
    policy = build(directory)
    stored = {name: tensor.to(policy.dtype) for name, tensor in weights.SafetensorsDirectory(directory).items()}
    streamed = {name: tensor.cpu() for name, tensor in weights_of(policy).items()}
    assert_equal(streamed, stored, "the stream of what was loaded from a Hugging Face directory")
    specs = policy.specs()
    assert list(specs) == list(streamed)
    assert all((specs[name].shape, specs[name].dtype) == (t.shape, t.dtype) for name, t in streamed.items())

    with names_of_version_0_3_0():
        local = build(directory, **LOCAL)
    load(local, directory / "engine")  # the reverse: these names, and a checkpoint of the others
    save(local, directory / "old")
    names = set(MegatronCheckpoint(directory / "old" / f"step_{STEP}"))
    assert any("input_layernorm" in name for name in names)
    assert not any("layer_norm_weight" in name for name in names)
    policy = build(directory)
    load(policy, directory / "old")
    save(policy, directory / "old-new")
    same_files(directory / "engine", directory / "old-new")
    # pretrained_checkpoint, and convert export: weights alone.
    for step in (directory / name / f"step_{STEP}" for name in ("engine", "old")):
        alone = build(step / MODEL_FILES, f"pretrained_checkpoint={step}", steps=None)
        assert_equal(weights_of(alone), saved.weights, f"{step} as a pretrained checkpoint")
        _exported(step, saved.weights)

    policy = build(directory)
    batches = micro_batches(policy)
    load(policy, directory / "engine")
    reference = ReferencePolicy(policy)
    expected = [stats.logprobs for stats in policy.logprobs(batches)]
    two_steps(policy)
    found = [stats.logprobs for stats in reference.logprobs(batches)]
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    assert_equal(weights_of(policy), saved.end, "weights after the reference policy was used")
    return {}


def _exported(checkpoint: Path, expected: Weights) -> None:
    target = checkpoint.parent / "exported"
    source = checkpoint / MODEL_FILES
    export(MegatronCheckpoint(checkpoint), target, source=source, dtype="bfloat16", max_shard_size="5GB")
    found: dict[str, Tensor] = dict(weights.SafetensorsDirectory(target).items())
    assert_equal(found, {name: tensor.cpu() for name, tensor in expected.items()}, f"{checkpoint}, exported")


def delayed(directory: Path) -> dict[str, float]:
    """Scales and histories are resumed bit for bit; where a checkpoint has none, a warning says so."""
    saved = resume(directory, directory / "delayed", fp8="delayed")
    assert any(bool((scale != 1).any()) for name, scale in saved.scales.items() if name.endswith("scale"))
    policy = build(directory, fp8="delayed")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(policy, directory / "engine")
    assert any("delayed scaling starts anew" in str(warning.message) for warning in caught)
    assert all(bool((scale == 1).all()) for name, scale in scales(policy).items() if name.endswith("scale"))
    load(build(directory), directory / "delayed")  # and a run in bf16 goes on from a run in FP8
    return {}


def fp8_weights(directory: Path) -> dict[str, float]:
    """Weights that are FP8: bit for bit on resuming; saved and streamed as what they were rounded from."""
    start = weights_of(build(directory))
    for recipe in ("tensorwise", "delayed"):
        policy = build(directory, fp8=recipe, fp8_param=True)
        assert quantised(policy)
        assert_equal(weights_of(policy), start, f"{recipe}: the stream of what was loaded")
        saved = resume(directory, directory / recipe, fp8=recipe, fp8_param=True)
        _exported(directory / recipe / f"step_{STEP}", saved.weights)
        plain = build(directory)
        load(plain, directory / recipe)
        assert_equal(weights_of(plain), saved.weights, f"{recipe}: as weights in bf16")
        policy = build(directory, fp8=recipe, fp8_param=True)
        load(policy, directory / recipe)
        _reference_with_fp8_weights(policy)
    return {}


def _reference_with_fp8_weights(policy: MegatronPolicy) -> None:
    kept = quantised(policy)
    reference = ReferencePolicy(policy)
    two_steps(policy)
    moved = quantised(policy)
    assert any(not torch.equal(moved[name], kept[name]) for name in kept)
    with reference._in_place():
        assert_equal(quantised(policy), kept, "FP8 weights of the reference policy")
    assert_equal(quantised(policy), moved, "FP8 weights after the reference policy was used")


# -- two processes ----------------------------------------------------------------------------------------------------


def layouts(directory: Path) -> dict[str, float]:
    """Resuming at TP 2 with sequence parallelism; the stream at TP 2 and PP 2; scales from TP 2 to DP 2 and PP 2."""
    sharded: dict[str, Any] = {"tp": 2, "sequence_parallel": True}
    resume(directory, directory / "tensor", **sharded)
    stored = {name: tensor.bfloat16() for name, tensor in weights.SafetensorsDirectory(directory).items()}
    for keys in (sharded, {"pp": 2}, {"pp": 2, **LOCAL}):
        policy = build(directory, **keys)
        streamed = {name: tensor.cpu() for name, tensor in weights_of(policy).items()}
        assert_equal(streamed, stored, f"the stream at {keys}")
        load(policy, directory / "tensor")
        again = directory / ("tensor-" + "-".join(map(str, keys.values())))
        save(policy, again)
        same_files(directory / "tensor", again)
    saved = resume(directory, directory / "tensor-delayed", fp8="delayed", **sharded)
    others: tuple[dict[str, Any], ...] = ({"tp": 1}, {"pp": 2})
    for keys in others:
        policy = build(directory, fp8="delayed", **keys)
        load(policy, directory / "tensor-delayed")
        found = scales(policy)
        assert found.keys() <= saved.scales.keys()
        assert_equal(found, {name: saved.scales[name] for name in found}, f"delayed scales of TP 2 at {keys}")
        assert len(found) * keys.get("pp", 1) == len(saved.scales)
    return {}


def fp8_weights_of_two(directory: Path) -> dict[str, float]:
    """FP8 weights whose float32 copies are shared out over two data-parallel ranks."""
    start = weights_of(build(directory))
    assert_equal(weights_of(build(directory, fp8="tensorwise", fp8_param=True)), start, "the stream")
    resume(directory, directory / "shared", fp8="tensorwise", fp8_param=True)
    return {}


PARTS = (torch_saves, engine_loads, torch_loads, engine, delayed, fp8_weights, layouts, fp8_weights_of_two)


def main() -> None:
    directory, names = Path(sys.argv[1]), sys.argv[2:]
    init_process_group(select())
    parts = {part.__name__: part for part in PARTS}
    report_result({name: parts[name](directory) for name in names})


if __name__ == "__main__":
    main()
