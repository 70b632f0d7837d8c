# SPDX-License-Identifier: Apache-2.0
"""The parity check: the Megatron policy against transformers, log-probabilities, entropies and gradients.

Used in one process by the unit tests and in several by ``tests/parallel``. What is compared: fp32, packed rows of
prompts with no image, one image and two images of different sizes; every parameter random.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_g2rpo.data.packing import Packer, PackSequence
from megatron_g2rpo.nouns import PackedBatch, TokenStats
from megatron_g2rpo.policy.megatron import LossTerms, MegatronPolicy
from tests.tiny_model import GRIDS, hf_logits, make_tiny_qwen3vl, random_inputs, special_tokens

# fp32 over a few layers: sums in another order move the last bits of numbers around 1 to 10.
LOGPROB_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4

SHAPES: dict[str, dict[str, Any]] = {
    "base": {},
    "wide": {"hidden": 96, "layers": 4, "heads": 6, "kv_heads": 2, "head_dim": 24, "intermediate": 128},
    "untied": {"tied": False, "vocab": 161, "layers": 2, "heads": 4, "kv_heads": 4, "deepstack": (1,)},
}


def policy_options(directory: Path | str, *, tensor: int = 1, lr: float = 1e-3, **changes: Any) -> SimpleNamespace:
    """A recipe's ``policy`` section with the keys that the policy reads."""
    optimizer = {"lr": lr, "min_lr": 0.0, "weight_decay": 0.01, "clip_grad": 1.0}
    adam = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8}
    ddp = {"grad_reduce_in_fp32": True, "overlap_grad_reduce": False, "use_distributed_optimizer": False}
    megatron = {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
        "sequence_parallel": False,
        "freeze_vision": False,
        "optimizer": SimpleNamespace(**optimizer, **adam),
        "scheduler": SimpleNamespace(lr_warmup_steps=0, lr_decay_style="constant", lr_decay_steps=None),
        "distributed_data_parallel_config": SimpleNamespace(**ddp),
    }
    options = {
        "model_name": str(directory),
        "init": "pretrained",
        "precision": "float32",
        "logprob_chunk_size": 7,
        "megatron_cfg": SimpleNamespace(**megatron),
    }
    return SimpleNamespace(**{**options, **changes})


def random_sequences(config: Any, *, seed: int = 0, samples: int = 2) -> list[PackSequence]:
    """``samples`` random responses of different lengths (one token among them) to each prompt of ``GRIDS``."""
    generator = torch.Generator().manual_seed(seed)
    text = special_tokens(config.text_config.vocab_size).num_text
    sequences = []
    for prompt, inputs in enumerate(random_inputs(config, seed=seed, grids=GRIDS)):
        for sample in range(samples):
            length = 1 + 5 * sample + prompt
            sequences.append(
                PackSequence(
                    inputs=inputs,
                    response_ids=torch.randint(text, (length,), generator=generator),
                    advantage=float(torch.randn((), generator=generator)),
                    task_id=prompt % 2,
                )
            )
    return sequences


def packer_for(config: Any) -> Packer:
    """A packer with the tiny model's tokens."""
    tokens = special_tokens(config.text_config.vocab_size)
    return Packer(
        image_token_id=tokens.image,
        spatial_merge_size=config.vision_config.spatial_merge_size,
        pad_token_id=tokens.pad,
    )


def toy_loss(batch: PackedBatch, stats: TokenStats) -> LossTerms:
    """A policy gradient plus an entropy term: both gradients of the log-probability kernel are exercised."""
    terms = -batch.advantages * stats.logprobs + 0.1 * stats.entropy
    return LossTerms(loss=(terms * batch.loss_mask).sum(), num_tokens=batch.num_tokens, sums={})


def reference(model: Any, sequences: list[PackSequence], temperature: float) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities and entropies of every response, one unpadded transformers forward each; gradient included.

    The gradient of ``toy_loss`` over all sequences is left in ``model``'s parameters.
    """
    logprobs, entropies = [], []
    total = torch.zeros(())
    for sequence in sequences:
        start = len(sequence.inputs.token_ids) - 1
        logits = hf_logits(model, sequence.inputs, sequence.response_ids)[start:-1] / temperature
        log_p = logits.log_softmax(-1)
        logprob = log_p.gather(1, sequence.response_ids[:, None]).squeeze(1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        total = total + (-sequence.advantage * logprob + 0.1 * entropy).sum()
        logprobs.append(logprob.detach())
        entropies.append(entropy.detach())
    model.zero_grad()
    (total / sum(len(sequence.response_ids) for sequence in sequences)).backward()
    return logprobs, entropies


def check_parity(
    directory: Path, device: Any, *, tensor: int, shape: str, temperature: float = 0.8
) -> dict[str, float]:
    """Assert parity at one layout; data parallelism takes the rest of the world.

    Returns:
        The largest errors seen, by name.
    """
    config, model = make_tiny_qwen3vl(**SHAPES[shape], seed=1)
    policy = MegatronPolicy(policy_options(directory / shape, tensor=tensor), device, seed=0, max_steps=10)
    sequences = random_sequences(config)
    # Uneven on purpose: data rank 0 owns one sequence in three, the last rank the rest.
    mine = [
        index
        for index in range(len(sequences))
        if policy.groups.data_size == 1 or (index % 3 == 0) == (policy.groups.data_rank == 0)
    ]
    packer = packer_for(config)
    batches = packer.pack([sequences[index] for index in mine], budget=80, num_bins=4)

    logprobs, entropies = reference(model, sequences, temperature)
    errors = {"logprob": 0.0, "entropy": 0.0, "gradient": 0.0}
    seen = 0
    for batch, stats in zip(batches, policy.logprobs(batches, temperature), strict=True):
        for segment, row in enumerate(batch.rows.tolist()):
            where = (batch.segment_ids == segment) & (batch.task_ids >= 0)
            index = mine[row]
            seen += 1
            errors["logprob"] = max(errors["logprob"], _distance(stats.logprobs[where], logprobs[index]))
            errors["entropy"] = max(errors["entropy"], _distance(stats.entropy[where], entropies[index]))
    assert seen == len(mine)

    policy.gradients(batches, toy_loss, temperature)
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    expected.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    streamed = dict.fromkeys(expected, False)
    for name, gradient in policy.stream(lambda parameter: parameter.main_grad):
        error = float((gradient - expected[name]).norm() / expected[name].norm())
        errors["gradient"] = max(errors["gradient"], error)
        assert error <= GRADIENT_TOLERANCE, f"{name}: relative gradient error {error:.2e}"
        streamed[name] = True
    # A parameter that megatron-core does not know as sharded would be counted once too few or too often here.
    grad_norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    errors["grad_norm"] = abs(policy.update(batches, toy_loss, temperature)["grad_norm"] / float(grad_norm) - 1)
    assert errors["grad_norm"] <= GRADIENT_TOLERANCE, errors
    assert all(streamed.values()), f"no gradient for {[name for name, seen in streamed.items() if not seen]}"
    assert errors["logprob"] <= LOGPROB_TOLERANCE, errors
    assert errors["entropy"] <= LOGPROB_TOLERANCE, errors
    return errors


def _distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).abs().max())
