# SPDX-License-Identifier: Apache-2.0
"""A tiny random Qwen3-VL and random multimodal prompts for it, which the parity tests share.

Every parameter is random, norms and biases included, because ones and zeros hide wrong weight mappings. Nothing here
touches the global random state. Special tokens are the last six ids of the vocabulary, see ``special_tokens``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from megatron_g2rpo import models
from megatron_g2rpo.types import ModelInputs, Prompt, Sample
from megatron_g2rpo.weights import WeightTable

# One prompt a row: the (height, width) grids of its images, in patches before the 2 x 2 merge. The sizes and the
# aspect ratios differ on purpose: mRoPE errors cancel on square images that are all alike.
GRIDS: tuple[tuple[tuple[int, int], ...], ...] = ((), ((4, 6),), ((2, 4), (6, 4)))


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that are not text."""

    pad: int
    eos: int
    vision_start: int
    vision_end: int
    image: int
    video: int

    @property
    def num_text(self) -> int:
        """Number of ordinary text tokens, whose ids are ``0 .. num_text - 1``."""
        return self.pad

    @property
    def banned(self) -> tuple[int, ...]:
        """Ids that a policy must never sample."""
        return (self.vision_start, self.vision_end, self.image, self.video)


def special_tokens(vocab: int) -> SpecialTokens:
    """Return the special ids of a tiny model with ``vocab`` rows in its embedding."""
    return SpecialTokens(*range(vocab - 6, vocab))


def tiny_config(
    *,
    hidden: int = 64,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    intermediate: int = 96,
    vocab: int = 160,
    tied: bool = True,
    vision_depth: int = 3,
    vision_hidden: int = 32,
    vision_heads: int = 2,
    deepstack: Sequence[int] = (0, 1),
    patch: int = 8,
) -> Qwen3VLConfig:
    """Return the config of a tiny Qwen3-VL; ``deepstack`` names the vision blocks that feed the language layers."""
    tokens = special_tokens(vocab)
    half = head_dim // 2
    section = [half - 2 * (half // 3), half // 3, half // 3]
    return Qwen3VLConfig(
        text_config={
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": 1024,
            "eos_token_id": tokens.eos,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": section,
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": vision_depth,
            "hidden_size": vision_hidden,
            "intermediate_size": 2 * vision_hidden,
            "num_heads": vision_heads,
            "patch_size": patch,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": hidden,
            "num_position_embeddings": 25,  # a 5 x 5 grid: no image of GRIDS has that size, so it is interpolated
            "deepstack_visual_indexes": list(deepstack),
        },
        image_token_id=tokens.image,
        video_token_id=tokens.video,
        vision_start_token_id=tokens.vision_start,
        vision_end_token_id=tokens.vision_end,
        tie_word_embeddings=tied,
    )


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter in place: matrices and tables at a scale that keeps activations near one, norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            value = 1.0 + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.2 * noise
        elif name.endswith(("embed_tokens.weight", "pos_embed.weight", "lm_head.weight")):
            value = 0.25 * noise
        else:
            value = noise / parameter[0].numel() ** 0.5
        parameter.data.copy_(value)


def table_for(config: Any) -> WeightTable:
    """Return the weight table of the model's family."""
    return models.family(config.model_type).weights(config)


def make_tiny_qwen3vl(
    dir: Path | str | None = None, *, seed: int = 0, **shape
) -> tuple[Qwen3VLConfig, Qwen3VLForConditionalGeneration]:
    """Build a tiny random fp32 Qwen3-VL in eval mode and, unless ``dir`` is None, save it there as safetensors.

    Args:
        dir: directory to write ``config.json`` and the weights to; no tokenizer or processor is written.
        seed: seed of the weights; the same seed and shape give the same weights.
        shape: keyword arguments of ``tiny_config``.
    """
    config = tiny_config(**shape)
    with torch.random.fork_rng(devices=[]):
        model = Qwen3VLForConditionalGeneration(config).float().eval()
    randomise(model, seed)
    if dir is not None:
        model.save_pretrained(dir)
    return config, model


def random_inputs(
    config: Qwen3VLConfig,
    *,
    seed: int = 0,
    grids: Sequence[Sequence[tuple[int, int]]] = GRIDS,
    text_tokens: int = 9,
) -> list[ModelInputs]:
    """Return random prompts, one per entry of ``grids``: text, then each image with its frame and some text after it.

    Prompts differ in length even where their images do not: the k-th has k more text tokens. ``text_tokens`` is the
    length of the first one's leading text.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = special_tokens(config.text_config.vocab_size)
    vision = config.vision_config
    merge = vision.spatial_merge_size**2
    patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2

    def text(length: int) -> list[int]:
        return torch.randint(tokens.num_text, (length,), generator=generator).tolist()

    inputs = []
    for row, images in enumerate(grids):
        ids = text(text_tokens + row)
        for height, width in images:
            ids += [tokens.vision_start, *[tokens.image] * (height * width // merge), tokens.vision_end, *text(3)]
        grid = torch.tensor([(1, h, w) for h, w in images], dtype=torch.int64).reshape(-1, 3)
        num_patches = int(grid.prod(-1).sum())
        inputs.append(
            ModelInputs(
                token_ids=torch.tensor(ids),
                pixel_values=torch.randn(num_patches, patch_dim, generator=generator),
                image_grid_thw=grid,
            )
        )
    return inputs


def as_prompt(inputs: ModelInputs, key: str, task: str = "toy") -> Prompt:
    """Wrap model inputs as the prompt of a sample that has no more than a name."""
    sample = Sample(key=key, task=task, question="", answer="", answer_format="exact")
    return Prompt(sample=sample, inputs=inputs, task_id=0)


def hf_logits(
    model: Qwen3VLForConditionalGeneration, inputs: ModelInputs, response_ids: Tensor | None = None
) -> Tensor:
    """Return logits ``[P + R, vocab]`` of transformers' forward over one prompt and response, alone and unpadded."""
    ids = inputs.token_ids if response_ids is None else torch.cat([inputs.token_ids, response_ids])
    return model(input_ids=ids[None], use_cache=False, **_images(model, inputs, ids[None])).logits[0]


@torch.no_grad()
def hf_greedy(
    model: Qwen3VLForConditionalGeneration,
    inputs: ModelInputs,
    max_new_tokens: int,
    *,
    ends: Sequence[int],
    pad: int,
    banned: Sequence[int],
) -> list[int]:
    """Return the greedy answer of transformers' own ``generate`` to one prompt, alone and unpadded.

    Args:
        ends: ids that end the answer; the one that occurs is its last token.
        pad: id of the padding, which transformers requires but which has no effect.
        banned: ids that are never generated.
    """
    ids = inputs.token_ids[None]
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends),
        pad_token_id=pad,
        suppress_tokens=list(banned) or None,
        **_images(model, inputs, ids),
    )
    return output[0, ids.shape[1] :].tolist()


def _images(model: Qwen3VLForConditionalGeneration, inputs: ModelInputs, ids: Tensor) -> dict[str, Tensor]:
    if not len(inputs.image_grid_thw):
        return {}
    return {
        "pixel_values": inputs.pixel_values,
        "image_grid_thw": inputs.image_grid_thw,
        "mm_token_type_ids": (ids == model.config.image_token_id).long(),
    }
