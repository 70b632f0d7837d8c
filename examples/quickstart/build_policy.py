# SPDX-License-Identifier: Apache-2.0
"""Make the quickstart's small policy, untrained: a Hugging Face directory of Qwen3-VL's real architecture.

    python examples/quickstart/build_policy.py --data data/quickstart --out runs/quickstart-init

About 1.6 million random parameters, a byte-level tokenizer of at most 512 entries trained on the text of the training
shards, Qwen's special tokens and turn format, and the image processor's settings. ``megatron-g2rpo sft`` trains it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers, trainers
from transformers import AddedToken, GenerationConfig, Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from megatron_g2rpo.data.shard_index import ShardIndex

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
MARKUP_TOKENS = ("<thinking>", "</thinking>", "<answer>", "</answer>")  # not special: decoding keeps them
VOCAB_SIZE = 512

PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH_SIZE = 8, 2, 2
MIN_PIXELS, MAX_PIXELS = 32 * 32, 128 * 128  # no quickstart image is rescaled

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part.type == 'text' -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def training_text(data: Path) -> Iterator[str]:
    """Questions and responses of the training split without their markup, and the words of the turn format."""
    markup = re.compile("|".join(map(re.escape, MARKUP_TOKENS)))
    for fields in ShardIndex(data / "train").iterate_fields():
        yield fields["question"]
        yield from markup.split(fields["response"])
    yield from ("system\n", "user\n", "assistant\n")


def build_tokenizer(data: Path) -> Qwen2Tokenizer:
    """Qwen's tokenizer (byte-level BPE, digits one by one) with a vocabulary learned from the quickstart's text.

    The class is Qwen's own because ``AutoTokenizer`` builds that class for a Qwen3-VL directory, whatever rules for
    splitting words ``tokenizer.json`` may hold.
    """
    learner = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(MARKUP_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(training_text(data), trainer)
    model = json.loads(learner.to_str())["model"]
    settings: dict[str, Any] = {
        "vocab": model["vocab"],
        "merges": [tuple(pair) for pair in model["merges"]],
        "unk_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
    }
    tokenizer = Qwen2Tokenizer(**settings)
    for token in (*SPECIAL_TOKENS, *MARKUP_TOKENS):
        tokenizer.add_tokens(AddedToken(token, special=token in SPECIAL_TOKENS, normalized=False))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_config(tokenizer: Qwen2Tokenizer) -> Qwen3VLConfig:
    """Qwen3-VL in small: every mechanism of the 8B model is there, most counts are not."""
    vocabulary = tokenizer.get_vocab()
    ids = {token: vocabulary[token] for token in SPECIAL_TOKENS}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": ids[TURN_END],
        "pad_token_id": ids[END_OF_TEXT],
    }
    vision = {
        "depth": 3,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_heads": 4,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": MERGE_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [1],
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        architectures=["Qwen3VLForConditionalGeneration"],
    )


def image_settings(processor_type: dict[str, str], min_pixels: int, max_pixels: int) -> dict[str, Any]:
    """A preprocessor file as the Qwen3-VL checkpoints ship it. ``size`` counts pixels of the whole image or clip."""
    return {
        **processor_type,
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "merge_size": MERGE_SIZE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def build(data: Path, out: Path, seed: int = 0) -> int:
    """Write the directory; returns the number of parameters."""
    tokenizer = build_tokenizer(data)
    config = build_config(tokenizer)
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    preprocessors = {
        "preprocessor_config.json": image_settings(
            {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor"},
            MIN_PIXELS,
            MAX_PIXELS,
        ),
        "video_preprocessor_config.json": image_settings(
            {"video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor"},
            MIN_PIXELS * TEMPORAL_PATCH_SIZE,
            MAX_PIXELS * 16,
        ),
    }
    for name, settings in preprocessors.items():
        (out / name).write_text(json.dumps(settings, indent=2) + "\n")
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Build and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"), help="what build_data.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    arguments = parser.parse_args()
    size = build(arguments.data, arguments.out, arguments.seed)
    print(f"{arguments.out}: {size / 1e6:.2f} million parameters, untrained")


if __name__ == "__main__":
    main()
