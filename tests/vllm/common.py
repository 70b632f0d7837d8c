# SPDX-License-Identifier: Apache-2.0
"""The quickstart's policy with random weights, prompts with images for it, and transformers as the oracle."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from megatron_g2rpo import recipe
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.rollout import base
from megatron_g2rpo.rollout.transformers.sampling import filtered
from megatron_g2rpo.types import Prompt, Rollout, Sample
from tests.common.tiny_model import hf_greedy, hf_logits, randomise

ROOT = Path(__file__).resolve().parents[2]
POLICY = ROOT / "examples" / "quickstart" / "policy"
RECIPE = ROOT / "examples" / "recipes" / "vlm_g2rpo-quickstart-1n1g-megatron-tp1.yaml"
# fp32, and logits of order 10 out of some ten layers of sums in another order; a wrong position gives > 0.1.
ATOL = 1e-4

# Many end tokens, so that the answers of a random model end at many different places.
ENDS = [431, *range(20)]

Weights = list[tuple[str, Tensor]]


def load_recipe(*overrides: str) -> TrainRecipe:
    """The quickstart's recipe on vLLM."""
    vllm = ["policy.generation.backend=vllm", f"policy.model_name={POLICY}"]
    return recipe.load(RECIPE, [*vllm, *overrides], "train")


def random_model(directory: Path, seed: int) -> Qwen3VLForConditionalGeneration:
    """The quickstart's model with all weights random, norms and biases too, saved beside the quickstart's tokenizer."""
    shutil.copytree(POLICY, directory)
    model = Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    randomise(model, seed)
    model.save_pretrained(directory)
    return model


def named(model: torch.nn.Module) -> Weights:
    """What a weight stream yields."""
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def make_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Prompts with 0, 1 and 2 noisy images of different sizes in turn, and texts of different lengths."""
    processor, generator = ChatProcessor(POLICY), np.random.default_rng(seed)
    prompts = []
    for number in range(count):
        sizes = [(64, 64), (96, 48)][: number % 3]
        images = [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
        text = " ".join(["What color is the shape?"] * (1 + number // 3 % 4))
        sample = Sample(
            key=f"shard/{number}", task="toy", question=text, answer="", answer_format="exact", images=images
        )
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        inputs = processor.encode([{"role": "user", "content": content}], images)
        prompts.append(Prompt(sample=sample, inputs=inputs, task_id=0))
    return prompts


def context(settings: TrainRecipe, **changes: object) -> base.Context:
    """What ``train.assembly`` makes for an engine."""
    processor = ChatProcessor(settings.policy.model_name)
    values = {
        "policy": settings.policy,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "nccl": False,
        "eos_token_ids": ENDS,
        "pad_token_id": processor.pad_token_id,
        "banned_token_ids": banned(),
        "image_token_id": processor.image_token_id,
        "spatial_merge_size": processor.spatial_merge_size,
        "decode": processor.decode,
        **changes,
    }
    return base.Context(**values)  # type: ignore[arg-type]


def banned() -> list[int]:
    """Ids that are never sampled."""
    processor = ChatProcessor(POLICY)
    rows = Qwen3VLForConditionalGeneration.config_class.from_pretrained(POLICY).get_text_config().vocab_size
    return processor.banned_token_ids(rows)


def generate(engine: base.Engine, prompts: Sequence[Prompt], n: int = 4, *, seed: int = 5, **sampling: object):
    """With group ids that count the prompts."""
    drawn = base.Sampling(**{"temperature": 1.0, **sampling})  # type: ignore[arg-type]
    return engine.generate(prompts, n, sampling=drawn, seed=seed, group_ids=list(range(len(prompts))))


def tokens_of(rollouts: Sequence[Rollout]) -> dict[tuple[str, int], list[int]]:
    """By prompt and sample."""
    return {(r.prompt.key, r.sample_index): r.response_ids.tolist() for r in rollouts}


@torch.no_grad()
def forward_logprobs(model: Qwen3VLForConditionalGeneration, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of a response by transformers' own forward pass, banned tokens left out: float32 ``[R]``."""
    return filtered_logprobs(model, rollout, base.Sampling(temperature=temperature))


@torch.no_grad()
def filtered_logprobs(model: Qwen3VLForConditionalGeneration, rollout: Rollout, sampling: base.Sampling) -> Tensor:
    """The same over the tokens that pass filters, those of the embedded engine."""
    table = _filtered(model, rollout, sampling).log_softmax(-1)
    return table.gather(1, rollout.response_ids[:, None])[:, 0].float()


def kept_by_filters(
    model: Qwen3VLForConditionalGeneration, rollout: Rollout, sampling: base.Sampling
) -> list[list[int]]:
    """Ids that each token of a response could be sampled from, ascending."""
    return [row.nonzero()[:, 0].tolist() for row in _filtered(model, rollout, sampling).isfinite()]


@torch.no_grad()
def _filtered(model: Qwen3VLForConditionalGeneration, rollout: Rollout, sampling: base.Sampling) -> Tensor:
    logits = hf_logits(model, rollout.prompt.inputs, rollout.response_ids)
    predicting = logits[len(rollout.prompt.inputs.token_ids) - 1 : -1].double() / sampling.temperature
    predicting[:, banned()] = -torch.inf
    return filtered(predicting, sampling)


def greedy(model: Qwen3VLForConditionalGeneration, prompt: Prompt, max_new_tokens: int) -> list[int]:
    """What transformers' ``generate`` answers greedily."""
    pad = ChatProcessor(POLICY).pad_token_id
    return hf_greedy(model, prompt.inputs, max_new_tokens, ends=ENDS, pad=pad, banned=banned())


def same(expected: dict[tuple[str, int], list[int]], actual: dict[tuple[str, int], list[int]]) -> Iterator[bool]:
    """Whether each response is the same in both."""
    assert expected.keys() == actual.keys()
    return (expected[key] == actual[key] for key in expected)
