# SPDX-License-Identifier: Apache-2.0
"""Prefill: a forward pass over prompts, each once, with the features of their images.

Prompts of similar length go through together, padded on the *right*: under a causal mask a prompt never attends to that
padding, so there is no mask. Images are encoded by the model family's own code, as the policy encodes them.

Shape letters: ``B`` prompts of a pass, ``P`` tokens of the longest, ``F`` merged features of an image, ``L`` levels of
deepstack, ``H`` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_g2rpo import models, progress
from megatron_g2rpo.models.images import Image
from megatron_g2rpo.rollout.transformers.dense_forward import Deepstack, DenseForward, decoder_of
from megatron_g2rpo.rollout.transformers.model_forward import ModelForward
from megatron_g2rpo.rollout.transformers.prefix_cache import Prefilled

# Bounds of one forward pass: tokens of prompts with their padding, and patches of images. A prompt or an image that is
# larger goes through alone.
PASS_TOKENS = 8192
PASS_PATCHES = 16384
# A prompt joins a pass as long as the padding is no more than this share of the tokens, or than so many.
_PADDING_SHARE, _PADDING_TOKENS = 0.25, 256


# What computes prompts and decoding steps of one model.
Forward = DenseForward | ModelForward


@dataclass(frozen=True, kw_only=True)
class PromptTokens:
    """A prompt, and its images in the order of its placeholders.

    Attributes:
        token_ids: int64 ``[P]``.
        images: its images.
    """

    token_ids: Tensor
    images: tuple[Image, ...]

    @property
    def num_patches(self) -> int:
        """Number of patches of all its images, before merging."""
        return sum(image.num_patches for image in self.images)

    @property
    def image_names(self) -> tuple[str, ...]:
        """The names of its images, see ``images.Image``."""
        return tuple(image.name for image in self.images)


@dataclass(frozen=True, kw_only=True)
class PrefilledPrompts:
    """What a pass computed.

    Attributes:
        cache: keys and values.
        hidden: ``[B, H]``, the hidden state at each prompt's last token.
        positions: int64 ``[B]``, the position of each prompt's next token, on all axes.
    """

    cache: Prefilled
    hidden: Tensor
    positions: Tensor


class Prefill:
    """Prefills prompts for one model.

    Args:
        model: a transformers model.
        forward: its forward passes.
        device: its device.
        pad_token_id: token of the padding; nothing attends to it.
    """

    def __init__(self, model: Any, forward: Forward, device: torch.device, pad_token_id: int) -> None:
        self._model, self._forward = model, forward
        self._device = device
        self._pad = pad_token_id
        self._sees = getattr(model.config, "vision_config", None) is not None
        self._family = models.family(model.config.model_type) if self._sees else None

    def encode(self, images: Sequence[Image]) -> list[Tensor]:
        """Run the vision tower; return the features of each image, ``[F, 1 + L, H]`` (see ``models.Vision.features``).

        Raises:
            ValueError: the model's family has no vision.
        """
        vision = None if self._family is None else self._family.vision
        if vision is None:
            raise ValueError(f"the family of {self._model.config.model_type!r} has no vision to encode images with")
        tower = self._model.model.visual
        features: list[Tensor] = []
        for start, stop in passes([image.num_patches for image in images], PASS_PATCHES):
            some = images[start:stop]
            pixels = torch.cat([image.pixels for image in some]).to(self._device, tower.dtype)
            grids = torch.stack([image.grid for image in some]).to(self._device)
            merged = [image.num_patches // self._model.config.vision_config.spatial_merge_size**2 for image in some]
            features += vision.features(tower, pixels, grids).split(merged)
            progress.advance()
        return features

    def __call__(
        self, prompts: Sequence[PromptTokens], features: Callable[[Sequence[PromptTokens]], list[Tensor]]
    ) -> Iterator[PrefilledPrompts]:
        """Yield what passes over the prompts compute, in the order of the prompts.

        Args:
            prompts: prompts, the longest first, so that neighbours are of similar length.
            features: function that gives the features of all images of some prompts, see ``encode``.
        """
        for start, stop in passes([len(prompt.token_ids) for prompt in prompts], PASS_TOKENS, padded=True):
            some = prompts[start:stop]
            yield self._pass(some, features(some))
            progress.advance()

    def _pass(self, prompts: Sequence[PromptTokens], features: Sequence[Tensor]) -> PrefilledPrompts:
        ids = [prompt.token_ids for prompt in prompts]
        lengths = [len(each) for each in ids]
        tokens = pad_sequence(ids, batch_first=True, padding_value=self._pad).to(self._device)
        positions, following = self._positions(prompts)
        layers, hidden = self._forward.prefill(
            self._embedded(tokens, features), positions, lengths, self._deepstack(tokens, features)
        )
        return PrefilledPrompts(cache=Prefilled(layers=layers, lengths=lengths), hidden=hidden, positions=following)

    def _embedded(self, tokens: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Return the embeddings of tokens ``[B, P]``, ``[B, P, H]``; the features take the place of placeholders."""
        embedded = decoder_of(self._model).embed_tokens(tokens)
        if not features:
            return embedded
        of_images = torch.cat([each[:, 0] for each in features]).to(embedded.dtype)
        return embedded.masked_scatter((tokens == self._model.config.image_token_id)[..., None], of_images)

    def _deepstack(self, tokens: Tensor, features: Sequence[Tensor]) -> Deepstack | None:
        """Return what the decoder adds to image tokens after its first layers."""
        if not features or features[0].shape[1] == 1:
            return None
        return Deepstack(tokens == self._model.config.image_token_id, torch.cat(list(features)).unbind(1)[1:])

    def _positions(self, prompts: Sequence[PromptTokens]) -> tuple[Tensor, Tensor]:
        """Return the positions of all tokens, ``[B, P]`` or mRoPE's ``[3, B, P]``, and those that follow, ``[B]``."""
        longest = max(len(prompt.token_ids) for prompt in prompts)
        if self._family is None:
            following = torch.tensor([len(prompt.token_ids) for prompt in prompts], device=self._device)
            return torch.arange(longest, device=self._device).expand(len(prompts), -1), following
        positions = torch.zeros(3, len(prompts), longest, dtype=torch.int64)
        config = self._model.config
        for row, prompt in enumerate(prompts):
            positions[:, row, : len(prompt.token_ids)] = self._family.positions(
                prompt.token_ids,
                torch.stack([image.grid for image in prompt.images]) if prompt.images else _NO_GRIDS,
                image_token_id=config.image_token_id,
                spatial_merge_size=config.vision_config.spatial_merge_size,
            )
        following = positions.amax((0, 2)) + 1
        return positions.to(self._device), following.to(self._device)


_NO_GRIDS = torch.zeros(0, 3, dtype=torch.int64)


def passes(sizes: Sequence[int], limit: int, *, padded: bool = False) -> Iterator[tuple[int, int]]:
    """Yield the begin and end of each run of items that go through the model together.

    Args:
        sizes: size of each item, in tokens or patches.
        limit: largest sum of the sizes of a run of more than one item.
        padded: whether every item takes the room of its run's largest; then padding bounds a run as well.
    """
    start = 0
    while start < len(sizes):
        stop, total, largest = start, 0, 0
        while stop < len(sizes):
            total, largest = total + sizes[stop], max(largest, sizes[stop])
            room = largest * (stop - start + 1) if padded else total
            wasted = room - total
            if stop > start and (room > limit or wasted > max(_PADDING_TOKENS, _PADDING_SHARE * room)):
                break
            stop += 1
        yield start, stop
        start = stop
