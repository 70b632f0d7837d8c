# SPDX-License-Identifier: Apache-2.0
"""Encoding of chat messages and images as model inputs, by the tokenizer and, for vision models, the image processor.

``AutoProcessor`` is not used, because it requires a video processor, which needs torchvision. The image processor is
that of the model family (``models.base.Vision.image_processor``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from megatron_g2rpo import models
from megatron_g2rpo.data.chat_text import ChatText, checked_messages, joined_text
from megatron_g2rpo.data.errors import DataError, SampleError, because
from megatron_g2rpo.data.tokenizer import load_chat_template, load_tokenizer, named_eos_tokens, turn_end
from megatron_g2rpo.models.directory import load_config
from megatron_g2rpo.tasks.prompts import build_messages
from megatron_g2rpo.tasks.response_formats import ResponseFormat
from megatron_g2rpo.types import ModelInputs, Prompt, Sample
from megatron_g2rpo.weights import ProcessorSettings

NO_TOKEN = -1


class ChatProcessor:
    """Tokenizer, chat template and image processor of one Hugging Face directory.

    Attributes:
        family: the model family that the directory's config.json names.
        tokenizer: the directory's tokenizer.
        chat_template: the directory's chat template.
        image_processor: the directory's image processor, in its PIL implementation; None for a text-only model.
        vision_token_ids: image and video placeholders and the tokens around them, which a policy must never sample.
        image_token_id: the placeholder of images; ``NO_TOKEN`` for a text-only model.
        spatial_merge_size: number of patches along one side that merge into one image token.
        eos_token_id: the token that ends the assistant's turn: the chat template's, else the tokenizer's.
        eos_token_ids: all tokens that end a response, this one first: the tokenizer's, and those that
            generation_config.json names.
        vocab_size: number of rows of the model's embedding.

    Args:
        model_dir: a Hugging Face directory; nothing is downloaded. Its config.json names the model family, which says
            whether the model takes images.
        min_pixels: lower bound on height x width after resizing; None for the directory's own bound.
        max_pixels: upper bound on height x width after resizing; None for the directory's own bound.
        system_prompt: text of the system turn that ``encode_sample`` puts first; None for no such turn.
        instructed: task -> the response format whose instruction the task's prompts contain; prompts of other tasks
            contain none.

    Raises:
        DataError: the directory does not exist, its model family is unknown, its image processor is another family's,
            it has no tokenizer, no chat template that renders a question or no end-of-turn token, its tokenizer lacks a
            vision token, a token that every run needs lies beyond the model's embedding, or the pixel bounds are in the
            wrong order.
    """

    def __init__(
        self,
        model_dir: str | Path,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        system_prompt: str | None = None,
        instructed: Mapping[str, ResponseFormat] | None = None,
    ) -> None:
        model_dir = Path(model_dir)
        self.family, self.vocab_size = _family_of(model_dir)
        vision = self.family.vision
        self.image_processor: Any = None
        if vision is not None:
            try:
                self.image_processor = vision.image_processor(model_dir, min_pixels, max_pixels)
            except ValueError as error:
                raise DataError(str(error)) from error
        self.tokenizer = load_tokenizer(model_dir)
        self.system_prompt, self._instructed = system_prompt, dict(instructed or {})
        self.spatial_merge_size: int = self.image_processor.merge_size if self.image_processor is not None else 1
        self.chat_template = load_chat_template(model_dir, self.tokenizer)
        self._render([{"role": "user", "content": "Q"}], f"{model_dir}: a question", add_generation_prompt=True)
        vocabulary = self.tokenizer.get_vocab()
        vision_tokens = () if vision is None else vision.tokens.all
        for token in vision_tokens:
            if token not in vocabulary:
                raise DataError(f"{model_dir}: the tokenizer has no token {token}, which its config.json's family has")
        self.image_token_id: int = NO_TOKEN if vision is None else vocabulary[vision.tokens.image]
        self.vision_token_ids: list[int] = [vocabulary[token] for token in vision_tokens]
        ends = [self._turn_end(), self.tokenizer.eos_token_id, *named_eos_tokens(model_dir)]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(each for each in ends if each is not None))
        if not self.eos_token_ids:
            raise DataError(f"{model_dir}: the tokenizer names no end-of-turn token (eos_token)")
        self.eos_token_id: int = self.eos_token_ids[0]
        pad = self.tokenizer.pad_token_id
        self.pad_token_id: int = self.eos_token_id if pad is None else pad
        needed = (*self.vision_token_ids, *self.eos_token_ids, self.pad_token_id)
        if beyond := [i for i in needed if not 0 <= i < self.vocab_size]:
            tokens = ", ".join(f"{token} ({i})" for token, i in zip(self._names(beyond), beyond, strict=True))
            raise DataError(
                f"{model_dir}: the model's embedding has {self.vocab_size} rows, but tokenizer or generation_config "
                f"name tokens beyond: {tokens}; use the tokenizer that the model was trained with, or resize the "
                "embedding (resize_token_embeddings of transformers)"
            )
        self._chat_text = ChatText(self.tokenizer)

    def encode(
        self, messages: Sequence[Mapping[str, Any]], images: Sequence[Image.Image], name: str = "prompt"
    ) -> ModelInputs:
        """Return the model inputs of a chat that waits for the assistant's answer.

        Args:
            messages: chat messages; ``content`` is text, or a list of ``{"type": "image"}`` and
                ``{"type": "text", "text": ...}`` parts. A reserved token that a text spells is plain text.
            images: the images of the messages, in their order.
            name: name of the prompt in error messages.

        Returns:
            ``token_ids`` int64 ``[P]`` with every image placeholder repeated once per merged patch, ``pixel_values``
            float32 ``[V, D]`` and ``image_grid_thw`` int64 ``[I, 3]``.

        Raises:
            SampleError: the messages are not of this form, the chat template refuses them, a text has a token that the
                model's embedding has no row for, there are more or fewer image parts than images, an image cannot be
                decoded, the image processor refuses its shape, or a text-only model is given an image.
        """
        turns, hidden = self._chat_text.hide(checked_messages(messages, name), name)
        pixel_values, image_grid_thw = self._encode_images(images, name)
        text = self._render(turns, name, add_generation_prompt=True)
        ids = self._chat_text.encode(text, hidden, name)
        self._refuse_beyond(ids, name)
        # In NumPy: a prompt is short, and an operation of torch takes several times as long to start.
        once = np.array(ids, dtype=np.int64)
        is_image = once == self.image_token_id
        if (parts := int(is_image.sum())) != len(images):
            raise SampleError(f"{name}: {parts} image parts in the chat, but {len(images)} images")
        repeats = np.ones_like(once)
        repeats[is_image] = image_grid_thw.numpy().prod(axis=1) // self.spatial_merge_size**2
        token_ids = torch.from_numpy(once.repeat(repeats))
        return ModelInputs(token_ids=token_ids, pixel_values=pixel_values, image_grid_thw=image_grid_thw)

    @because("text")
    def encode_sample(self, sample: Sample, task_id: int) -> Prompt:
        """Return the prompt that asks a sample.

        Args:
            sample: what is asked.
            task_id: number of its task, see ``types.Prompt``.

        Returns:
            The prompt; its sample has ``resized_sizes``, the images' sizes in the pixels that the model sees.

        Raises:
            SampleError: the sample cannot be encoded (see ``encode``), or has more or fewer images than ``<image>``
                tags in its question; the message names it.
        """
        name = f"sample {sample.key}"
        try:
            messages = build_messages(sample, self.system_prompt, self._instructed.get(sample.task))
        except ValueError as error:
            raise SampleError(f"{name}: {error}") from error
        inputs = self.encode(messages, sample.images, name=name)
        if len(inputs.image_grid_thw):
            patch = self.image_processor.patch_size
            sizes = tuple((patch * width, patch * height) for _, height, width in inputs.image_grid_thw.tolist())
            sample = dataclasses.replace(sample, resized_sizes=sizes)
        return Prompt(sample=sample, inputs=inputs, task_id=task_id, response_prefix=self.response_prefix)

    @cached_property
    def response_prefix(self) -> str:
        """The beginning of every response that the chat template writes itself, such as ``<think>``; mostly ``""``.

        It is the text after the header of the assistant's turn. The header is known from an earlier answer of a chat,
        where templates put nothing between header and text.
        """
        ask, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "§"}
        asked = self._render([ask], "prompt")
        generation = _after(asked, self._render([ask], "prompt", add_generation_prompt=True))
        return _after(_after(asked, self._render([ask, answer, ask], "prompt")), generation)

    def encode_response(self, text: str, name: str = "response") -> Tensor:
        """Return int64 ``[R]``: the tokens of a response, followed by the end-of-turn token.

        Args:
            text: the response; a reserved token that it spells is plain text.
            name: name of the response in error messages.

        Raises:
            SampleError: the text is no valid Unicode, the tokenizer cannot spell a reserved token as plain text, or the
                model's embedding has no row for a token.
        """
        ids = self._chat_text.encode_plain(text, name)
        self._refuse_beyond(ids, name)
        return torch.tensor([*ids, self.eos_token_id], dtype=torch.int64)

    def banned_token_ids(self, vocab_size: int) -> list[int]:
        """Return the ids that must never be sampled, ascending: vision tokens, and ids that stand for no token.

        Args:
            vocab_size: number of rows of the model's embedding.
        """
        no_token = set(range(vocab_size)) - set(self.tokenizer.get_vocab().values())
        return sorted({*self.vision_token_ids, *no_token})

    def decode(self, token_ids: Tensor | Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else list(token_ids)
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def prompt_text(self, inputs: ModelInputs) -> str:
        """Return a prompt as the model reads it, special tokens included, each of its images as one ``<image>``.

        Args:
            inputs: what ``encode`` returned.
        """
        ids = [i for i in inputs.token_ids.tolist() if i == self.image_token_id or i not in self.vision_token_ids]
        sizes = iter((inputs.image_grid_thw.prod(dim=1) // self.spatial_merge_size**2).tolist())
        parts: list[str] = []
        first = 0
        while first < len(ids):
            if ids[first] == self.image_token_id:
                parts.append("<image>")
                first += next(sizes)
                continue
            end = next((i for i in range(first, len(ids)) if ids[i] == self.image_token_id), len(ids))
            parts.append(self.tokenizer.decode(ids[first:end], clean_up_tokenization_spaces=False))
            first = end
        return "".join(parts)

    @property
    def settings(self) -> ProcessorSettings:
        """What an export of the run must say of this processor."""
        size = None if self.image_processor is None else self.image_processor.size
        image_size = None if size is None else {key: each for key, each in dict(size).items() if each is not None}
        return ProcessorSettings(image_size, self.eos_token_ids)

    def _turn_end(self) -> int | None:
        """Return the token with which the chat template ends the assistant's turn; None if it does not say."""
        ask, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "§"}
        try:
            answered = self._render([ask, answer], "prompt")
        except SampleError:  # a template for prompts alone
            return None
        header = _after(self._render([ask], "prompt"), self._render([ask], "prompt", add_generation_prompt=True))
        return turn_end(self.tokenizer, answered, "§", header)

    def _names(self, ids: Sequence[int]) -> list[str]:
        return [str(token) for token in self.tokenizer.convert_ids_to_tokens(list(ids))]

    def _refuse_beyond(self, ids: Sequence[int], name: str) -> None:
        """Raise if the model's embedding has no row for a token, as of a tokenizer that is larger than it."""
        if max(ids, default=0) >= self.vocab_size:
            beyond = sorted({i for i in ids if i >= self.vocab_size})
            raise SampleError(
                f"{name}: contains the token {self._names(beyond[:1])[0]!r} (id {beyond[0]}), but the model's "
                f"embedding has {self.vocab_size} rows; remove it from the text"
            )

    @because("image")
    def _encode_images(self, images: Sequence[Image.Image], name: str) -> tuple[Tensor, Tensor]:
        processor = self.image_processor
        if processor is None:
            if images:
                raise SampleError(f"{name}: has {len(images)} images, but the model reads text alone")
            return torch.zeros(0, 0), torch.zeros(0, 3, dtype=torch.int64)
        if not images:
            width = 3 * processor.temporal_patch_size * processor.patch_size**2
            return torch.zeros(0, width), torch.zeros(0, 3, dtype=torch.int64)
        pictures = list(images)  # decodes those of a shard
        try:
            features = processor(pictures, return_tensors="pt")
        except ValueError as error:  # extreme aspect ratios
            sizes = ", ".join(f"{image.width}x{image.height}" for image in pictures)
            raise SampleError(f"{name}: the image processor refuses an image of {sizes} pixels ({error})") from error
        return features["pixel_values"].to(torch.float32), features["image_grid_thw"].to(torch.int64)

    def _render(self, messages: Sequence[Mapping[str, Any]], name: str, *, add_generation_prompt: bool = False) -> str:
        # Templates of models of text join strings: Llama's fail at a list of parts, Qwen3's drop it without a word.
        turns = list(messages) if self.image_processor is not None else [joined_text(turn, name) for turn in messages]
        try:
            return self.tokenizer.apply_chat_template(
                turns, chat_template=self.chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise SampleError(f"{name}: the model's chat template refuses it ({error})") from error


def _after(start: str, text: str) -> str:
    """Return the rest of a text after the beginning that it shares with another text."""
    shared = next((i for i, (a, b) in enumerate(zip(start, text, strict=False)) if a != b), min(len(start), len(text)))
    return text[shared:]


def _family_of(model_dir: Path) -> tuple[models.Family, int]:
    """Return the family that a directory's config.json names, and the number of rows of the model's embedding."""
    try:
        config = load_config(model_dir)
    except (OSError, ValueError) as error:
        raise DataError(str(error)) from error
    return models.family(config.model_type), config.get_text_config().vocab_size
