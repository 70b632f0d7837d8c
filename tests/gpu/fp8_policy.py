# SPDX-License-Identifier: Apache-2.0
"""A tiny policy whose language linears compute in FP8, rows for it, and the same pass by ``fp8_reference``.

Rows have no padding, so that transformers sees the same tokens as the policy, which matters: a tensor's scale is one
for all tokens of a row. Sizes are multiples of 128 on either of two tensor-parallel ranks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from megatron_g2rpo.data.packing import PackSequence
from megatron_g2rpo.policy.device import Device
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.types import PackedBatch
from tests.common.parity import TEMPERATURE, Values, _token_loss, packer_for
from tests.common.policy_layout import layout_options
from tests.common.tiny_model import make_tiny_qwen3vl, random_inputs
from tests.gpu.fp8_reference import Fp8, Reference

SHAPE: dict[str, Any] = {
    "hidden": 256,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 64,
    "intermediate": 256,
    "deepstack": (0,),
    "tied": False,
}
LENGTH = 64  # tokens of a sequence
ROW = 2 * LENGTH  # tokens of a row: two sequences
ROWS = 2
LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def model_directory(directory: Path) -> Path:
    """Write the tiny model under a directory unless it is there, and return its own directory."""
    target = directory / "fp8_model"
    if not target.exists():
        make_tiny_qwen3vl(target, **SHAPE, seed=1)
    return target


def fp8_policy(
    directory: Path,
    device: Device,
    fp8: str | None,
    format: str = "e4m3",
    *overrides: str,
    steps: int = 20,
    **keys: Any,
) -> MegatronPolicy:
    """Return a policy on Transformer Engine's layers, in float32 unless ``precision`` says otherwise.

    Args:
        directory: see ``model_directory``.
        device: this rank's device.
        fp8: FP8 recipe; None for none.
        format: FP8 format.
        overrides: further overrides of ``policy`` keys.
        steps: largest number of optimizer steps.
        keys: keywords of ``layout_options``.
    """
    reset_scales()
    precision = keys.pop("precision", "float32")
    if precision == "float32":  # Transformer Engine's attention in float32 takes no padded rows
        keys["core_attention"] = "local"
    switches = {"enabled": fp8 is not None, "fp8_recipe": fp8 or "tensorwise", "fp8": format}
    own = [f"megatron_cfg.fp8_cfg.{key}={json.dumps(value)}" for key, value in switches.items()]
    settings = layout_options(model_directory(directory), *own, *overrides, precision=precision, **keys)
    return MegatronPolicy(settings, device, seed=0, max_steps=steps)


def reset_scales() -> None:
    """Forget the scales of earlier policies of this process: Transformer Engine keeps them in one place."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()


def sequences(config: Any, count: int = ROWS * ROW // LENGTH, seed: int = 0) -> list[PackSequence]:
    """Return sequences of ``LENGTH`` tokens with no, one and two images."""
    generator = torch.Generator().manual_seed(seed)
    grids = [((), ((4, 6),), ((2, 4), (6, 4)))[index % 3] for index in range(count)]
    made = []
    for index, inputs in enumerate(random_inputs(config, seed=seed, grids=grids)):
        response = LENGTH - len(inputs.token_ids)
        made.append(
            PackSequence(
                inputs=inputs,
                response_ids=torch.randint(config.text_config.vocab_size - 6, (response,), generator=generator),
                advantage=float(torch.randn((), generator=generator)),
                task_id=index % 2,
                behaviour_logprobs=-5 + torch.randn(response, generator=generator),
                token_weight=0.5 + index % 2,
            )
        )
    return made


def rows(policy: MegatronPolicy, members: Sequence[PackSequence]) -> list[PackedBatch]:
    """Return packed rows of ``ROW`` tokens without padding."""
    batches = packer_for(policy.hf_config, policy.layout).pack(members, ROW)
    assert all(len(batch.tokens) == ROW for batch in batches)
    assert all(bool((batch.segment_ids >= 0).all()) for batch in batches)
    return batches


def te_linears(policy: MegatronPolicy) -> dict[str, Any]:
    """Return the linears of this stage's layers by the names of ``Reference.linears``."""
    return {
        f"{layer.layer_number - 1}.{name}": module
        for layer in policy.model.language_model.decoder.layers
        for path, module in layer.named_modules()
        if (name := path.rpartition(".")[2]) in LINEARS
    }


def scales(policy: MegatronPolicy) -> dict[str, list[float]]:
    """Return the delayed scales of input, weight and gradient of every linear."""
    found = {}
    for name, module in te_linears(policy).items():
        forward, backward = (module.fp8_meta[key].scale.tolist() for key in ("scaling_fwd", "scaling_bwd"))
        found[name] = [*forward[:2], backward[0]]
    return found


def gradients(policy: MegatronPolicy) -> dict[str, Tensor]:
    """Return the gradient of every parameter by Hugging Face name, on the CPU. A collective of the replica."""
    return {name: tensor.float().cpu().clone() for name, tensor in policy.stream(lambda weight: weight.main_grad)}


def reference_model(directory: Path, fp8: Fp8 | None, plain_layers: tuple[int, ...] = ()) -> Reference:
    """Return the tiny model with quantised products; None for none."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(model_directory(directory), dtype=torch.float32)
    layers = range(SHAPE["layers"]) if fp8 is None else plain_layers
    return Reference(model, fp8 or Fp8("tensorwise"), tuple(layers))


def reference_pass(
    reference: Reference, members: Sequence[PackSequence], batches: Sequence[PackedBatch], *, backward: bool = True
) -> Values:
    """Run the rows through the reference, each as one batch of its sequences; the loss is ``toy_loss``.

    Returns:
        Values in the order of ``members``; without ``backward`` neither loss nor gradients.
    """
    reference.begin_pass(recording=backward)
    model = reference.model
    model.zero_grad()
    count = sum(len(sequence.response_ids) for sequence in members)
    logprobs: list[Tensor] = [torch.empty(0)] * len(members)
    entropies, total = list(logprobs), 0.0
    for batch in batches:
        ids = batch.sequence_ids.tolist()
        with torch.set_grad_enabled(backward):
            logits = _logits(model, [members[index] for index in ids])
            loss = torch.zeros(())
            for index, own in zip(ids, logits, strict=True):
                sequence = members[index]
                start = len(sequence.inputs.token_ids) - 1
                log_p = (own[start:-1].float() / TEMPERATURE).log_softmax(-1)
                logprob = log_p.gather(1, sequence.response_ids[:, None]).squeeze(1)
                entropy = -(log_p.exp() * log_p).sum(-1)
                logprobs[index], entropies[index] = logprob.detach(), entropy.detach()
                terms = _token_loss(
                    logprob,
                    entropy,
                    sequence.behaviour_logprobs,
                    sequence.advantage,
                    sequence.token_weight,
                    1.0,
                    sequence.task_id,
                )
                loss = loss + terms.sum()
        if backward:  # a sum, divided at the end: FP8 sees gradients of the sum, and its scales are about those
            reference.end_forward()
            loss.backward()
            reference.end_backward()
            total += float(loss.detach())
    gradients = {name: p.grad / count for name, p in model.named_parameters() if p.grad is not None}
    return Values(logprobs, entropies, total / count, [], gradients)


def _logits(model: Any, members: Sequence[PackSequence]) -> Tensor:
    ids = torch.stack([torch.cat([sequence.inputs.token_ids, sequence.response_ids]) for sequence in members])
    pixels = torch.cat([sequence.inputs.pixel_values for sequence in members])
    images = {}
    if len(pixels):
        images = {
            "pixel_values": pixels,
            "image_grid_thw": torch.cat([sequence.inputs.image_grid_thw for sequence in members]),
            "mm_token_type_ids": (ids == model.config.image_token_id).long(),
        }
    return model(input_ids=ids, use_cache=False, **images).logits
