# SPDX-License-Identifier: Apache-2.0
"""The model and the prompts that all sides share, made from seeds.

The model has the architecture of Qwen3-VL, three deepstack levels as the published ones, and 1.9 million random
parameters. Every answer has its full length on every side, without a switch on any of them: all embeddings share a
direction that dominates the hidden states, and those of tokens that must not be sampled (ends of a turn, vision tokens)
point against it, so that, the output matrix being the embedding, their probability is zero in float32.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from benchmarks.step.sizes import FRAME_TOKENS, Size
from megatron_g2rpo.data.shard_writer import ShardWriter

SOURCE = Path("examples/quickstart/policy")  # tokenizer, chat template and image processor
TASK = "characters"
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.01
CLIP_GRAD = 1.0
# Steps find other prompts, up to this many; then they come again.
DISTINCT_STEPS = 4

_COMMON = 1.0  # length of the direction that all embeddings share; the rest of an embedding has length 0.2
_AGAINST = -15.0  # a multiple of it, for tokens that are never sampled: a logit 150 nats below the others


def build(directory: Path) -> Path:
    """Write the Hugging Face directory of the model if it is not there; returns it."""
    target = directory / "model"
    if (target / "model.safetensors").exists():
        return target
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(SOURCE, target, ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    settings = json.loads((SOURCE / "config.json").read_text())
    settings["text_config"]["max_position_embeddings"] = 4096
    settings["vision_config"]["deepstack_visual_indexes"] = [0, 1, 2]
    settings["vision_config"]["num_position_embeddings"] = 64
    config: Any = Qwen3VLConfig(**{key: value for key, value in settings.items() if key != "transformers_version"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3VLForConditionalGeneration(config)
        model.generation_config.eos_token_id = [config.text_config.eos_token_id, config.text_config.pad_token_id]
        model.generation_config.pad_token_id = config.text_config.pad_token_id
        _never_sample(model, never_sampled(target))
    _allow_pixels(target, 512 * 512)
    model.save_pretrained(target)
    return target


def load(model_directory: Path) -> Any:
    """Return the model of ``build`` in transformers, in float32."""
    return Qwen3VLForConditionalGeneration.from_pretrained(
        model_directory, dtype=torch.float32, trust_remote_code=False
    )


def never_sampled(directory: Path) -> list[int]:
    """Return the ids that no answer may contain: special tokens, which end an answer or stand for an image."""
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    return sorted(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)


@torch.no_grad()
def _never_sample(model: Qwen3VLForConditionalGeneration, ids: Sequence[int]) -> None:
    """Give all embeddings a common direction, and those of ``ids`` the opposite one."""
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    direction = torch.randn(embedding.shape[1])
    factor = torch.full((len(embedding), 1), _COMMON)
    factor[list(ids)] = _AGAINST
    embedding += factor * direction / direction.norm()


def _allow_pixels(directory: Path, pixels: int) -> None:
    path = directory / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    settings["size"]["longest_edge"] = pixels
    path.write_text(json.dumps(settings, indent=2) + "\n")


def question(size: Size, number: int) -> str:
    """Return the ``number``-th question: as many random digits, each a token, as make the prompt's length."""
    generator = torch.Generator().manual_seed(number)
    count = size.text_tokens - FRAME_TOKENS
    return "".join(map(str, torch.randint(10, (count,), generator=generator).tolist()))


def image(size: Size, number: int) -> Image.Image:
    """Return the ``number``-th image, of random pixels."""
    generator = torch.Generator().manual_seed(1_000_000 + number)
    pixels = torch.randint(256, (size.side, size.side, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def png(picture: Image.Image) -> bytes:
    """Return an image as a file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(size: Size, directory: Path) -> Path:
    """Write the prompts as our shards if they are not there; returns their directory."""
    target = directory / f"shards-{size.name}"
    if not target.exists():
        unfinished = target.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        with ShardWriter(unfinished) as writer:
            for number in range(size.prompts * DISTINCT_STEPS):
                fields = {"task": TASK, "question": question(size, number), "answer": "0", "answer_format": "exact"}
                writer.write(f"sample-{number}", fields, [png(image(size, number))])
        unfinished.rename(target)
    return target


def reward(text: str) -> float:
    """Return the share of characters with an odd code: random answers of one group hardly ever have equal ones."""
    return sum(ord(character) % 2 for character in text) / max(len(text), 1)
