# SPDX-License-Identifier: Apache-2.0
"""The floor: a step that shares prompts, in plain transformers and torch, without anything a framework needs.

All prompts have one length and so have all answers; one batch, one process, no padding, no stop tokens, no filters.
Generation prefills each prompt once and does not repeat its keys: the n answers of a group are n queries against them.
The update lays a batch out as [prompts][answers]; prompts attend causally, and answers, as a batch, to [prompt; own].
The surrogate is the clipped one at its first update, where the ratio is one: its gradient is that of ratio * advantage.

Shape letters: G prompts, n answers to each, P prompt tokens, R answer tokens, H query heads, K key/value heads, D head
dimension, h hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.step import workload
from benchmarks.step.meter import Meter, Step, Work, untrained
from benchmarks.step.sizes import Size

ATTENTION = "shared_prefix_floor"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The processed prompts of a step.

    Attributes:
        ids: int64 ``[G, P]``.
        pixels: float32 ``[patches, D]`` of all images.
        grids: int64 ``[G, 3]``.
        positions: int64 ``[3, G, P]``.
        next_position: int64 ``[G]``, that of the first answer token.
    """

    ids: Tensor
    pixels: Tensor
    grids: Tensor
    positions: Tensor
    next_position: Tensor


@dataclass
class _Layout:
    """What the attention function knows of the tokens it is given.

    Attributes:
        groups, samples: G and n.
        prompt: P; the first G * P tokens of a training row are the prompts'.
        decoding: whether the tokens are one of each answer, after a prefill.
        caches: layer -> keys and values of the prompts ``[G, K, P, D]`` and of the answers ``[G, K, tokens * n, D]``.
    """

    groups: int
    samples: int
    prompt: int
    decoding: bool = False
    caches: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=dict)
    mask: Tensor | None = None


_layout: _Layout


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attend as the layout says; ``query`` is ``[1, H, tokens, D]``, the result ``[1, tokens, H, D]``."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = (
        _decoded(module.layer_idx, q, k, v, scaling) if _layout.decoding else _rows(module.layer_idx, q, k, v, scaling)
    )
    return out[None], None


def _rows(layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Attention of prompts, and of answers behind them; all ``[tokens, heads, D]``."""
    groups, samples, prompt = _layout.groups, _layout.samples, _layout.prompt
    border = groups * prompt
    of_prompts = [x[:border].unflatten(0, (groups, prompt)).transpose(1, 2) for x in (q, k, v)]
    queries, keys, values = of_prompts
    out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scaling, enable_gqa=True)
    parts = [out.transpose(1, 2).flatten(0, 1)]
    if len(q) == border:
        none = keys.new_empty(*keys.shape[:2], 0, keys.shape[3])
        _layout.caches[layer] = (keys, values, none, none)
        return parts[0]
    own = [x[border:].unflatten(0, (groups * samples, -1)).transpose(1, 2) for x in (q, k, v)]
    keys, values = (
        torch.cat([shared.repeat_interleave(samples, dim=0), mine], dim=2)
        for shared, mine in zip(of_prompts[1:], own[1:], strict=True)
    )
    length = own[0].shape[2]
    mask = torch.ones(length, prompt + length, dtype=torch.bool).tril(prompt)
    out = F.scaled_dot_product_attention(own[0], keys, values, attn_mask=mask, scale=scaling, enable_gqa=True)
    return torch.cat([*parts, out.transpose(1, 2).flatten(0, 1)])


def _decoded(layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Attention of one token of each answer, ``[G * n, heads, D]``, to its prompt and what it said before."""
    groups, samples = _layout.groups, _layout.samples
    keys, values, own_keys, own_values = _layout.caches[layer]
    k, v = (x.unflatten(0, (groups, samples)).transpose(1, 2) for x in (k, v))
    own_keys, own_values = torch.cat([own_keys, k], dim=2), torch.cat([own_values, v], dim=2)
    _layout.caches[layer] = (keys, values, own_keys, own_values)
    heads = k.shape[1]
    # The query heads of a key/value head are queries of it too: [G, K, (H / K) * n, D].
    folded = q.unflatten(0, (groups, samples)).unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    out = F.scaled_dot_product_attention(
        folded, torch.cat([keys, own_keys], dim=2), torch.cat([values, own_values], dim=2), attn_mask=_layout.mask,
        scale=scaling,
    )  # fmt: skip
    return out.unflatten(2, (-1, samples)).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)


class Side:
    """Takes steps of the floor.

    Args:
        size: the step.
        directory: where the model is, or will be.
    """

    def __init__(self, size: Size, directory: Path) -> None:
        self._size, self._number = size, 0
        model_directory = workload.build(directory)
        self.model = workload.load(model_directory)
        self.model.model.language_model.config._attn_implementation = ATTENTION
        self._tokenizer = AutoTokenizer.from_pretrained(model_directory, trust_remote_code=False)
        self._images: Any = Qwen2VLImageProcessorPil.from_pretrained(model_directory, trust_remote_code=False)
        banned = torch.tensor(workload.never_sampled(model_directory))
        self._banned = banned
        decay = [p for p in self.model.parameters() if p.ndim > 1]
        rest = [p for p in self.model.parameters() if p.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": workload.WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}],
            lr=workload.LEARNING_RATE,
            fused=True,
        )

    def step(self) -> Step:
        """Take one step."""
        meter, size = Meter(), self._size
        with meter("process"):
            batch = self.processed(self._number)
        self._number += 1
        with meter("generation"), torch.no_grad():
            answers = self.generate(batch)
        rewards = torch.tensor([workload.reward(text) for text in self._tokenizer.batch_decode(answers)])
        grouped = rewards.view(size.prompts, size.samples)
        advantages = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-6)
        with meter("update"):
            self._optimizer.zero_grad()
            self.loss(batch, answers, advantages.flatten()).backward()
            gradients = ((name, p.grad) for name, p in self.model.named_parameters())
            without = untrained(gradients) if self._number == 1 else []
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), workload.CLIP_GRAD)
            self._optimizer.step()
        work = Work(
            rollouts=len(answers),
            prompt_tokens=batch.ids.numel(),
            answer_tokens=answers.numel(),
            updates=1,
            images=len(batch.grids),
        )
        return meter.stop(work, without)

    def processed(self, number: int) -> Batch:
        """Process the prompts of the ``number``-th step, from 0."""
        size = self._size
        first = number % workload.DISTINCT_STEPS * size.prompts
        numbers = range(first, first + size.prompts)
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": workload.question(size, k)}]}]
            for k in numbers
        ]
        features = self._images([workload.image(size, k) for k in numbers], return_tensors="pt")
        texts = self._tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        token = self._tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        texts = [text.replace(token, token * size.image_tokens) for text in texts]
        ids = torch.tensor(self._tokenizer(texts)["input_ids"])
        is_image = (ids == self.model.config.image_token_id).int()
        positions, delta = self.model.model.get_rope_index(
            ids, mm_token_type_ids=is_image, image_grid_thw=features["image_grid_thw"]
        )
        return Batch(
            ids=ids,
            pixels=features["pixel_values"].float(),
            grids=features["image_grid_thw"],
            positions=positions,
            next_position=ids.shape[1] + delta[:, 0],
        )

    def _hidden(self, batch: Batch, answer_ids: Tensor | None = None) -> Tensor:
        """Return hidden states ``[G * (P + n * tokens), h]`` of the prompts, and of answers behind them."""
        model = self.model.model
        ids, positions = batch.ids.flatten(), batch.positions.flatten(1)
        if answer_ids is not None:
            later = batch.next_position.repeat_interleave(self._size.samples)[:, None] + torch.arange(
                answer_ids.shape[1]
            )
            ids = torch.cat([ids, answer_ids.flatten()])
            positions = torch.cat([positions, later.flatten().expand(3, -1)], dim=1)
        vision = model.visual(batch.pixels, grid_thw=batch.grids)
        embeddings = model.get_input_embeddings()(ids)
        is_image = ids == self.model.config.image_token_id
        embeddings = embeddings.masked_scatter(is_image[:, None], vision.pooler_output)
        return model.language_model(
            inputs_embeds=embeddings[None],
            position_ids=positions[:, None],
            use_cache=False,
            visual_pos_masks=is_image[None],
            deepstack_visual_embeds=vision.deepstack_features,
        ).last_hidden_state[0]

    def generate(self, batch: Batch) -> Tensor:
        """Sample the answers, int64 ``[G * n, R]``."""
        global _layout
        size = self._size
        _layout = _Layout(size.prompts, size.samples, batch.ids.shape[1])
        last = self._hidden(batch).unflatten(0, batch.ids.shape)[:, -1].repeat_interleave(size.samples, dim=0)
        position = batch.next_position.repeat_interleave(size.samples)
        tokens = [self._sampled(last)]
        _layout.decoding = True
        heads = self.model.config.text_config
        folds, eye = heads.num_attention_heads // heads.num_key_value_heads, torch.eye(size.samples, dtype=torch.bool)
        prompts = torch.ones(folds * size.samples, batch.ids.shape[1], dtype=torch.bool)
        for number in range(1, size.answer_tokens):
            _layout.mask = torch.cat([prompts, eye.repeat(folds, number)], dim=1)
            hidden = self.model.model.language_model(
                inputs_embeds=self.model.get_input_embeddings()(tokens[-1])[None],
                position_ids=(position + number - 1).expand(3, 1, -1),
                use_cache=False,
            ).last_hidden_state[0]
            tokens.append(self._sampled(hidden))
        return torch.stack(tokens, dim=1)

    def _sampled(self, hidden: Tensor) -> Tensor:
        return torch.multinomial(self._logprobs(hidden).exp(), 1)[:, 0]

    def _logprobs(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden).index_fill(-1, self._banned, -torch.inf).log_softmax(-1)

    def loss(self, batch: Batch, answers: Tensor, advantages: Tensor) -> Tensor:
        """Return the mean over answer tokens of minus ratio times advantage, with its graph.

        Args:
            batch: the prompts.
            answers: int64 ``[G * n, R]``.
            advantages: float ``[G * n]``.
        """
        global _layout
        size, border = self._size, batch.ids.numel()
        _layout = _Layout(size.prompts, size.samples, batch.ids.shape[1])
        hidden = self._hidden(batch, answers[:, :-1])
        last = hidden[:border].unflatten(0, batch.ids.shape)[:, -1:].repeat_interleave(size.samples, dim=0)
        predicting = torch.cat([last, hidden[border:].unflatten(0, (len(answers), -1))], dim=1)
        logprobs = self._logprobs(predicting).gather(2, answers[..., None]).squeeze(2)
        ratio = (logprobs - logprobs.detach()).exp()
        return -(ratio * advantages[:, None].to(ratio)).mean()
